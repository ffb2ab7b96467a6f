"""What `KissingSpheres.trace` records: slices, arrows and counters, as frozen values.

All times are nanoseconds of ``time.monotonic_ns()``. A trace can also be made by hand, from its
parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

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
    """A state's name in lower case, e.g. ``"idle"``; of an item what kind of work it is; of a phase
    ``"forward"``, ``"backward"`` or ``"sum"``."""
    item: int | None = None
    """The item's number in its batch; of a phase the shard's. None for states, and for the sum over
    all shards."""
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
    sibling; ``"gradient"``: gradients passed up."""
    source: int
    """Id of the sphere that it came from: of a steal, the one that the item belonged to."""
    target: int
    """Id of the sphere that got it; negative for another thread, as in `Slice.sphere`."""
    sent_ns: int
    received_ns: int
    """When the target read the message; of a steal the moment it was taken, as `sent_ns`."""
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


class Trace:
    """What the spheres did in a ``with spheres.trace()`` block.

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
        slices: Sequence[Slice] = (),
        arrows: Sequence[Arrow] = (),
        counters: Sequence[Counter] = (),
        lost: int = 0,
        threads: Mapping[int, str] = MappingProxyType({}),
    ) -> None:
        self.levels = levels
        self.concurrency = concurrency
        self.begin_ns = begin_ns
        self.end_ns = end_ns
        self.slices = tuple(slices)
        self.arrows = tuple(arrows)
        self.counters = tuple(counters)
        self.lost = lost
        self.threads = dict(threads)
