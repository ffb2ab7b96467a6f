"""What `KissingSpheres.trace` records: slices, arrows and counters, as frozen values.

All times are nanoseconds of ``time.monotonic_ns()``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

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
    """Of an item: id of the sphere it belonged to. Another one than `sphere`: it was stolen."""
    count: int = 1
    """Items in this slice. More than 1 for native items that took next to no time, which are taken
    together: `item`, and those that follow at distances of the number of leaves."""

    @property
    def duration_ns(self) -> int:
        """Nanoseconds from begin to end."""
        return self.end_ns - self.begin_ns


@dataclass(frozen=True, slots=True)
class Arrow:
    """Something that went from one sphere to another."""

    kind: str
    """``"work"``: news of work, handed down to a child; ``"steal"``: an item that was taken from a
    sibling; ``"gradient"``: gradients passed up, with `GradientHook.add` to the parent, by a
    `SphereParallel` to whoever adds them."""
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


@dataclass(frozen=True, slots=True)
class Parts:
    """What a trace is made of; the fields are `Trace`'s."""

    levels: int
    concurrency: int
    begin_ns: int
    end_ns: int
    slices: tuple[Slice, ...]
    arrows: tuple[Arrow, ...]
    counters: tuple[Counter, ...]
    lost: int
    threads: dict[int, str]
    native_ids: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    """By sphere or thread: the operating system's numbers of its thread, each with the time from
    which it held (`start` makes new threads)."""
    clock: tuple[tuple[int, int], ...] = ()
    """Moments, and what ``time.time_ns()`` was then more than ``time.monotonic_ns()``."""
    process: int = 0


class Trace:
    """What the spheres did in a ``with spheres.trace()`` block; or made by hand, from its parts.

    Args:
        levels, concurrency: as of the `KissingSpheres`.
        begin_ns, end_ns: when recording began and ended.
        slices, arrows, counters: what was recorded, ordered by time.
        lost: events that were overwritten by newer ones.
        threads: names of the threads that are no spheres, by their negative ids.
    """

    def __init__(
        self,
        *,
        levels: int,
        concurrency: int,
        begin_ns: int,
        end_ns: int,
        slices: Iterable[Slice] = (),
        arrows: Iterable[Arrow] = (),
        counters: Iterable[Counter] = (),
        lost: int = 0,
        threads: Mapping[int, str] | None = None,
    ) -> None:
        self._made: Parts | None = Parts(
            levels,
            concurrency,
            begin_ns,
            end_ns,
            tuple(slices),
            tuple(arrows),
            tuple(counters),
            lost,
            dict(threads or {}),
        )

    def _parts(self) -> Parts:
        """All of it; a recording has it after its block."""
        assert self._made is not None
        return self._made

    @property
    def levels(self) -> int:
        """Levels of the hierarchy, the root's included."""
        return self._parts().levels

    @property
    def concurrency(self) -> int:
        """Leaves that ran at once, at most."""
        return self._parts().concurrency

    @property
    def begin_ns(self) -> int:
        """When recording began. What had begun before is cut here."""
        return self._parts().begin_ns

    @property
    def end_ns(self) -> int:
        """When recording ended. States are cut here; items that still ran are not in the trace."""
        return self._parts().end_ns

    @property
    def slices(self) -> tuple[Slice, ...]:
        """States, items and phases of all threads, by the time at which they began; of two that
        began together the outer one first.
        """
        return self._parts().slices

    @property
    def arrows(self) -> tuple[Arrow, ...]:
        """What went from sphere to sphere, by the time at which it was received."""
        return self._parts().arrows

    @property
    def counters(self) -> tuple[Counter, ...]:
        """Figures that changed, each by time. They begin where nothing is lost any more."""
        return self._parts().counters

    @property
    def lost(self) -> int:
        """Events that newer ones have overwritten: 0 means that everything is here. Otherwise ask
        for a larger `capacity`, or trace less.
        """
        return self._parts().lost

    @property
    def threads(self) -> dict[int, str]:
        """Names of the threads that are no spheres, by the negative ids that slices have."""
        return self._parts().threads

    def save(self, path: str | os.PathLike[str], profiler: Any = None) -> None:
        """Writes Chrome's trace-event format, which Perfetto and ``chrome://tracing`` open.

        Args:
            path: of the file; compressed if its name ends in ``.gz``.
            profiler: a `torch.profiler.profile` whose block has ended, or the path of what its
                ``export_chrome_trace`` wrote, to be in the same file: each operator stands under
                the sphere that ran it. The profiler has to look at all threads, see the README.
                torch writes a profiler once, and this uses it up; a path can be used again.

        Warns:
            UserWarning: the profiler saw no operator on a sphere that ran items or shards: it did
                not look at all threads, or is of another time. The file is written all the same.

        Raises:
            RuntimeError: the trace, or the profiler, has not ended yet, or the profiler was written
                before.
            ValueError: the profiler's file is no trace, or one of another process.
            OSError: a file cannot be read or written.
        """
        from torch_spheres.trace_file import save

        save(self._parts(), path, profiler)

    def __repr__(self) -> str:
        parts = self._parts()
        return (
            f"Trace of {(parts.end_ns - parts.begin_ns) / 1e9:.3f} s: {len(parts.slices)} slices, "
            f"{len(parts.arrows)} arrows, {parts.lost} events lost"
        )
