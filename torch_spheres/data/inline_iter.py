"""The iterator of a wrapped loader with ``num_workers=0``: the loop's own thread loads.

As torch's iterator, it asks the sampler for an index list at each ``next()``, and has torch's
fetcher load it then and there. Only tensors in memory are gathered in C++ instead.
"""

from __future__ import annotations

import time
from typing import Any

from torch_spheres.data.data_pipes import DATA_PIPES, shard_pipe
from torch_spheres.data.iter_base import SphereIterator
from torch_spheres.data.loader_config import LoaderConfig
from torch_spheres.data.resume import LoaderState, WorkerSnapshot
from torch_spheres.data.tensor_gather import prepare_gather
from torch_spheres.data.worker_info import LoadPosition
from torch_spheres.runtime.trace_hooks import phase

__all__ = ["InlineIterator"]


class InlineIterator(SphereIterator):
    """What torch's iterator without workers does."""

    def __init__(self, config: LoaderConfig, resumed: LoaderState | None) -> None:
        super().__init__(config, resumed)
        if self._timeout != 0:
            raise AssertionError("a loader without workers requires timeout == 0")
        if isinstance(self._dataset, DATA_PIPES):
            shard_pipe(self._dataset, 1, 0)
        with self._sampler_at(resumed):
            pass
        if resumed is None or not (resumed.iterable and resumed.begun):
            self._fetcher = self._make_fetcher(self._dataset)
            return
        samples = self._index_sampler.batch_size if self._auto_collation else 1
        # There is no snapshot before the first batch.
        snapshot = resumed.snapshots().get(0, WorkerSnapshot(0, None, ""))
        with self._random_state.default_generator_at(self._after_base_seed):
            self._fetcher = snapshot.restore(self._dataset, self._make_fetcher, samples)

    def _next_data(self) -> Any:
        number = self.position.state.tasks
        try:
            index = self._next_index()
        except StopIteration:
            self.position.finished = True
            raise
        self._advance(number, self._index_digest)
        begin = time.perf_counter()
        prepared = prepare_gather(self._dataset, index) if self._gathers else None
        if prepared is None:
            batch, size = self._load(index, number), None
        else:
            batch, gather = prepared
            gather.finish(self._running_core())
            self._meter.count_work_since(begin)
            self._meter.way, size = "gather", gather.bytes
        self._log_batch(number, self._index_digest)
        self._meter.count_batch(batch, self._rows_of(index), 0, size)
        return batch

    def _load(self, index: Any, number: int) -> Any:
        self._meter.way = "caller"
        position = LoadPosition(self._base_seed, number, rows=self._batch_rows)
        try:
            with self._meter.working(), phase(self._spheres, "load", number):
                batch = self._fetcher.fetch(index, position)
        except StopIteration:
            self.position.finished |= self._iterable
            raise
        return self._transfer.start(batch)()

    def save(self) -> LoaderState:
        """The state after the batch that was handed out last: nothing was loaded ahead of it."""
        with self._next_lock:  # another thread may be in the middle of a batch
            self._take_snapshot()
        return super().save()

    def _take_snapshot(self) -> None:
        tasks = self.position.state.tasks
        if self._iterable and tasks > 0:
            snapshot = WorkerSnapshot.take(None, self._fetcher.fetcher, tasks)
            self.position.snapshots = {0: snapshot}

    def __del__(self) -> None:
        if hasattr(self, "_fetcher") and not self.position.finished:
            self._take_snapshot()  # for a state that is asked for after a break

    def _shutdown_workers(self) -> None:
        """Does nothing: there are no workers. The name is torch's, which other libraries call."""
