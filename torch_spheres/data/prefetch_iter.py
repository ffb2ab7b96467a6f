"""The iterator of a wrapped loader with ``num_workers > 0``: logical workers load ahead of it.

Which index list goes to which worker, when the sampler is asked for the next one, and in which
order results are handed out is what a `DataLoader` does with worker processes.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from torch_spheres import _compat, _core
from torch_spheres.data.iter_base import SphereIterator
from torch_spheres.data.logical_worker import Plan, Result
from torch_spheres.data.resume import Progress, shared_states
from torch_spheres.data.tensor_gather import prepare
from torch_spheres.data.worker_pool import Team, WorkerThread
from torch_spheres.runtime.caller_context import CallerContext, caller_context

if TYPE_CHECKING:
    from torch_spheres.data.loader import SphereLoader

__all__ = ["AheadIterator"]


_SHARED_RANDOM = (
    "while logical workers loaded a batch, something drew from or seeded the process's own random "
    "or numpy.random generators (the dataset or worker_init_fn, as it seems): threads share them, "
    "so the numbers depend on the order in which threads come by. Draw from "
    "torch.utils.data.get_worker_info().rng (random_generator, numpy_generator) or from torch, or "
    'use wrap(loader, workers="process")'
)


_LOOKS = 8  # batches


def _context() -> CallerContext:
    """What the caller has set; but for inference mode, whose tensors could not be trained on later.

    A batch from a process is made where it is received, whatever was set where it was loaded.
    """
    if not torch.is_inference_mode_enabled():
        return caller_context()
    with torch.inference_mode(mode=False), torch.no_grad():
        return caller_context()


@dataclass
class _Task:
    """One index list."""

    worker: int
    index: Any
    digest: int  # of the index lists up to this one
    rows: _core.Gather | None = None  # being copied
    batch: Any = None  # into this
    over: bool = False  # its worker has room for another


class AheadIterator(SphereIterator):
    """As torch's iterator over worker processes, with threads."""

    def __init__(self, loader: SphereLoader[Any], resumed: Progress | None) -> None:
        super().__init__(loader, resumed)
        assert loader.prefetch_factor is not None
        self._limit = loader.prefetch_factor * self._num_workers
        self._gathers &= loader.worker_init_fn is None
        self._plan = Plan(
            dataset=self._dataset,
            iterable=self._iterable,
            auto_collation=self._auto_collation,
            make_fetcher=self._make_fetcher,
            init_fn=loader.worker_init_fn,
            workers=self._num_workers,
            base_seed=self._base_seed,
            shared_seed=self._shared_seed,
            copies=loader._sphere_copies,
            context=_context(),
            sender=self._sender,
            meter=self._meter,
        )
        self.mark.snapshots = resumed.snapshots() if resumed else {}
        self._team = Team(self._plan, self._spheres, self.mark.snapshots)
        # For what worker processes have for themselves, and threads share.
        self._looks = _LOOKS
        # As torch does, which begins the first epoch of its workers like any other.
        _compat.BaseIterator._reset(self, loader, first_iter=True)
        self._begin_epoch(resumed)

    def _begin_epoch(self, resumed: Progress | None) -> None:
        self._shut = False
        self._sent = self._received = 0  # tasks
        self._open: dict[int, _Task] = {}  # that were not handed out
        self._active = [True] * self._num_workers
        self._load = [0] * self._num_workers  # tasks under way
        first = 0
        if resumed is not None:
            self._sent = self._received = resumed.tasks
            first = resumed.next_worker
            for worker in resumed.ended:
                self._active[worker] = False
        turn = itertools.cycle(range(self._num_workers))
        self._turn = itertools.islice(turn, first, None)
        with self._skipping(resumed):
            for _ in range(self._limit):
                self._put()

    def _reset(self, loader: Any, first_iter: bool = False) -> None:
        """The next epoch of persistent workers."""
        self._begin_counting(fresh=False)
        super()._reset(loader, first_iter)
        if self._team.over:  # its workers are gone, but their random streams go on
            known = {w: snapshot.streams_only() for w, snapshot in self.mark.snapshots.items()}
            self.mark.snapshots = known
            self._team = Team(self._plan, self._spheres, known)
        else:
            self.mark.snapshots = self._team.begin_epoch(self._shared_seed)
        self._begin_epoch(None)

    def _put(self) -> None:
        """Asks the sampler for one more index list, and gives it to the worker whose turn it is."""
        try:
            index = self._next_index()
        except StopIteration:
            return
        for worker in itertools.islice(self._turn, self._num_workers):
            if self._active[worker] and (
                self._in_order or self._load[worker] < self._limit // sum(self._active)
            ):
                break
        else:
            return  # all have come to the end of their datasets
        task, self._sent = self._sent, self._sent + 1
        opened = self._open[task] = _Task(worker, index, self._pulled)
        self._load[worker] += 1
        if self._gathers and self._begin_to_gather(opened):
            return
        self._team.put(worker, task, (index, self._places))

    def _next_data(self) -> Any:
        if self._shut:
            raise StopIteration
        while True:
            # What was handed out out of order, or given to workers that have come to their end.
            while self._received < self._sent and self._received not in self._open:
                self._team.drop(self._received)
                self._received += 1
            if self._received == self._sent:
                self.finished = True
                if not self._persistent_workers:
                    self._shutdown_workers()
                raise StopIteration
            ready = self._team.ready
            if self._open[self._received].rows is not None:
                return self._gathered(self._received)
            number, result = self._result()
            task = self._open.get(number)
            if task is None:
                self._team.drop(number)
                continue
            if result.ended:
                self._remember(result)
                self._end(result.worker)
                continue
            try:
                return self._hand_out(number, task, result, ready)
            finally:
                del result  # an error in it owns this frame, by its traceback

    def _result(self) -> tuple[int, Result]:
        """Of the task whose turn it is, or of the first that is done."""
        wanted = self._received if self._in_order else None
        before = shared_states() if self._looks > 0 else None
        try:
            found = self._team.result(wanted, self._timeout)
        except TimeoutError:
            raise RuntimeError(f"DataLoader timed out after {self._timeout} seconds") from None
        # The loop itself, which may draw from them as well, was in here all the time.
        if before is not None:
            self._looks -= 1
            if before != shared_states():
                self._meter.tell(_SHARED_RANDOM)
                self._looks = 0
        return found

    def _remember(self, result: Result) -> None:
        if result.snapshot is not None:
            self.mark.snapshots[result.worker] = result.snapshot

    def _end(self, worker: int) -> None:
        """A worker's iterable dataset is at its end: what else it was given is nobody's."""
        self._active[worker] = False
        self.mark.at.ended = sorted({*self.mark.at.ended, worker})
        self._open = {n: task for n, task in self._open.items() if task.worker != worker}
        self._put()

    def _close(self, number: int, task: _Task) -> None:
        """A task's batch, or error, is about to be the loop's."""
        if not task.over:
            task.over = True
            self._load[task.worker] -= 1
        # First what can be interrupted: then the batch is still there, for the next `next()`.
        self._put()
        del self._open[number]
        self._team.drop(number)
        self._handed_out(number, task.digest, (task.worker + 1) % self._num_workers)
        self._tell_ranks(number, task.digest)

    def _hand_out(self, number: int, task: _Task, result: Result, ready: int) -> Any:
        batch = None if result.deliver is None else result.deliver()
        self._close(number, task)
        self._remember(result)
        self._meter.way = "spheres"
        if result.error is not None:
            try:
                raise result.error
            finally:
                del result  # it owns the error, whose traceback owns this frame
        self._meter.handed_out(batch, self._size_of(task.index), ready)
        return batch

    def _begin_to_gather(self, task: _Task) -> bool:
        """False: it has to be loaded sample by sample."""
        begin = time.perf_counter()
        if torch.is_inference_mode_enabled():  # see `_context`
            with torch.inference_mode(mode=False):
                prepared = prepare(self._dataset, task.index)
        else:
            prepared = prepare(self._dataset, task.index)
        if prepared is None:
            return False
        task.batch, task.rows = prepared
        core = self._running_core()
        if core is not None:
            task.rows.start(core)
        self._meter.worked_since(begin)
        return True

    def _gathered(self, number: int) -> Any:
        task = self._open[number]
        assert task.rows is not None
        ready = sum(t.rows is not None and t.rows.done for t in self._open.values())
        task.rows.finish(self._running_core())
        batch = task.batch
        self._close(number, task)
        self._meter.way = "gather"
        self._meter.handed_out(batch, len(task.index), ready, task.rows.bytes)
        return batch

    def _shutdown_workers(self) -> None:
        """Ends what is under way; the name is torch's, which other libraries call."""
        self._shut = True
        self._team.close()

    @property
    def _workers(self) -> list[WorkerThread]:
        """As torch's iterator has its worker processes."""
        return self._team.threads

    def __del__(self) -> None:
        team = getattr(self, "_team", None)  # it is not there if __init__ raised
        if team is not None:
            team.close()
