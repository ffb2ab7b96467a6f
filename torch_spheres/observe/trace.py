"""A `Trace`, which `KissingSpheres.trace` records: slices, arrows and counters.

All times are nanoseconds of ``time.monotonic_ns()``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch_spheres.observe.chrome_trace import write_chrome_trace

__all__ = ["Arrow", "Counter", "Slice", "Trace"]


@dataclass(frozen=True, slots=True)
class Slice:
    """Something that a thread did for a while.

    Slices of one sphere nest: phases in items, items in states.
    """

    sphere: int
    """Id of the thread's sphere; -1, -2, ... for other threads, see `Trace.threads`."""
    begin_ns: int
    """When it began, on the clock of ``time.monotonic_ns()``."""
    end_ns: int
    """When it ended, on the same clock."""
    kind: str
    """``"state"``, ``"item"`` or ``"phase"``."""
    name: str
    """Of a state its name in lower case, e.g. ``"idle"``; of an item the kind of work: ``"item"``
    (a Python call), ``"native item"``, ``"sum piece"`` or ``"gather"``; of a phase ``"forward"``,
    ``"loss"``, ``"backward"``, ``"sum"``, or ``"load"`` in a wrapped loader."""
    item: int | None = None
    """Of an item its number in its batch of work; of a phase the shard's number, or that of the
    loaded batch in its epoch. None for states, and for the sum over all shards."""
    owner: int | None = None
    """Of an item: id of the sphere that it belonged to."""
    count: int = 1
    """Items in this slice: more than 1 for native items that took next to no time. These are
    `item`, and those that follow it in steps of the number of leaves."""

    @property
    def duration_ns(self) -> int:
        """Nanoseconds from begin to end."""
        return self.end_ns - self.begin_ns

    @property
    def is_stolen(self) -> bool:
        """Whether this is an item of another sphere; other threads count as the root."""
        return self.owner is not None and self.owner != max(0, self.sphere)


@dataclass(frozen=True, slots=True)
class Arrow:
    """Something that was passed from one sphere to another."""

    kind: str
    """``"work"``: a sphere that took an item saw more, and woke the target; ``"steal"``: an item
    that belonged to another sphere; ``"gradient"``: a shard's gradients, from where they were ready
    to the thread that adds them."""
    source: int
    """Id of the sphere it came from; of a steal, the sphere that the item belonged to."""
    target: int
    """Id of the sphere it went to; negative for another thread, as in `Slice.sphere`."""
    sent_ns: int
    """When the source sent it, on the clock of ``time.monotonic_ns()``."""
    received_ns: int
    """When the target read the message; of a steal, as `sent_ns`, when the item began."""
    count: int = 1
    """Of a steal: items taken at once."""


@dataclass(frozen=True, slots=True)
class Counter:
    """A change of a figure, which keeps the value until the next `Counter` of the same name."""

    name: str
    """``"running spheres"``: spheres that run work or sum gradients. ``"queued items"``: items of
    all spheres that were handed out and have not begun."""
    time_ns: int
    """When the figure changed, on the clock of ``time.monotonic_ns()``."""
    value: int
    """The figure from then on: a number of spheres or of items."""


@dataclass(kw_only=True, eq=False, repr=False)
class Trace:
    """What the spheres did in a ``with spheres.trace()`` block, or a trace made from its parts."""

    levels: int
    """Levels of the hierarchy, the root's included."""
    concurrency: int
    """Leaves that ran at once, at most."""
    begin_ns: int
    """When recording began, on the clock of ``time.monotonic_ns()``. Slices
    that had begun before begin here."""
    end_ns: int
    """When recording ended, on the same clock. States end here; items that still ran are not
    in the trace."""
    slices: Sequence[Slice] = field(default_factory=tuple)
    """States, items and phases of all threads, ordered by begin, the outer of two before the
    inner."""
    arrows: Sequence[Arrow] = field(default_factory=tuple)
    """Arrows from sphere to sphere, ordered by when they were received."""
    counters: Sequence[Counter] = field(default_factory=tuple)
    """Changes of figures, ordered by time, from the moment on at which no events are lost."""
    lost: int = field(default_factory=int)
    """Events that newer ones have overwritten. If it is not 0, ask for a larger `capacity`, or
    trace less."""
    threads: Mapping[int, str] = field(default_factory=dict)
    """Names of threads other than spheres, by their negative ids in slices."""

    def __post_init__(self) -> None:
        self.slices, self.arrows = tuple(self.slices), tuple(self.arrows)
        self.counters, self.threads = tuple(self.counters), dict(self.threads)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Saves the trace in Chrome's trace-event format, for Perfetto and ``chrome://tracing``.

        Args:
            path: of the file, which is compressed if its name ends in ``.gz``.

        Raises:
            RuntimeError: the trace has not ended yet.
            OSError: the file cannot be written.
        """
        write_chrome_trace(self, path)

    def __repr__(self) -> str:
        return (
            f"Trace of {(self.end_ns - self.begin_ns) / 1e9:.3f} s: {len(self.slices)} slices, "
            f"{len(self.arrows)} arrows, {self.lost} events lost"
        )
