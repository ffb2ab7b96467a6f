"""Statistics of the spheres: frozen values, and the table that `print_stats` prints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch_spheres import _core
from torch_spheres._core import State, Topology

__all__ = ["ITEM_TIME_EDGES_NS", "SphereStats", "Stats"]

ITEM_TIME_EDGES_NS: tuple[int, ...] = _core.item_time_edges()
"""Edges of the buckets of `SphereStats.item_time_counts`, in nanoseconds: 64 to 2**38 (275 s), four
to a doubling and equally wide within it, so that no bucket is wider than a quarter of its lower
edge."""


@dataclass(frozen=True, slots=True)
class SphereStats:
    """One sphere at one moment. Times are in nanoseconds since `start()`, counts since creation."""

    id: int
    """Breadth-first number: 0 is the root, 1 to 12 the kissing spheres."""
    path: str
    """Groups on the way from the root, e.g. ``"1.7"``; ``"root"`` for the root. Thread name."""
    level: int
    """0 for the root."""
    group: int | None
    """Symmetry group, 0 to 11: the index among the siblings. None for the root."""
    state: State
    """What the thread was doing. IDLE is good news when there is no work."""
    items_run: int
    """Work items run by this sphere, stolen ones included. On the root also the pieces of a
    gradient sum that the thread which called for it ran itself while it waited."""
    items_stolen: int
    """Of those, items taken from a sibling, or on the root from any leaf. High where the sphere was
    fast or the siblings slow."""
    items_given: int
    """Items of its own queue that siblings ran. High on a sphere that had the slow items, and on
    spheres that never got a turn because `concurrency` is smaller than their number."""
    messages_sent: int
    """Messages sent along edges, those of the runtime and the users'."""
    messages_received: int
    """Messages taken out of its mailbox."""
    queue_high_water: int
    """Most items that ever waited in its queue when work was handed down."""
    processing_ns: int
    """Time running work items."""
    accumulating_ns: int
    """Time summing gradients."""
    waiting_ns: int
    """Time at barriers, waiting for other spheres."""
    idle_ns: int
    """Time asleep with nothing to do."""
    ready_ns: int
    """Time awake between jobs: reading messages, handing work down. The runtime's own cost."""
    queued: int = 0
    """Items that wait in its queue at this moment; for inner spheres, in those of its subtree."""
    stolen_from: tuple[int, ...] = ()
    """`items_stolen` by the symmetry group of the sibling that each belonged to: twelve counts; on
    the root by the group of the leaf. Empty for the other inner spheres, which run no items."""
    item_time_ns: int = 0
    """Time inside the items counted in `item_time_counts`."""
    item_time_counts: tuple[int, ...] = ()
    """Items by how long they took: how many took less than ``ITEM_TIME_EDGES_NS[0]``, how many from
    there to less than ``ITEM_TIME_EDGES_NS[1]``, and so on; the last count is of those beyond the
    last edge. Python items are measured one by one, waits for the GIL included; native items are
    counted with the mean of the chunk they were taken in. Pieces of gradient sums are left out."""

    @property
    def busy_ns(self) -> int:
        """Nanoseconds of work: processing and accumulating."""
        return self.processing_ns + self.accumulating_ns

    @property
    def total_ns(self) -> int:
        """Nanoseconds in all states."""
        return self.busy_ns + self.waiting_ns + self.idle_ns + self.ready_ns

    @property
    def utilization(self) -> float:
        """Share of the time, 0 to 1, in which the sphere did work."""
        return self.busy_ns / self.total_ns if self.total_ns else 0.0


@dataclass(frozen=True, slots=True)
class Stats:
    """All spheres at one moment; iterate over it, or index it by sphere id."""

    spheres: tuple[SphereStats, ...]
    concurrency: int
    """Leaves that may run at once."""

    def __len__(self) -> int:
        return len(self.spheres)

    def __getitem__(self, sphere: int) -> SphereStats:
        return self.spheres[sphere]

    def level(self, level: int) -> tuple[SphereStats, ...]:
        """The spheres of one level, by id."""
        return tuple(s for s in self.spheres if s.level == level)

    def total(self, field: Callable[[SphereStats], int]) -> int:
        """Sum of a figure over all spheres, e.g. ``stats.total(lambda s: s.items_run)``."""
        return sum(field(s) for s in self.spheres)

    @property
    def items_run(self) -> int:
        """Work items run by all spheres."""
        return self.total(lambda s: s.items_run)

    @property
    def items_stolen(self) -> int:
        """Items that another sphere ran than the one they belonged to."""
        return self.total(lambda s: s.items_stolen)

    def __str__(self) -> str:
        return format_stats(self)


def snapshot(core: _core.System, concurrency: int) -> Stats:
    """Reads the counters of a system's spheres."""
    spheres = core.stats()
    leaf_level = Topology.level(len(spheres) - 1)
    return Stats(tuple(_from_core(s, leaf_level) for s in spheres), concurrency)


def _from_core(s: _core.SphereStats, leaf_level: int) -> SphereStats:
    ready, processing, idle, waiting, accumulating, _ = s.state_ns
    level = Topology.level(s.id)
    return SphereStats(
        id=s.id,
        path=Topology.path_string(s.id),
        level=level,
        group=Topology.group(s.id) if level else None,
        state=s.state,
        items_run=s.items_run,
        items_stolen=s.items_stolen,
        items_given=s.items_given,
        messages_sent=s.messages_sent,
        messages_received=s.messages_received,
        queue_high_water=s.queue_high_water,
        processing_ns=processing,
        accumulating_ns=accumulating,
        waiting_ns=waiting,
        idle_ns=idle,
        ready_ns=ready,
        queued=s.queued,
        stolen_from=s.stolen_from if level in (0, leaf_level) else (),
        item_time_ns=s.item_time_ns,
        item_time_counts=s.item_time_counts,
    )


_HEADER = ("", "spheres", "items", "stolen", "messages", "work s", "sums s", "barrier s", "busy %")


def _row(name: str, spheres: Sequence[SphereStats]) -> tuple[str, ...]:
    def seconds(ns: int) -> str:
        return f"{ns / 1e9:.3f}"

    busy = sum(s.busy_ns for s in spheres)
    total = sum(s.total_ns for s in spheres)
    return (
        name,
        f"{len(spheres)}",
        f"{sum(s.items_run for s in spheres):,}",
        f"{sum(s.items_stolen for s in spheres):,}",
        f"{sum(s.messages_received for s in spheres):,}",
        seconds(sum(s.processing_ns for s in spheres)),
        seconds(sum(s.accumulating_ns for s in spheres)),
        seconds(sum(s.waiting_ns for s in spheres)),
        f"{100 * busy / total:.1f}" if total else "-",
    )


def format_stats(stats: Stats, extremes: int = 3) -> str:
    """A row per level, then the `extremes` busiest and idlest of the leaves: plain text."""
    levels = max(s.level for s in stats.spheres) + 1
    rows: list[tuple[str, ...] | None] = [
        _row(f"level {level}" + (" (root)" if level == 0 else ""), stats.level(level))
        for level in range(levels)
    ]
    leaves = sorted(stats.level(levels - 1), key=lambda s: s.busy_ns, reverse=True)
    shown = min(extremes, len(leaves) // 2)
    if shown:
        rows.append(None)
        rows += [_row(f"busiest: {s.path}", [s]) for s in leaves[:shown]]
        rows.append(None)
        rows += [_row(f"idlest: {s.path}", [s]) for s in leaves[-shown:]]
    rows.append(None)
    rows.append(_row("all", stats.spheres))

    filled = [_HEADER, *(row for row in rows if row is not None)]
    widths = [max(len(row[i]) for row in filled) for i in range(len(_HEADER))]

    def line(row: tuple[str, ...]) -> str:
        first, *others = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join([first, *others]).rstrip()

    rule = "-" * len(line(filled[0]))
    lines = [line(_HEADER), rule]
    lines += [rule if row is None else line(row) for row in rows]
    lines.append(f"at most {stats.concurrency} of {len(leaves)} leaves run at once")
    return "\n".join(lines)
