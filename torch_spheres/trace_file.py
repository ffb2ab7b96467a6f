"""Traces as files in Chrome's trace-event format, alone or together with `torch.profiler`'s."""

from __future__ import annotations

import gzip
import json
import os
import tempfile
import warnings
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch_spheres._core import Topology
from torch_spheres.trace import Counter, Parts, Slice

__all__ = ["save"]


def save(parts: Parts, path: str | os.PathLike[str], profiler: Any = None) -> None:
    """See `Trace.save`."""
    other = None if profiler is None else _profile(profiler)
    writer = _Writer(parts, other)
    reason = writer.why_no_operators(other) if other is not None else None
    if reason is not None:
        warnings.warn(
            f"the profiler saw no operator on a sphere while this trace was recorded: {reason}",
            stacklevel=3,
        )
    # Line by line: a long trace is larger as text than it was in memory.
    name = os.fspath(path)
    if name.endswith(".gz"):
        with gzip.open(name, "wt", encoding="utf-8", compresslevel=5) as file:
            file.writelines(writer.lines())
    else:
        with Path(name).open("w", encoding="utf-8") as file:
            file.writelines(writer.lines())


def _profile(profiler: Any) -> dict[str, Any]:
    """What a profiler has to say, in the format of its own export."""
    if isinstance(profiler, (str, os.PathLike)):
        return _load(os.fspath(profiler))
    if not hasattr(profiler, "export_chrome_trace"):
        raise TypeError(
            "profiler must be a torch.profiler.profile or the path of what its "
            f"export_chrome_trace() wrote, got {type(profiler).__name__}"
        )
    inner = getattr(profiler, "profiler", profiler)
    if inner is None or getattr(inner, "kineto_results", None) is None:
        raise RuntimeError(
            "the profiler has nothing to save yet: leave its 'with' block, then call trace.save()"
        )
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "profile.json")  # noqa: PTH118
        try:
            profiler.export_chrome_trace(path)
        except RuntimeError as error:
            if "already saved" not in str(error):
                raise
            raise RuntimeError(
                "this profiler has been written already (by export_chrome_trace(), a "
                "tensorboard_trace_handler or another trace.save()), and torch lets it be written "
                "only once: give the path of that file instead, trace.save(path, "
                "profiler='profile.json')"
            ) from error
        return _load(path)


def _load(path: str) -> dict[str, Any]:
    data = Path(path).read_bytes()
    try:
        found = json.loads(gzip.decompress(data) if path.endswith(".gz") else data)
    except (ValueError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is no trace of torch.profiler: {error}") from None
    if not isinstance(found, dict) or "traceEvents" not in found:
        raise ValueError(f"{path} is no trace of torch.profiler: it has no 'traceEvents'")
    return found


class _Writer:
    """One trace as lines of JSON.

    Times are written as microseconds with three decimals, from whole nanoseconds: as floating-point
    numbers the end of a slice could come after that of the one around it.
    """

    def __init__(self, parts: Parts, profile: dict[str, Any] | None) -> None:
        self._parts = parts
        self._profile = profile
        self._process = parts.process or os.getpid()
        self._base = parts.begin_ns  # what is written as 0, in monotonic nanoseconds
        self._since, self._drift = parts.begin_ns, 0.0
        if profile is not None:
            self._meet(profile)
        # The outermost slices of each track, which do not overlap: arrows begin and end in them.
        self._outer: dict[int, list[Slice]] = {}
        for s in parts.slices:
            outer = self._outer.setdefault(s.sphere, [])
            if not outer or s.begin_ns >= outer[-1].end_ns:
                outer.append(s)
        self._begins = {k: [s.begin_ns for s in outer] for k, outer in self._outer.items()}

    def _meet(self, profile: dict[str, Any]) -> None:
        """Takes over the profiler's clock: wall time since a base that its file names."""
        clock = self._parts.clock
        if not clock:
            raise ValueError(
                "a trace that was made by hand knows no clock by which it could be merged with a "
                "profiler's"
            )
        processes = {e.get("pid") for e in profile["traceEvents"]}
        if self._process not in processes:
            raise ValueError(
                f"the profiler's trace is of another process than this one's, {self._process}: it "
                f"has {sorted(map(str, processes))}"
            )
        (first, wall), (last, wall_then) = clock[0], clock[-1]
        self._base = int(profile.get("baseTimeNanoseconds", 0)) - wall
        self._since = first
        # Wall time is slowed down and sped up by who keeps it right: the clocks part slowly.
        self._drift = (wall_then - wall) / max(1, last - first)

    def why_no_operators(self, profile: dict[str, Any]) -> str | None:
        """Why the profiler saw nothing of what the spheres ran; None if it did, or nothing ran."""
        ran = {
            s.sphere
            for s in self._parts.slices
            if s.sphere >= 0 and (s.kind == "phase" or (s.kind, s.name) == ("item", "item"))
        }
        if not ran:
            return None
        tids = {tid for sphere in ran for _, tid in self._parts.native_ids.get(sphere, ())}
        begin, end = self._at(self._parts.begin_ns) / 1e3, self._at(self._parts.end_ns) / 1e3
        at_the_time = False
        for event in profile["traceEvents"]:
            if event.get("ph") != "X" or "ts" not in event:
                continue
            # One of them stands for the profiler itself, from begin to end, on no thread.
            if event["ts"] < end and event["ts"] + event.get("dur", 0) > begin:
                at_the_time = True
                if event.get("pid") == self._process and event.get("tid") in tids:
                    return None
        if not at_the_time:
            return "it is of another time; profile and trace the same part of the program"
        return (
            "either it did not look at all threads, as torch.profiler.profile(experimental_config="
            "torch._C._profiler._ExperimentalConfig(profile_all_threads=True)) does, or the items "
            "called no operators"
        )

    def _at(self, ns: int) -> int:
        """A moment, in nanoseconds from the file's beginning."""
        return ns - self._base + round((ns - self._since) * self._drift)

    def _us(self, ns: int) -> str:
        return _micro(self._at(ns))

    def lines(self) -> Iterator[str]:
        """The file."""
        parts, profile = self._parts, self._profile or {}
        rest = {k: v for k, v in profile.items() if k != "traceEvents"}
        about = {
            "levels": parts.levels,
            "concurrency": parts.concurrency,
            "lost_events": parts.lost,
            "begin_monotonic_ns": parts.begin_ns,
        }
        head = json.dumps({**rest, "displayTimeUnit": "ns", "torch_spheres": about})
        yield head[:-1] + ',\n"traceEvents": [\n'
        separator = ""
        for event in self._events():
            yield separator + event
            separator = ",\n"
        yield "\n]}\n"

    def _events(self) -> Iterator[str]:
        ours = self._names()
        named = {(self._process, tid) for tid in ours}
        theirs = self._profile["traceEvents"] if self._profile is not None else []
        for event in theirs:
            # The profiler names threads too, by the number that ours are known by.
            is_name = event.get("ph") == "M" and event["name"].startswith("thread_")
            if not is_name or (event.get("pid"), event.get("tid")) not in named:
                yield json.dumps(event)
        if not theirs:
            yield self._meta("process_name", 0, {"name": "torch_spheres"})
        for order, (tid, name) in enumerate(ours.items()):
            yield self._meta("thread_name", tid, {"name": name})
            yield self._meta("thread_sort_index", tid, {"sort_index": order})
        yield from map(self._slice, self._parts.slices)
        yield from self._arrows()
        yield from map(self._counter, self._parts.counters)

    def _names(self) -> dict[int, str]:
        """The names of all threads, in the order in which they are to stand."""
        names = {}
        for sphere in sorted(self._outer):
            name = self._parts.threads.get(sphere, f"thread {-sphere}")
            if sphere >= 0:
                name = f"sphere {Topology.path_string(sphere)}"
            for _, tid in self._parts.native_ids.get(sphere, []) or [(0, _invented(sphere))]:
                names[tid] = name
        return names

    def _tid(self, sphere: int, moment: int) -> int:
        known = self._parts.native_ids.get(sphere)
        if not known:
            return _invented(sphere)
        tid = known[0][1]
        for since, later in known[1:]:
            if since <= moment:
                tid = later
        return tid

    def _meta(self, what: str, tid: int, args: dict[str, Any]) -> str:
        return json.dumps(
            {"ph": "M", "name": what, "pid": self._process, "tid": tid, "ts": 0, "args": args}
        )

    def _slice(self, s: Slice) -> str:
        args: dict[str, Any] = {}
        name = s.name
        if s.kind == "phase":
            if s.item is not None:
                what = "batch" if s.name == "load" else "shard"
                name = f"{s.name}, {what} {s.item}"
                args = {what: s.item}
        elif s.item is not None and s.owner is not None:
            name = f"{s.name} {s.item}" if s.count == 1 else f"{s.count} {s.name}s"
            args = {"item": s.item, "items": s.count, "owner": Topology.path_string(s.owner)}
            args["stolen"] = s.owner != max(0, s.sphere)
        begin, end = self._at(s.begin_ns), self._at(s.end_ns)
        return (
            f'{{"ph":"X","cat":"{s.kind}","name":{json.dumps(name)},{self._place(s.sphere, s)},'
            f'"ts":{_micro(begin)},"dur":{_micro(end - begin)},"args":{json.dumps(args)}}}'
        )

    def _place(self, sphere: int, s: Slice) -> str:
        return f'"pid":{self._process},"tid":{self._tid(sphere, s.begin_ns)}'

    def _arrows(self) -> Iterator[str]:
        for number, arrow in enumerate(self._parts.arrows):
            ends = [
                ("s", arrow.source, arrow.sent_ns, self._around(arrow.source, arrow.sent_ns)),
                ("f", arrow.target, arrow.received_ns,
                 self._around(arrow.target, arrow.received_ns)),
            ]  # fmt: skip
            for phase, sphere, moment, around in ends:
                # Where events were lost there may be nothing that an arrow could begin at.
                if around is None or ends[0][3] is None or ends[1][3] is None:
                    continue
                bind = ',"bp":"e"' if phase == "f" else ""
                yield (
                    f'{{"ph":"{phase}","cat":"{arrow.kind}","name":"{arrow.kind}","id":{number},'
                    f'{self._place(sphere, around)},"ts":{self._us(moment)}{bind}}}'
                )

    def _around(self, sphere: int, moment: int) -> Slice | None:
        place = bisect_right(self._begins.get(sphere, []), moment) - 1
        if place < 0 or self._outer[sphere][place].end_ns < moment:
            return None
        return self._outer[sphere][place]

    def _counter(self, c: Counter) -> str:
        return (
            f'{{"ph":"C","name":{json.dumps(c.name)},"pid":{self._process},'
            f'"ts":{self._us(c.time_ns)},"args":{{"value":{c.value}}}}}'
        )


def _invented(sphere: int) -> int:
    """A thread number for traces that were made by hand."""
    return sphere + 1 if sphere >= 0 else 1_000_000 - sphere


def _micro(ns: int) -> str:
    sign = "-" if ns < 0 else ""
    whole, rest = divmod(abs(ns), 1000)
    return f"{sign}{whole}.{rest:03d}"
