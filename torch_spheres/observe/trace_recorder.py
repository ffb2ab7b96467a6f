"""Records a `Trace`: begins and ends the C++ runtime's recording, and reads its events."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby
from operator import attrgetter, itemgetter
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from torch_spheres import _core
from torch_spheres._core import State, Topology
from torch_spheres.observe.trace import Arrow, Counter, Slice, Trace
from torch_spheres.runtime.arguments import as_index
from torch_spheres.runtime.trace_hooks import begin_trace, end_trace

if TYPE_CHECKING:
    from torch_spheres.spheres import KissingSpheres

__all__ = ["Recording"]

MAX_CAPACITY = 1 << 24
# The layout of TraceEvent, and below the values of TraceKind, in cpp/trace.h.
_EVENT = np.dtype(
    {
        "names": ["begin", "end", "item", "count", "other", "kind", "label"],
        "formats": ["u8", "u8", "i8", "u4", "i2", "u1", "u1"],
    }
)
_STATE, _ITEM, _PHASE, _WORK, _GRADIENT, _QUEUED = range(6)
_ARROWS = {_WORK: "work", _GRADIENT: "gradient"}
_STATES = [state.name.lower() for state in State]
_TERMINATING = _STATES.index("terminating")  # there is no thread between stop() and start()
_RUNNING = ("processing", "accumulating")
_DEPTHS = {"state": 0, "item": 1, "phase": 2}


class Recording(Trace):
    """A `Trace` that records in ``with spheres.trace() as trace`` and can be read afterwards."""

    def __init__(self, spheres: KissingSpheres, capacity: int) -> None:
        self._capacity = as_index("capacity", capacity, 1, MAX_CAPACITY)
        self._spheres: KissingSpheres | None = spheres  # None after the block
        self._process = 0  # the process that records
        self._names: dict[int, str] = {}  # of threads, by native id

    def __enter__(self) -> Self:
        spheres = self._spheres
        if self._process or spheres is None:
            raise RuntimeError("this trace was used already; call trace() again for a new one")
        if not spheres.running:
            spheres.start()
        begin_trace(spheres, self, self._capacity)
        self._process = os.getpid()
        return self

    def __exit__(self, *_: object) -> None:
        if os.getpid() != self._process:
            return  # in a forked child, whose parent has the recording
        spheres, self._spheres = self._spheres, None
        assert spheres is not None
        record = end_trace(spheres)
        self._names |= {t.native_id: t.name for t in threading.enumerate() if t.native_id}
        reader = _Reader(spheres.topology, record, self._names)
        slices = sorted(reader.slices(), key=_outer_first)
        since = reader.complete_since
        waited = None if reader.lost else record.queued
        used = {s.sphere for s in slices}
        super().__init__(
            levels=spheres.levels,
            concurrency=spheres.concurrency,
            begin_ns=record.begin,
            end_ns=record.end,
            slices=slices,
            arrows=sorted([*reader.messages, *_steals(slices)], key=attrgetter("received_ns")),
            counters=[*_running(slices, since), *_queued(reader.handed_out, slices, since, waited)],
            lost=reader.lost,
            threads={k: name for k, name in reader.names.items() if k in used},
        )

    def name_thread(self) -> None:
        """Remembers the name of the calling thread, which may have ended before the block does."""
        self._names[threading.get_native_id()] = threading.current_thread().name

    def __repr__(self) -> str:
        # Debuggers call it at any time, so it must not raise.
        if "slices" not in self.__dict__:
            return f"Trace, {'being recorded' if self._process else 'not begun'}"
        return super().__repr__()

    def __getattr__(self, name: str) -> Any:
        # Python calls it for attributes that are not set (yet).
        if name not in Trace.__annotations__:
            raise AttributeError(f"a Trace has no attribute {name!r}")
        raise RuntimeError(
            "the trace can be read and saved when its 'with' block has ended, in the process that "
            "began it: 'with spheres.trace() as trace: ...', then trace.save(path)"
        )


def _outer_first(s: Slice) -> tuple[int, int, int]:
    return s.begin_ns, -s.end_ns, _DEPTHS[s.kind]


class _Reader:
    """Turns the recorded events of all threads into slices and arrows."""

    def __init__(
        self, topology: Topology, record: _core.TraceRecord, names: dict[int, str]
    ) -> None:
        self._begin, self._end = record.begin, record.end
        self._tracks = record.tracks
        self._topology = topology
        self.lost = sum(track.lost for track in self._tracks)
        # These are complete after slices() has been iterated over.
        self.complete_since = self._begin  # no later events are lost
        self.messages: list[Arrow] = []
        self.handed_out: list[tuple[int, int]] = []  # when, and how many items
        self.names: dict[int, str] = {}  # of other threads, by their negative ids
        self._python_names = names

    def slices(self) -> Iterator[Slice]:
        """Reads all threads' slices."""
        others_seen = 0
        for track in self._tracks:
            sphere = track.sphere
            if sphere < 0:
                others_seen += 1
                sphere = -others_seen
                self.names[sphere] = self._python_names.get(track.native_id, track.name)
            events = np.frombuffer(track.events, _EVENT)
            if track.lost:
                oldest = int(events["end"][0]) if len(events) else self._end
                self.complete_since = max(self.complete_since, oldest)
            if track.sphere >= 0:
                yield from self._states(track, events[events["kind"] == _STATE])
            others = events[(events["kind"] != _STATE) & (events["end"] >= self._begin)]
            for event in others.tolist():
                yield from self._other(sphere, *event)

    def _states(self, track: _core.TraceTrack, changes: Any) -> Iterator[Slice]:
        shown = changes[(changes["end"] > self._begin) & (changes["label"] != _TERMINATING)]
        for begin, end, label in shown[["begin", "end", "label"]].tolist():
            yield Slice(track.sphere, max(self._begin, begin), end, "state", _STATES[label])
        # The last change began a state that had not ended when the trace did.
        if len(changes):
            state, since = int(changes["other"][-1]), int(changes["end"][-1])
        elif track.lost or track.last_since <= self._begin:
            state, since = track.last_state, track.last_since
        else:
            state, since = track.first_state, self._begin
        since = max(self._begin, since)
        # At the end the thread may have made one change that it had not recorded yet. (If the
        # thread made another one after the end, `last_since` is after the end too, and the state
        # before is shown until the end.) No change at the beginning is missed: `first_state` has
        # what the thread did not record.
        changed = track.last_since if since < track.last_since < self._end else self._end
        for begin, end, name in ((since, changed, state), (changed, self._end, track.last_state)):
            if name != _TERMINATING and begin < end:
                yield Slice(track.sphere, begin, end, "state", _STATES[name])

    def _other(
        self, sphere: int, begin: int, end: int, item: int, count: int, other: int, kind: int,
        label: int,
    ) -> Iterator[Slice]:  # fmt: skip
        shown = max(begin, self._begin)
        if kind == _ITEM:
            owner, name = self._topology.leaf_of_item(other), _core.TRACE_LABELS[label]
            yield Slice(sphere, shown, end, "item", name, item, owner, count)
        elif kind == _PHASE:
            number = item if item >= 0 else None
            yield Slice(sphere, shown, end, "phase", _core.TRACE_LABELS[label], number)
        elif kind == _QUEUED:
            self.handed_out.append((begin, item))
        elif kind in _ARROWS and begin >= self._begin:  # not if it was sent before the trace began
            self.messages.append(Arrow(_ARROWS[kind], other, sphere, begin, end))


def _steals(slices: Sequence[Slice]) -> Iterator[Arrow]:
    for s in slices:
        if s.is_stolen and s.owner is not None:
            yield Arrow("steal", s.owner, s.sphere, s.begin_ns, s.begin_ns, s.count)


def _running(slices: Sequence[Slice], since: int) -> Iterator[Counter]:
    changes = []
    for s in slices:
        if s.kind == "state" and s.name in _RUNNING and s.end_ns > since:
            changes += [(max(s.begin_ns, since), 1), (s.end_ns, -1)]
    yield from _summed("running spheres", changes, since, 0)


def _queued(
    handed_out: Sequence[tuple[int, int]], slices: Sequence[Slice], since: int, start: int | None
) -> Iterator[Counter]:
    """Counts queued items from `start` on; None: the fewest with which no count is negative."""
    changes = [(when, more) for when, more in handed_out if when >= since]
    changes += [(s.begin_ns, -s.count) for s in slices if s.kind == "item" and s.begin_ns > since]
    if start is None:
        changes.sort()
        start = -min(accumulate((more for _, more in changes), initial=0))
    yield from _summed("queued items", changes, since, start)


def _summed(name: str, changes: list[tuple[int, int]], since: int, start: int) -> Iterator[Counter]:
    """Adds up changes; yields a value for each moment at which the total differs from before."""
    changes.sort()
    totals = accumulate((more for _, more in changes), initial=start)
    # Below 0: items that began while counting began are subtracted twice.
    values = {
        moment: max(0, total)
        for moment, total in zip([since, *(when for when, _ in changes)], totals, strict=True)
    }
    for _, same in groupby(values.items(), key=itemgetter(1)):
        yield Counter(name, *next(same))
