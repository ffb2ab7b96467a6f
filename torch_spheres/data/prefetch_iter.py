"""The iterator of a wrapped loader with ``num_workers > 0``: logical workers load ahead of it.

As with worker processes of a `DataLoader`: which index list goes to which worker, when the sampler
is asked for the next one, and in which order results are handed out.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from typing import Any

import torch

from torch_spheres import _compat, _core
from torch_spheres.data.iter_base import SphereIterator
from torch_spheres.data.loader_config import LoaderConfig
from torch_spheres.data.logical_worker import Result, Task, WorkerConfig
from torch_spheres.data.resume import LoaderState, shared_states
from torch_spheres.data.tensor_gather import prepare_gather
from torch_spheres.data.worker_pool import WorkerPool, WorkerThread
from torch_spheres.runtime.caller_context import CallerContext, caller_context

__all__ = ["PrefetchIterator"]


_SHARED_RANDOM = (
    "while logical workers loaded a batch, something drew from or seeded the process's own random "
    "or numpy.random generators (the dataset or worker_init_fn, as it seems): threads share them, "
    "so the numbers depend on the order in which threads come by. Draw from "
    "torch.utils.data.get_worker_info().rng (random_generator, numpy_generator) or from torch, or "
    'use wrap(loader, workers="process")'
)
_RANDOM_CHECKS = 8  # first batches, for which `_SHARED_RANDOM` is looked for


def _context_without_inference_mode() -> CallerContext:
    """The caller's context, but for inference mode: its tensors could not be trained on later.

    (A batch from a worker process is made outside that mode, too.)
    """
    if not torch.is_inference_mode_enabled():
        return caller_context()
    with torch.inference_mode(mode=False), torch.no_grad():
        return caller_context()


@dataclass
class _OpenTask:
    """A task whose batch was not handed out yet."""

    worker: int
    index: Any
    digest: int  # of the index lists up to this one
    gather: _core.Gather | None = None  # fills `batch`, instead of the worker
    batch: Any = None
    counted: bool = True  # among the worker's outstanding tasks


class PrefetchIterator(SphereIterator):
    """What torch's iterator over worker processes does, with threads."""

    def __init__(self, config: LoaderConfig, resumed: LoaderState | None) -> None:
        super().__init__(config, resumed)
        loader = config.loader
        assert loader.prefetch_factor is not None
        self._max_outstanding = loader.prefetch_factor * self._num_workers
        self._gathers &= loader.worker_init_fn is None
        self._worker_config = WorkerConfig(
            dataset=self._dataset,
            iterable=self._iterable,
            auto_collation=self._auto_collation,
            make_fetcher=self._make_fetcher,
            init_fn=loader.worker_init_fn,
            workers=self._num_workers,
            base_seed=self._base_seed,
            shared_seed=self._shared_seed,
            copy_dataset=config.copy_dataset,
            context=_context_without_inference_mode(),
            transfer=self._transfer,
            meter=self._meter,
        )
        self.position.snapshots = resumed.snapshots() if resumed else {}
        self._pool = WorkerPool(self._worker_config, self._spheres, self.position.snapshots)
        self._random_checks = _RANDOM_CHECKS
        # Torch's iterator over worker processes ends its __init__ like this, too.
        _compat.BaseIterator._reset(self, loader, first_iter=True)
        self._begin_epoch(resumed)

    def _begin_epoch(self, resumed: LoaderState | None) -> None:
        self._shut_down = False
        self._sent = self._received = 0  # tasks
        self._open: dict[int, _OpenTask] = {}
        self._active = [True] * self._num_workers
        self._outstanding = [0] * self._num_workers  # tasks of each worker
        first = 0
        if resumed is not None:
            self._sent = self._received = resumed.tasks
            first = resumed.next_worker
            for worker in resumed.ended:
                self._active[worker] = False
        cycle = itertools.cycle(range(self._num_workers))
        self._worker_cycle = itertools.islice(cycle, first, None)
        with self._sampler_at(resumed):
            for _ in range(self._max_outstanding):
                self._put_task()

    def _reset(self, loader: Any, first_iter: bool = False) -> None:
        """Begins the next epoch of persistent workers."""
        self._start_epoch(fresh=False)
        super()._reset(loader, first_iter)
        if self._pool.ended:  # the workers are gone, but their random streams go on
            kept = {w: s.streams_only() for w, s in self.position.snapshots.items()}
            self.position.snapshots = kept
            self._pool = WorkerPool(self._worker_config, self._spheres, kept)
        else:
            self.position.snapshots = self._pool.begin_epoch(self._shared_seed)
        self._begin_epoch(None)

    def _put_task(self) -> None:
        """Asks the sampler for an index list, and gives it to the worker whose turn it is."""
        try:
            index = self._next_index()
        except StopIteration:
            return
        for worker in itertools.islice(self._worker_cycle, self._num_workers):
            if self._active[worker] and (
                self._in_order
                or self._outstanding[worker] < self._max_outstanding // sum(self._active)
            ):
                break
        else:
            return  # all have come to the end of their datasets
        number, self._sent = self._sent, self._sent + 1
        task = self._open[number] = _OpenTask(worker, index, self._index_digest)
        self._outstanding[worker] += 1
        if self._gathers and self._start_gather(task):
            return
        self._pool.put(worker, Task(number, index, self._batch_rows))

    def _next_data(self) -> Any:
        if self._shut_down:
            raise StopIteration
        while True:
            # Skips what was handed out out of order, or given to workers that came to their end.
            while self._received < self._sent and self._received not in self._open:
                self._pool.drop(self._received)
                self._received += 1
            if self._received == self._sent:
                self.position.finished = True
                if not self._persistent_workers:
                    self._shutdown_workers()
                raise StopIteration
            ready = self._pool.ready
            if self._open[self._received].gather is not None:
                return self._finish_gather(self._received)
            number, result = self._next_result()
            task = self._open.get(number)
            if task is None:
                self._pool.drop(number)
                continue
            if result.ended:
                self._end_worker(result)
                continue
            try:
                return self._hand_out(number, task, result, ready)
            finally:
                del result  # an error in it owns this frame, by its traceback

    def _next_result(self) -> tuple[int, Result]:
        """The result of the task whose turn it is, or with ``in_order=False`` of any."""
        wanted = self._received if self._in_order else None
        before = shared_states() if self._random_checks > 0 else None
        try:
            found = self._pool.result(wanted, self._timeout)
        except TimeoutError:
            raise RuntimeError(f"DataLoader timed out after {self._timeout} seconds") from None
        # The loop waited here meanwhile, so it was not the loop that drew from them.
        if before is not None:
            self._random_checks -= 1
            if before != shared_states():
                self._meter.add_warning(_SHARED_RANDOM)
                self._random_checks = 0
        return found

    def _keep_snapshot(self, result: Result) -> None:
        if result.snapshot is not None:
            self.position.snapshots[result.worker] = result.snapshot

    def _end_worker(self, result: Result) -> None:
        """Drops the other tasks of a worker whose iterable dataset has come to its end."""
        self._keep_snapshot(result)
        ended, state = result.worker, self.position.state
        self._active[ended] = False
        state.ended = sorted({*state.ended, ended})
        self._open = {n: task for n, task in self._open.items() if task.worker != ended}
        self._put_task()

    def _close(self, number: int, task: _OpenTask) -> None:
        """Closes a task whose batch, or error, the loop is about to get."""
        if task.counted:
            task.counted = False
            self._outstanding[task.worker] -= 1
        # This comes first, as it can be interrupted: the next `next()` still finds the batch then.
        self._put_task()
        del self._open[number]
        self._pool.drop(number)
        self._advance(number, task.digest, (task.worker + 1) % self._num_workers)
        self._log_batch(number, task.digest)

    def _hand_out(self, number: int, task: _OpenTask, result: Result, ready: int) -> Any:
        batch = None if result.deliver is None else result.deliver()
        self._close(number, task)
        self._keep_snapshot(result)
        self._meter.way = "spheres"
        if result.error is not None:
            try:
                raise result.error
            finally:
                del result  # it owns the error, whose traceback owns this frame
        self._meter.count_batch(batch, self._rows_of(task.index), ready)
        return batch

    def _start_gather(self, task: _OpenTask) -> bool:
        """Whether the batch is gathered; if not, it has to be loaded sample by sample."""
        begin = time.perf_counter()
        if torch.is_inference_mode_enabled():  # see `_context_without_inference_mode`
            with torch.inference_mode(mode=False):
                prepared = prepare_gather(self._dataset, task.index)
        else:
            prepared = prepare_gather(self._dataset, task.index)
        if prepared is None:
            return False
        task.batch, task.gather = prepared
        core = self._running_core()
        if core is not None:
            task.gather.start(core)
        self._meter.count_work_since(begin)
        return True

    def _finish_gather(self, number: int) -> Any:
        task = self._open[number]
        assert task.gather is not None
        ready = sum(t.gather is not None and t.gather.done for t in self._open.values())
        task.gather.finish(self._running_core())
        self._close(number, task)
        self._meter.way = "gather"
        self._meter.count_batch(task.batch, len(task.index), ready, task.gather.bytes)
        return task.batch

    def _shutdown_workers(self) -> None:
        """Ends what is under way; the name is torch's, which other libraries call."""
        self._shut_down = True
        self._pool.close()

    @property
    def _workers(self) -> list[WorkerThread]:
        """The logical workers, under the name of the worker processes of torch's iterator."""
        return self._pool.threads

    def __del__(self) -> None:
        pool = getattr(self, "_pool", None)  # it is not there if __init__ raised
        if pool is not None:
            pool.close()
