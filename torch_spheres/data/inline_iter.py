"""The iterator of a wrapped loader with ``num_workers=0``: the loop's own thread loads.

As torch's iterator, it asks the sampler for an index list at each ``next()``, and has torch's
fetcher load it then and there. Only tensors in memory are gathered in C++ instead.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from torch_spheres.data.data_pipes import DATA_PIPES, shard_pipe
from torch_spheres.data.iter_base import SphereIterator
from torch_spheres.data.resume import Progress, Snapshot
from torch_spheres.data.tensor_gather import prepare
from torch_spheres.data.worker_info import Position
from torch_spheres.runtime.trace_hooks import phase

if TYPE_CHECKING:
    from torch_spheres.data.loader import SphereLoader

__all__ = ["InlineIterator"]


class InlineIterator(SphereIterator):
    """As torch's iterator without workers."""

    def __init__(self, loader: SphereLoader[Any], resumed: Progress | None) -> None:
        super().__init__(loader, resumed)
        if self._timeout != 0:
            raise AssertionError("a loader without workers requires timeout == 0")
        if isinstance(self._dataset, DATA_PIPES):
            shard_pipe(self._dataset, 1, 0)
        with self._skipping(resumed):
            pass
        if resumed is None or not (resumed.iterable and resumed.begun):
            self._fetcher = self._make_fetcher(self._dataset)
            return
        samples = self._index_sampler.batch_size if self._auto_collation else 1
        snapshot = resumed.snapshots().get(0, Snapshot(0, None, ""))  # (before the first batch)
        with self._sources.repeating(self._after_base_seed):
            self._fetcher = snapshot.restore(self._dataset, self._make_fetcher, samples)

    def _next_data(self) -> Any:
        number = self.mark.at.tasks
        try:
            index = self._next_index()
        except StopIteration:
            self.finished = True
            raise
        self._handed_out(number, self._pulled)
        begin = time.perf_counter()
        prepared = prepare(self._dataset, index) if self._gathers else None
        if prepared is not None:
            batch, rows = prepared
            rows.finish(self._running_core())
            self._meter.worked_since(begin)
            self._meter.way = "gather"
            self._tell_ranks(number, self._pulled)
            self._meter.handed_out(batch, len(index), 0, rows.bytes)
            return batch
        batch = self._load(index, number)
        self._tell_ranks(number, self._pulled)
        self._meter.handed_out(batch, self._size_of(index), 0)
        return batch

    def _load(self, index: Any, number: int) -> Any:
        self._meter.way = "caller"
        position = Position(self._base_seed, number, places=self._places)
        try:
            with self._meter.working(), phase(self._spheres, "load", number):
                batch = self._fetcher.fetch(index, position)
        except StopIteration:
            self.finished |= self._iterable
            raise
        return self._sender.send(batch)()

    def progress(self) -> Progress:
        """After the batch that was handed out last; nothing was loaded ahead of it."""
        with self._in_use:  # a batch that another thread is in comes first
            self._look_at_dataset()
        return super().progress()

    def _look_at_dataset(self) -> None:
        tasks = self.mark.at.tasks
        if self._iterable and tasks > 0:
            self.mark.snapshots = {0: Snapshot.of(None, self._fetcher.fetcher, tasks)}

    def __del__(self) -> None:
        if hasattr(self, "_fetcher") and not self.finished:
            self._look_at_dataset()  # for a state that is asked for after a break

    def _shutdown_workers(self) -> None:
        """Nothing is under way between two batches; the name is torch's."""
