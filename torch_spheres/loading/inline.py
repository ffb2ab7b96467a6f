"""The iterator of a wrapped loader with ``num_workers=0``: nothing is different but the speed.

The plain loader asks its sampler for an index list at each ``next()`` and loads it then and there,
in the thread of the loop. So does this one, but the samples of the list are loaded by the spheres,
a part of the batch by each kissing sphere.

The first batches are loaded both ways, and the faster is kept. A dataset that draws random numbers,
or is seen to change when it is asked (counters, open files, generators of its own), or holds what
nobody can look into (see fingerprint.py), is left to the loop's thread, which asks in the plain
loader's order. So is one that turns out to have drawn on the spheres after all, or failed there:
that batch is loaded once more. What a dataset changes outside of itself is not seen.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
import time
from typing import TYPE_CHECKING, Any

from torch_spheres import _compat, _core
from torch_spheres._core import Work
from torch_spheres.context import caller_context
from torch_spheres.division import shard_bounds
from torch_spheres.errors import StoppedError
from torch_spheres.loading.base import SphereIterator
from torch_spheres.loading.fingerprint import fingerprint
from torch_spheres.loading.gather import gathers, prepare
from torch_spheres.loading.info import Position, at
from torch_spheres.loading.progress import Progress
from torch_spheres.loading.samples import Copies, Fetcher, has_getitems, load, place_of_thread
from torch_spheres.loading.snapshots import Snapshot
from torch_spheres.loading.streams import GlobalStates, Noticing, Watching
from torch_spheres.phases import phase

if TYPE_CHECKING:
    from torch_spheres.loader import SphereLoader

__all__ = ["InlineIterator"]


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


_UNFINISHED = "unfinished"  # the spheres were stopped, or are busy with waiting for us
_LOOK = 0.1  # seconds
_CHANGES = 2  # of a dataset, that say nothing yet


def _nobody_else() -> bool:
    """Whether no thread but this one and the spheres' runs Python."""
    me = threading.current_thread()
    return all(t is me or t.name.startswith("sphere ") for t in threading.enumerate())


class InlineIterator(SphereIterator):
    """As torch's iterator without workers."""

    def __init__(self, loader: SphereLoader[Any], resumed: Progress | None) -> None:
        super().__init__(loader, resumed)
        if self._timeout != 0:
            raise AssertionError("a loader without workers requires timeout == 0")
        self._tempo = loader._tempo
        self._iterable = self._dataset_kind == _compat.DatasetKind.Iterable
        self._copies = Copies(self._dataset if loader._sphere_copies else None, self._dataset)
        lists = not self._iterable and self._auto_collation
        self._gathers = lists and self._sender_is_plain and gathers(self._dataset, self._collate_fn)
        self._splits = lists and not has_getitems(self._dataset)
        with self._skipping(resumed):
            pass
        if resumed is not None and resumed.iterable and resumed.begun:
            with self._sources.repeating(self._after_base_seed):
                self._restore_dataset(resumed)
        else:
            self._fetcher = self._make_fetcher()

    def _make_fetcher(self) -> Fetcher:
        return Fetcher(
            self._dataset_kind,
            self._dataset,
            self._auto_collation,
            self._collate_fn,
            self._drop_last,
        )

    def _restore_dataset(self, resumed: Progress) -> None:
        (snapshot,) = resumed.snapshots().values() or (None,)
        if snapshot is not None:
            snapshot.restore_dataset(self._dataset)
        self._fetcher = self._make_fetcher()
        if snapshot is not None:
            size = self._index_sampler.batch_size if self._auto_collation else 1
            snapshot.restore_iterator(self._fetcher, size)
            self._snapshots = {0: snapshot}

    def _next_data(self) -> Any:
        number = self._tasks
        try:
            index = self._next_index()
        except StopIteration:
            self._finished = True
            raise
        self._handed_out(number, self._pulled.value)
        prepared = prepare(self._dataset, index) if self._gathers else None
        if prepared is not None:
            batch, rows = prepared
            with self._meter.copying():
                rows.finish(self._running_core())
            self._meter.way = "gather"
            self._meter.handed_out(batch, len(index), 0, rows.bytes)
            return batch
        batch = self._load(index, number)
        self._meter.handed_out(batch, self._size_of(index), 0)
        return batch

    def _load(self, index: Any, number: int) -> Any:
        splits = self._splits and not self._gathers and self._available()
        if splits and type(index) is list and len(index) > 1:
            if self._tempo.way == "spheres":
                return self._load_on_spheres(index, number)
            if not self._tempo.decided:
                return self._load_and_look(index, number)
        return self._load_here(index, number)

    def _position(self, number: int) -> Position:
        return Position(self._base_seed, number, places=self._places)

    # ---- in the loop's thread ----

    def _load_here(self, index: Any, number: int) -> Any:
        self._meter.way = "caller"
        try:
            with self._meter.working():
                batch = self._fetcher.fetch(index, self._position(number))
        except StopIteration:
            self._finished |= self._iterable
            raise
        finally:
            if self._iterable:
                self._snapshots = {0: Snapshot.of(None, self._fetcher.fetcher, number + 1)}
        return self._sender.send(batch)()

    def _load_and_look(self, index: list[Any], number: int) -> Any:
        """As `_load_here`, and finds out whether the dataset could be loaded in another order."""
        notice, before = Noticing(), (GlobalStates.now(), fingerprint(self._dataset))
        begin = time.perf_counter()
        with notice.active():
            batch = self._load_here(index, number)
        seconds = time.perf_counter() - begin
        if notice.drew or before[0] != GlobalStates.now():
            self._leave_to_caller("random")
        elif before[1] is None:
            self._leave_to_caller("opaque")
        elif before[1] != fingerprint(self._dataset):
            # Once or twice: it has opened a file, or filled a cache, and may be done with that.
            self._tempo.changes += 1
            if self._tempo.changes > _CHANGES:
                self._leave_to_caller("state")
        else:
            self._measured("caller", seconds, len(index))
        return batch

    def _measured(self, way: str, seconds: float, samples: int) -> None:
        self._tempo.measured(way, seconds, samples)
        if self._tempo.decided and not self._tempo.threads_gain:
            self._meter.declined = "slower"

    def _leave_to_caller(self, why: str) -> None:
        self._tempo.impure = True
        self._meter.declined = why

    # ---- on the spheres ----

    def _load_on_spheres(self, index: list[Any], number: int) -> Any:
        begin, before = time.perf_counter(), GlobalStates.now()
        samples, why = self._load_parts(index, number)
        if before != GlobalStates.now():
            # In the order in which threads came by: taken back, unless others may have drawn too.
            if _nobody_else():
                before.restore()
            why = "random"
        if why:
            # Once more, in the plain loader's thread and order; an error comes from there as well.
            batch = self._load_here(index, number)
            if why != _UNFINISHED:
                self._leave_to_caller(why)
            return batch
        with self._meter.working(), at(self._position(number)):
            try:
                batch = self._collate_fn(samples)
            except Exception as error:
                error.add_note(f"while loading batch {number}, {place_of_thread()}")
                raise
        self._meter.way = "spheres"
        self._measured("spheres", time.perf_counter() - begin, len(index))
        return self._sender.send(batch)()

    def _load_parts(self, index: list[Any], number: int) -> tuple[list[Any], str]:
        """The samples, and why they are void if they are: they drew, or one of them failed."""
        parts = _parts(len(index), self._spheres.leaves)
        samples: list[list[Any]] = [[] for _ in parts]
        void: set[str] = set()  # reasons; no part is begun once there is one
        over = threading.Event()  # those under way end with their sample
        copies, meter, context = self._copies, self._meter, caller_context()
        base_seed, places = self._base_seed, self._places

        def load_part(k: int) -> None:
            if void:
                return
            first, last = parts[k]
            watch, position = Watching(), Position(base_seed, number, over, places)
            try:
                traced = phase(self._spheres, "load", number)
                with traced, context(), meter.working(), watch.active(), at(position):
                    samples[k] = load(copies.here(), index[first:last], position, first)
            except StoppedError:
                void.add(_UNFINISHED)
            except Exception:  # noqa: BLE001
                void.add("thread")  # unless it fails in the caller's thread too
            if watch.drew:
                void.add("random")

        # Context variables are the caller's, numpy's error state among them.
        variables = [contextvars.copy_context() for _ in parts]
        try:
            self._spheres._ensure_started("a wrapped loader")
            # (What is collected is none of those who wait for all work that was distributed.)
            work = self._spheres._core.submit(
                lambda k: variables[k].run(load_part, k), tuple(range(len(parts))), collect=True
            )
            self._wait_for(work)
        except StoppedError:
            void.add(_UNFINISHED)
        except BaseException:
            void.add(_UNFINISHED)
            raise
        finally:
            over.set()
        in_order = sorted(zip(parts, samples, strict=True), key=lambda pair: pair[0])
        why = next((reason for reason in ("random", "thread", _UNFINISHED) if reason in void), "")
        return [sample for _, part in in_order for sample in part], why

    def _wait_for(self, work: Work) -> None:
        """Raises StoppedError as well if the parts may never be done."""
        while not work.done():
            # Spheres' threads that wait for their turn with this iterator do none of them.
            if self._held_up:
                raise StoppedError
            with contextlib.suppress(TimeoutError):
                work.wait(_LOOK)
        work.wait(None)

    def _shutdown_workers(self) -> None:
        """Nothing is under way between two batches; the name is torch's."""
