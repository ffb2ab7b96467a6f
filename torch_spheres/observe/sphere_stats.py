"""`SphereStats`: the figures of one sphere in a snapshot, as they are read from C++."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from functools import cache
from operator import sub
from typing import Any

from torch_spheres import _core
from torch_spheres._core import State, Topology
from torch_spheres.observe.histogram import quantile_ns

__all__ = ["SphereStats", "sphere_stats"]


@dataclass(frozen=True, slots=True)
class SphereStats:
    """One sphere in a `Stats`.

    Times are in nanoseconds since `start()`, counts are since the spheres were made. In a
    difference of two snapshots both are what was added between the two; `state`, `queued` and
    `queue_high_water` are those of the later one.
    """

    id: int
    """Breadth-first number: 0 is the root, 1 to 12 the kissing spheres."""
    path: str
    """Groups on the way from the root, e.g. ``"1.7"``; ``"root"`` for the root."""
    level: int
    """0 for the root."""
    group: int | None
    """Symmetry group, 0 to 11: the index among the siblings. None for the root."""
    state: State
    """What the thread was doing. IDLE is as it should be when there is no work."""
    items_run: int
    """Work items run by this sphere, stolen ones included. The root also counts the pieces of a
    gradient sum that the waiting thread ran itself."""
    items_stolen: int
    """Items run that were taken from a sibling (by the root: from any leaf). High where the sphere
    was fast or its siblings slow."""
    items_given: int
    """Items of the sphere's own queue that siblings ran. High on a sphere that had the slow items,
    and on spheres that got no turn because `concurrency` is smaller than their number."""
    messages_sent: int
    """Messages sent along edges, the runtime's and the users'."""
    messages_received: int
    """Messages taken out of the sphere's mailbox."""
    queue_high_water: int
    """Most items that ever waited in the sphere's queue when work was handed down."""
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
    """Items that wait in the sphere's queue, or in the queues of an inner sphere's subtree. If it
    is 0 most of the time, leaves have nothing to do between batches of work."""
    stolen_from: tuple[int, ...] = ()
    """`items_stolen` by the symmetry group of the sibling that the items belonged to: twelve counts
    (the root's are by group of the leaf). Empty for other inner spheres, which run no items."""
    item_time_ns: int = 0
    """Time inside the items counted in `item_time_counts`."""
    item_time_counts: tuple[int, ...] = field(default=(), repr=False)
    """A histogram: how many items took less than ``ITEM_TIME_EDGES_NS[0]``, how many from there to
    less than ``ITEM_TIME_EDGES_NS[1]``, and so on; the last count is of those beyond the last edge.
    Python items are measured one by one, waits for the GIL included. Items of less than half a
    microsecond are measured eight at a time, native ones by the chunk, and each counts with the
    mean. Pieces of gradient sums are left out."""

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
        """Share of the time, 0 to 1, in which the sphere did work.

        It is low for most leaves if `Stats.concurrency` is less than their number; see
        `Stats.utilization`.
        """
        return self.busy_ns / self.total_ns if self.total_ns else 0.0

    def item_time(self, q: float = 0.5) -> float:
        """Reads a quantile of the times of the items that this sphere ran.

        Args:
            q: a share of the items, 0 to 1, as of `Stats.item_time`.

        Returns:
            Seconds; 0 without items.

        Raises:
            TypeError: `q` is not a number.
            ValueError: `q` is not between 0 and 1.
        """
        return quantile_ns(self.item_time_counts, q) / 1e9

    def _since(self, before: SphereStats) -> SphereStats:
        changed: dict[str, Any] = {}
        for name in _DIFFERENCES:
            new, old = getattr(self, name), getattr(before, name)
            changed[name] = tuple(map(sub, new, old)) if isinstance(new, tuple) else new - old
        return replace(self, **changed)


_FIGURES = [field.name for field in fields(SphereStats) if hasattr(_core.SphereStats, field.name)]
_STATE_TIMES = [f"{state.name.lower()}_ns" for state in State if state is not State.TERMINATING]
_DIFFERENCES = (
    *("items_run", "items_stolen", "items_given", "messages_sent", "messages_received"),
    *("stolen_from", "item_time_counts"),
    *(each.name for each in fields(SphereStats) if each.name.endswith("_ns")),
)


@cache
def _place(sphere: int) -> tuple[str, int, int | None]:
    """A sphere's path, level and group."""
    level = Topology.level(sphere)
    return Topology.path_string(sphere), level, Topology.group(sphere) if level else None


def _from_core(core: _core.SphereStats, last: int) -> SphereStats:
    path, level, group = _place(core.id)
    figures: dict[str, Any] = {name: getattr(core, name) for name in _FIGURES}
    figures |= zip(_STATE_TIMES, core.state_ns, strict=False)
    if level not in (0, last):
        figures["stolen_from"] = ()  # an inner sphere runs no items
    return SphereStats(path=path, level=level, group=group, **figures)


def sphere_stats(core: _core.System) -> tuple[SphereStats, ...]:
    """Reads the figures of all spheres, by id."""
    read = core.stats()
    last = Topology.level(len(read) - 1)
    return tuple(_from_core(figures, last) for figures in read)
