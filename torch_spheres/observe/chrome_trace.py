"""Writes a `Trace` to a file in Chrome's trace-event format, which Perfetto opens.

The format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

import gzip
import json
import os
from bisect import bisect_right
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch_spheres._core import Topology

if TYPE_CHECKING:
    from torch_spheres.observe.trace import Arrow, Counter, Slice, Trace

__all__ = ["write_chrome_trace"]


def write_chrome_trace(trace: Trace, path: str | os.PathLike[str]) -> None:
    """Writes the file; compressed if its name ends in ``.gz``."""
    events = _Events(trace)
    head = json.dumps(
        {
            "displayTimeUnit": "ns",
            "torch_spheres": {
                "levels": trace.levels,
                "concurrency": trace.concurrency,
                "lost_events": trace.lost,
                "begin_monotonic_ns": trace.begin_ns,
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


class _Events:
    """The events of a trace, as dictionaries in the file's format."""

    def __init__(self, trace: Trace) -> None:
        self._trace, self._process = trace, os.getpid()
        # By sphere, the outermost slices, which do not overlap. Arrows begin and end in slices.
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
        """An event that names a track or the process."""
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
        """The two ends of an arrow; none if a slice that one end belongs to was lost."""
        ends = ((arrow.source, arrow.sent_ns), (arrow.target, arrow.received_ns))
        if not all(self._has_slice_at(sphere, moment) for sphere, moment in ends):
            return []
        start, finish = (
            self._event(phase, arrow.kind, _track(sphere), moment, cat=arrow.kind, id=number)
            for phase, (sphere, moment) in zip("sf", ends, strict=True)
        )
        return [start, {**finish, "bp": "e"}]  # at the enclosing slice, not at the next one

    def _has_slice_at(self, sphere: int, moment: int) -> bool:
        outer = self._outer.get(sphere, [])
        place = bisect_right(outer, moment, key=attrgetter("begin_ns")) - 1
        return place >= 0 and outer[place].end_ns >= moment

    def _counter(self, c: Counter) -> dict[str, Any]:
        return self._event("C", c.name, 0, c.time_ns, args={"value": c.value})


def _track(sphere: int) -> int:
    """The track's number: spheres count from 1, other threads from 1,000,001."""
    return sphere + 1 if sphere >= 0 else 1_000_000 - sphere
