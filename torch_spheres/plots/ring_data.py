"""What the picture of the rings shows, as plain values: from statistics or from a trace."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch_spheres._core import Topology
from torch_spheres.plots.theme import duration
from torch_spheres.stats import Stats

if TYPE_CHECKING:
    from torch_spheres.trace import Trace

__all__ = ["RingData"]

KISSING = 12
_BUSY = ("processing", "accumulating")


@dataclass(frozen=True, slots=True)
class RingData:
    """Of each sphere how busy it was and what it does; who stole from whom."""

    levels: int
    concurrency: int
    busy: tuple[float, ...]
    """Shares of the time, 0 to 1, by sphere id."""
    ran: tuple[bool, ...]
    """Whether it ran any items, by sphere id. The root may have and still not be busy: its are run
    by threads that wait, while its own thread sleeps."""
    states: tuple[str, ...]
    """In lower case, by sphere id; "" where that is not known."""
    items: int
    steals: dict[tuple[int, int], int]
    """Items, by (thief, victim), of leaves."""
    helped: int
    """Items that threads ran while they waited, as the root, where their leaf is not known."""
    span: str
    """Of what time the shares are."""
    lost: int = 0
    """Events that the trace has lost."""

    def used(self, sphere: int) -> bool:
        """Whether it did anything at all."""
        return self.ran[sphere] or self.busy[sphere] > 0

    @property
    def stolen(self) -> int:
        """Items that another sphere ran than the one they belonged to."""
        return sum(self.steals.values()) + self.helped

    @staticmethod
    def of_stats(stats: Stats) -> RingData:
        """From a snapshot, or from a difference of two."""
        levels = max(s.level for s in stats.spheres) + 1
        steals: dict[tuple[int, int], int] = {}
        helped = 0
        for sphere in stats.spheres:
            for group, count in enumerate(sphere.stolen_from):
                if not count:
                    continue
                if sphere.level:
                    steals[sphere.id, _sibling(sphere.id, group)] = count
                elif levels == 2:  # the root's helper, which counts by the leaf's group
                    steals[0, Topology.child(0, group)] = count
                else:
                    helped += count
        return RingData(
            levels=levels,
            concurrency=stats.concurrency,
            busy=tuple(s.utilization for s in stats.spheres),
            ran=tuple(s.items_run > 0 for s in stats.spheres),
            states=tuple(s.state.name.lower() for s in stats.spheres),
            items=stats.items_run,
            steals=steals,
            helped=helped,
            span="of the time",
        )

    @staticmethod
    def of_trace(trace: Trace) -> RingData:
        """What happened while the trace was recorded."""
        total = Topology(trace.levels).total
        span = max(1, trace.end_ns - trace.begin_ns)
        busy = [0] * total
        states = [""] * total
        ran = [False] * total
        items = 0
        for part in trace.slices:
            if part.kind == "item":
                items += part.count
                ran[max(0, part.sphere)] = True  # what other threads help with counts for the root
            if part.kind != "state" or part.sphere < 0:
                continue
            states[part.sphere] = part.name  # the last one: slices are ordered by time
            if part.name in _BUSY:
                busy[part.sphere] += part.end_ns - part.begin_ns
        steals: Counter[tuple[int, int]] = Counter()
        for arrow in trace.arrows:
            if arrow.kind == "steal":
                # Other threads that run items while they wait do so as the root.
                steals[max(0, arrow.target), arrow.source] += arrow.count
        return RingData(
            levels=trace.levels,
            concurrency=trace.concurrency,
            busy=tuple(min(1.0, ns / span) for ns in busy),
            ran=tuple(ran),
            states=tuple(states),
            items=items,
            steals=dict(steals),
            helped=0,
            span=f"of the {duration(span / 1e9)} traced",
            lost=trace.lost,
        )

    def level(self, level: int) -> range:
        """Ids of the spheres of a level."""
        first = Topology.first(level)
        return range(first, first + Topology.count(level))

    def state_counts(self, order: Iterable[str]) -> list[tuple[str, int]]:
        """How many spheres are in each state in which there are any."""
        counts = Counter(self.states)
        return [(state, counts[state]) for state in order if counts[state]]

    def heaviest_steals(self, most: int) -> list[tuple[int, int, int]]:
        """(thief, victim, items) of the pairs with most items, least first: drawn in this order."""
        pairs = sorted(self.steals.items(), key=lambda pair: (-pair[1], pair[0]))[:most]
        return [(thief, victim, count) for (thief, victim), count in reversed(pairs)]


def _sibling(sphere: int, group: int) -> int:
    return Topology.child(Topology.parent(sphere), group)
