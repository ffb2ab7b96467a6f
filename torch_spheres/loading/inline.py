"""The iterator of a wrapped loader with ``num_workers=0``: nothing is different but the speed.

The plain loader asks its sampler for an index list at each ``next()`` and loads it then and there,
in the thread of the loop. Here the samples are loaded by the spheres, a part of the batch by each
kissing sphere, and the next batches ahead of time where nobody could tell: with samplers that draw
nothing while they go, and datasets that draw nothing at all. The first batches are loaded both
ways; the faster is kept, and a dataset that draws random numbers is left to the loop's thread,
where they come in the plain loader's order.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.utils.data import (
    BatchSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    _DatasetKind,
)
from torch.utils.data.distributed import DistributedSampler

from torch_spheres import _core
from torch_spheres.context import CallerContext, caller_context
from torch_spheres.loading.base import SphereIterator
from torch_spheres.loading.gather import gather, gathers
from torch_spheres.loading.info import Position, at
from torch_spheres.loading.progress import Progress
from torch_spheres.loading.samples import Copies, Fetcher, has_getitems, load
from torch_spheres.loading.snapshots import Snapshot
from torch_spheres.loading.stats import Meter
from torch_spheres.loading.streams import Noticing, Watching, global_states
from torch_spheres.loading.transfer import Delivery
from torch_spheres.sampler import shard_bounds
from torch_spheres.system import KissingSpheres

if TYPE_CHECKING:
    from torch_spheres.loader import SphereLoader

__all__ = ["InlineIterator"]

_AHEAD = 2
"""Batches under way besides the one that is asked for."""


class _Job:
    """One batch, loaded in parts by the spheres. Refers to no iterator."""

    def __init__(self, index: list[Any], number: int, digest: int) -> None:
        self.index, self.number, self.digest = index, number, digest
        self.begun = time.perf_counter()
        self.seconds = 0.0  # until it was done
        self.work: _core.Work | None = None
        self.drew = self.dropped = False
        self.delivery: Delivery | None = None
        self.error: BaseException | None = None
        self._lock = threading.Lock()
        self._errors: dict[int, BaseException] = {}

    def start(self, spheres: KissingSpheres, loading: _Loading) -> None:
        """Hands the parts to the spheres that they belong to."""
        parts = _parts(len(self.index), spheres.leaves)
        self._left = len(parts)
        samples: list[list[Any]] = [[] for _ in parts]
        context = caller_context()

        def run(k: int) -> None:
            first, last = parts[k]
            watch = Watching()
            try:
                if not (self.dropped or any(other < first for other in list(self._errors))):
                    with context(), loading.meter.working(), watch.active():
                        position = Position(loading.base_seed, self.number)
                        with at(position):
                            dataset = loading.copies.here()
                            samples[k] = load(dataset, self.index[first:last], position, first)
            except BaseException as error:  # noqa: BLE001
                self._errors[first] = error  # the first one's, in the batch's order, will be raised
            with self._lock:
                self.drew |= watch.drew
                self._left -= 1
                if self._left:
                    return
            self._finish(parts, samples, loading, context)

        spheres._ensure_started("a wrapped loader")
        # (What is collected is nobody's to wait for, but for this job's.)
        self.work = spheres._core.submit(run, tuple(range(len(parts))), collect=True)

    def _finish(
        self,
        parts: list[tuple[int, int]],
        samples: list[list[Any]],
        loading: _Loading,
        context: CallerContext,
    ) -> None:
        """On the thread that has loaded the last part."""
        watch = Watching()
        try:
            if self._errors:
                self.error = self._errors[min(self._errors)]
            if self._errors or self.dropped:
                return
            with context(), loading.meter.working(), watch.active():
                position = Position(loading.base_seed, self.number)
                with at(position):
                    rows = zip(parts, samples, strict=True)
                    in_order = [part for _, part in sorted(rows, key=lambda row: row[0])]
                    batch = loading.collate_fn([sample for part in in_order for sample in part])
                self.delivery = loading.sender.send(batch)
        except BaseException as error:  # noqa: BLE001
            self.error = error
        finally:
            self.drew |= watch.drew
            self._errors.clear()
            self.seconds = time.perf_counter() - self.begun


def _parts(rows: int, leaves: int) -> list[tuple[int, int]]:
    """What each leaf loads, by work item: a kissing sphere's rows, cut again for its children.

    Leaves without rows come last, and are left out.
    """
    parts = [(0, rows)]
    while len(parts) < leaves:
        cuts = [shard_bounds(end - begin, _core.KISSING) for begin, end in parts]
        parts = [
            (begin + cut[child][0], begin + cut[child][1])
            for child in range(_core.KISSING)
            for (begin, _), cut in zip(parts, cuts, strict=True)
        ]
    return [part for part in parts if part[0] < part[1]]


@dataclass(frozen=True)
class _Loading:
    """What all batches of an iterator have in common."""

    base_seed: int
    copies: Copies
    collate_fn: Any
    sender: Any
    meter: Meter


class InlineIterator(SphereIterator):
    """As torch's iterator without workers."""

    def __init__(self, loader: SphereLoader[Any], resumed: Progress | None) -> None:
        self._ahead: deque[_Job] = deque()
        super().__init__(loader, resumed)
        if self._timeout != 0:
            raise AssertionError("a loader without workers requires timeout == 0")
        self._tempo = loader._tempo
        self._fetcher = Fetcher(
            self._dataset_kind,
            self._dataset,
            self._auto_collation,
            self._collate_fn,
            self._drop_last,
        )
        self._loading = _Loading(
            self._base_seed,
            Copies(self._dataset if loader.copy_dataset else None, self._dataset),
            self._collate_fn,
            self._sender,
            self._meter,
        )
        splits = self._dataset_kind == _DatasetKind.Map and self._auto_collation
        self._gathers = (
            splits and self._sender_is_plain and gathers(self._dataset, self._collate_fn)
        )
        self._splits = splits and not has_getitems(self._dataset)
        depth = _AHEAD if loader.prefetch_factor is None else loader.prefetch_factor
        self._depth = 1 + depth
        self._may_ask = _may_ask(loader)  # index lists, before their time
        self._asked = 0
        with self._skipping(resumed):
            pass
        self._asked = self._tasks
        if resumed is not None and resumed.iterable and resumed.begun:
            self._restore_dataset(resumed)

    def _restore_dataset(self, resumed: Progress) -> None:
        (snapshot,) = resumed.snapshots().values() or (None,)
        if snapshot is None:
            return
        snapshot.restore_dataset(self._dataset)
        self._fetcher = Fetcher(
            self._dataset_kind,
            self._dataset,
            self._auto_collation,
            self._collate_fn,
            self._drop_last,
        )
        size = self._index_sampler.batch_size if self._auto_collation else 1
        with self._sources.repeating(self._after_base_seed):
            snapshot.restore_iterator(self._fetcher, size)
        self._snapshots = {0: snapshot}

    def _next_data(self) -> Any:
        if self._ahead:
            return self._finish()
        way = self._tempo.way
        if self._splits and not self._gathers and way == "spheres" and self._may_use_spheres():
            self._fill()
            if self._ahead:
                return self._finish()
            self._finished = True
            raise StopIteration
        number = self._asked
        index = self._ask()
        batch = gather(self._dataset, index, self._spheres_core()) if self._gathers else None
        if batch is None:
            return self._load_here(index, number, self._pulled.value)
        self._meter.way = "gather"
        self._handed_out(number, self._pulled.value)
        self._meter.handed_out(batch, len(index), 0)
        return batch

    def _ask(self) -> Any:
        try:
            index = self._next_index()
        except StopIteration:
            self._finished = True
            raise
        self._asked += 1
        return index

    def _spheres_core(self) -> _core.System | None:
        if not self._may_use_spheres():
            return None
        self._spheres._ensure_started("a wrapped loader")
        return self._spheres._core

    def _may_use_spheres(self) -> bool:
        # Inside a work item of the spheres' own the caller would wait for itself.
        return not self._spheres._core.on_own_thread()

    # ---- in the loop's thread ----

    def _load_here(self, index: Any, number: int, digest: int) -> Any:
        notice = Noticing()
        probing = self._splits and not self._tempo.decided
        before = global_states() if probing else None
        begin = time.perf_counter()
        iterable = self._dataset_kind == _DatasetKind.Iterable
        self._meter.way = "caller"
        self._handed_out(number, digest)
        try:
            with self._meter.working():
                if probing:
                    with notice.active():
                        batch = self._fetcher.fetch(index, Position(self._base_seed, number))
                else:
                    batch = self._fetcher.fetch(index, Position(self._base_seed, number))
        except StopIteration:
            self._finished = iterable or self._finished
            raise
        finally:
            if iterable:
                self._snapshots = {0: Snapshot.of(None, self._fetcher.fetcher, number + 1)}
        if probing:
            if notice.drew or global_states() != before:
                self._leave_to_caller("random")
            else:
                self._measured("caller", time.perf_counter() - begin, len(index))
        delivered = self._sender.send(batch)()
        self._meter.handed_out(delivered, self._size_of(index), 0)
        return delivered

    def _measured(self, way: str, seconds: float, samples: int) -> None:
        self._tempo.measured(way, seconds, samples)
        if self._tempo.decided and not self._tempo.threads_gain:
            self._meter.declined = "slower"

    def _leave_to_caller(self, why: str) -> None:
        self._tempo.impure = True
        self._meter.declined = why

    # ---- on the spheres ----

    def _fill(self) -> None:
        """Sets the next batch going, and more of them where the sampler may be asked ahead."""
        while not self._ahead or (
            self._tempo.decided and len(self._ahead) < self._depth and self._asked < self._may_ask
        ):
            number = self._asked
            try:
                index = self._next_index()
            except StopIteration:
                return
            self._asked += 1
            job = _Job(index, number, self._pulled.value)
            self._ahead.append(job)
            job.start(self._spheres, self._loading)

    def _finish(self) -> Any:
        if self._tempo.way == "spheres" and self._tempo.decided:
            self._fill()
        ready = sum(job.delivery is not None for job in self._ahead)
        job = self._ahead[0]
        if job.work is not None:
            job.work.wait(None)  # it stays the next one if the wait is interrupted
        self._ahead.popleft()
        if job.drew:
            # What it drew was nobody's: once more, in the plain loader's thread and order.
            self._leave_to_caller("random")
            return self._load_here(job.index, job.number, job.digest)
        self._meter.way = "spheres"
        self._handed_out(job.number, job.digest)
        if job.error is not None:
            try:
                raise job.error
            finally:
                del job  # it owns the error, whose traceback owns this frame
        self._measured("spheres", job.seconds, len(job.index))
        assert job.delivery is not None
        batch = job.delivery()
        self._meter.handed_out(batch, len(job.index), ready)
        return batch

    def _shutdown_workers(self) -> None:
        """Drops what is under way."""
        while self._ahead:
            self._ahead.popleft().dropped = True

    def __del__(self) -> None:
        self._shutdown_workers()


def _may_ask(loader: SphereLoader[Any]) -> float:
    """How many index lists the sampler may be asked for before their time, and nobody can tell.

    Samplers of torch's own draw at the first index only, or from a generator of their own; but for
    a `RandomSampler` with a given generator, which draws again at its end.
    """
    batches: Any = loader._index_sampler
    sampler: Any = batches.sampler if type(batches) is BatchSampler else batches
    kind: Any = type(sampler)
    if kind is RandomSampler and sampler.generator is not None:
        rows = 0 if sampler.replacement else len(sampler.data_source)
        return rows // batches.batch_size if type(batches) is BatchSampler else 0
    known = (
        SequentialSampler,
        RandomSampler,
        SubsetRandomSampler,
        WeightedRandomSampler,
        DistributedSampler,
    )
    return float("inf") if kind in known else 0
