"""What `KissingSpheres.trace` records: slices, arrows and counters, as frozen values.

All times are nanoseconds of ``time.monotonic_ns()``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

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
        from torch_spheres.trace_file import save

        save(self, path)

    def __repr__(self) -> str:
        return (
            f"Trace of {(self.end_ns - self.begin_ns) / 1e9:.3f} s: {len(self.slices)} slices, "
            f"{len(self.arrows)} arrows, {self.lost} events lost"
        )
