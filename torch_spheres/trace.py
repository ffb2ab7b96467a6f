"""What `KissingSpheres.trace` records: slices, arrows and counters, as frozen values; its file.

All times are nanoseconds of ``time.monotonic_ns()``.
"""

from __future__ import annotations

import gzip
import json
import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

from torch_spheres._core import Topology

__all__ = ["Arrow", "Counter", "Slice", "Trace"]


@dataclass(frozen=True, slots=True)
class Slice:
    """Something that a thread did from one moment to another.

    Slices of one sphere nest: phases in items, items in states.
    """

    sphere: int
    """Id of the sphere whose thread it was; -1, -2, ... for other threads, see `Trace.threads`."""
    begin_ns: int
    end_ns: int
    kind: str
    """``"state"``, ``"item"`` or ``"phase"``."""
    name: str
    """A state's name in lower case, e.g. ``"idle"``; of an item what kind of work it is: ``"item"``
    (a Python call), ``"native item"``, ``"sum piece"``, ``"gather"``; of a phase ``"forward"``,
    ``"loss"``, ``"backward"``, ``"sum"``, or ``"load"`` in a wrapped loader."""
    item: int | None = None
    """The item's number in its batch; of a phase the shard's, or the number of the batch that is
    loaded, in the order in which they are asked for in an epoch. None for states, and for the sum
    over all shards."""
    owner: int | None = None
    """Of an item: id of the sphere it belonged to."""
    count: int = 1
    """Items in this slice. More than 1 for native items that took next to no time, which are taken
    together: `item`, and those that follow at distances of the number of leaves."""

    @property
    def duration_ns(self) -> int:
        """Nanoseconds from begin to end."""
        return self.end_ns - self.begin_ns

    @property
    def is_stolen(self) -> bool:
        """Whether it is an item of another sphere; what other threads run counts for the root."""
        return self.owner is not None and self.owner != max(0, self.sphere)


@dataclass(frozen=True, slots=True)
class Arrow:
    """Something that went from one sphere to another."""

    kind: str
    """``"work"``: a sphere that took an item saw more, and woke the target; ``"steal"``: an item
    that belonged to another sphere; ``"gradient"``: a shard's gradients, from where they were ready
    to whoever adds them."""
    source: int
    """Id of the sphere that it came from: of a steal, the one that the item belonged to."""
    target: int
    """Id of the sphere that got it; negative for another thread, as in `Slice.sphere`."""
    sent_ns: int
    received_ns: int
    """When the target read the message; of a steal when the item began, as `sent_ns`."""
    count: int = 1
    """Of a steal: how many items were taken at once."""


@dataclass(frozen=True, slots=True)
class Counter:
    """A figure that changed: it has this value until the next `Counter` of the same name."""

    name: str
    """``"running spheres"``: spheres that run work or sum gradients. ``"queued items"``: items that
    were handed out and have not begun, of all spheres together."""
    time_ns: int
    value: int


@dataclass(kw_only=True, eq=False, repr=False)
class Trace:
    """What the spheres did in a ``with spheres.trace()`` block; or made by hand, from its parts."""

    levels: int
    """Levels of the hierarchy, the root's included."""
    concurrency: int
    """Leaves that ran at once, at most."""
    begin_ns: int
    """When recording began. What had begun before is cut here."""
    end_ns: int
    """When recording ended. States are cut here; items that still ran are not in the trace."""
    slices: Sequence[Slice] = field(default_factory=tuple)
    """States, items and phases of all threads, by the time at which they began; of two that began
    together the outer one first."""
    arrows: Sequence[Arrow] = field(default_factory=tuple)
    """What went from sphere to sphere, by the time at which it was received."""
    counters: Sequence[Counter] = field(default_factory=tuple)
    """Figures that changed, each by time. They begin where nothing is lost any more."""
    lost: int = field(default_factory=int)
    """Events that newer ones have overwritten: 0 means that everything is here. Otherwise ask for a
    larger `capacity`, or trace less."""
    threads: Mapping[int, str] = field(default_factory=dict)
    """Names of the threads that are no spheres, by the negative ids that slices have."""

    def __post_init__(self) -> None:
        self.slices, self.arrows = tuple(self.slices), tuple(self.arrows)
        self.counters, self.threads = tuple(self.counters), dict(self.threads)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes Chrome's trace-event format, which Perfetto and ``chrome://tracing`` open.

        Args:
            path: of the file; compressed if its name ends in ``.gz``.

        Raises:
            RuntimeError: the trace has not ended yet.
            OSError: the file cannot be written.
        """
        events = _Events(self)
        head = json.dumps(
            {
                "displayTimeUnit": "ns",
                "torch_spheres": {
                    "levels": self.levels,
                    "concurrency": self.concurrency,
                    "lost_events": self.lost,
                    "begin_monotonic_ns": self.begin_ns,
                },
            }
        )
        name = os.fspath(path)
        with (
            gzip.open(name, "wt", encoding="utf-8", compresslevel=5)
            if name.endswith(".gz")
            else Path(name).open("w", encoding="utf-8") as file
        ):
            # Line by line: a long trace is larger as text than it was in memory.
            file.write(f'{head[:-1]},\n"traceEvents": [\n')
            file.write(json.dumps(events.meta("process_name", 0, name="torch_spheres")))
            file.writelines(f",\n{json.dumps(event)}" for event in events)
            file.write("\n]}\n")

    def __repr__(self) -> str:
        return (
            f"Trace of {(self.end_ns - self.begin_ns) / 1e9:.3f} s: {len(self.slices)} slices, "
            f"{len(self.arrows)} arrows, {self.lost} events lost"
        )


class _Events:
    """The events of one trace, as dictionaries in the file's format."""

    def __init__(self, trace: Trace) -> None:
        self._trace, self._process = trace, os.getpid()
        # The outermost slices of each track, which do not overlap: arrows begin and end in them.
        self._outer: dict[int, list[Slice]] = {}
        for s in trace.slices:
            outer = self._outer.setdefault(s.sphere, [])
            if not outer or s.begin_ns >= outer[-1].end_ns:
                outer.append(s)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for order, sphere in enumerate(sorted(self._outer)):
            name = self._trace.threads.get(sphere, f"thread {-sphere}")
            if sphere >= 0:
                name = f"sphere {Topology.path_string(sphere)}"
            yield self.meta("thread_name", _track(sphere), name=name)
            yield self.meta("thread_sort_index", _track(sphere), sort_index=order)
        yield from map(self._slice, self._trace.slices)
        for number, arrow in enumerate(self._trace.arrows):
            yield from self._arrow(number, arrow)
        yield from map(self._counter, self._trace.counters)

    def meta(self, what: str, track: int, **args: Any) -> dict[str, Any]:
        """Something that is said of a track, or of the process."""
        return self._event("M", what, track, self._trace.begin_ns, args=args)

    def _event(self, phase: str, name: str, track: int, moment: int, **more: Any) -> dict[str, Any]:
        # Microseconds are the format's unit; these are exact to the nanosecond.
        since = (moment - self._trace.begin_ns) / 1000
        return {
            "ph": phase, "name": name, "pid": self._process, "tid": track, "ts": since, **more
        }  # fmt: skip

    def _slice(self, s: Slice) -> dict[str, Any]:
        name, args = s.name, dict[str, Any]()
        if s.item is not None:
            name = f"{s.name} {s.item}" if s.count == 1 else f"{s.count} {s.name}s"
            args = {"item": s.item, "items": s.count}
        if s.owner is not None:
            args |= {"owner": Topology.path_string(s.owner), "stolen": s.is_stolen}
        dur, track = s.duration_ns / 1000, _track(s.sphere)
        return self._event("X", name, track, s.begin_ns, cat=s.kind, dur=dur, args=args)

    def _arrow(self, number: int, arrow: Arrow) -> list[dict[str, Any]]:
        """Its two ends; none where events were lost and there is nothing that one could be at."""
        ends = ((arrow.source, arrow.sent_ns), (arrow.target, arrow.received_ns))
        if not all(self._has_slice_at(sphere, moment) for sphere, moment in ends):
            return []
        start, finish = (
            self._event(phase, arrow.kind, _track(sphere), moment, cat=arrow.kind, id=number)
            for phase, (sphere, moment) in zip("sf", ends, strict=True)
        )
        return [start, {**finish, "bp": "e"}]  # it ends at the slice around, not at the next one

    def _has_slice_at(self, sphere: int, moment: int) -> bool:
        outer = self._outer.get(sphere, [])
        place = bisect_right(outer, moment, key=attrgetter("begin_ns")) - 1
        return place >= 0 and outer[place].end_ns >= moment

    def _counter(self, c: Counter) -> dict[str, Any]:
        return self._event("C", c.name, 0, c.time_ns, args={"value": c.value})


def _track(sphere: int) -> int:
    """Its number in the file: spheres count from 1, other threads from 1,000,001."""
    return sphere + 1 if sphere >= 0 else 1_000_000 - sphere
