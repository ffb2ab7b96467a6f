"""Statistics of the spheres: frozen snapshots, and differences of two snapshots.

`KissingSpheres.stats` makes them. What is derived from a whole `Stats` is in table.py, advice.py,
prometheus.py and tensorboard.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from operator import sub
from typing import Any

from torch_spheres import _core
from torch_spheres._core import State, Topology
from torch_spheres.observe.advice import advice_on
from torch_spheres.observe.histogram import ITEM_TIME_EDGES_NS, add_counts, quantile_ns
from torch_spheres.observe.table import counted, duration, format_stats

__all__ = ["ITEM_TIME_EDGES_NS", "SphereStats", "Stats", "sphere_stats"]


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
        """As `Stats.item_time`, for the items that this sphere ran."""
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


@dataclass(frozen=True, slots=True, repr=False)
class Stats:
    """All spheres at one moment; a sequence of `SphereStats` by sphere id.

    ``after - before``, a `Stats` too, is what happened between two snapshots of the same spheres::

        before = spheres.stats()
        train_one_epoch()
        epoch = spheres.stats() - before
        print(epoch)
        print(*epoch.advice())
    """

    spheres: tuple[SphereStats, ...]
    concurrency: int
    """Leaves that may run at once."""
    cores: int = 0
    """Cores that the process could use when the spheres were made; 0: unknown."""
    begin_ns: int = 0
    """``time.monotonic_ns()`` when counting began: at the first `start()`, or at the earlier
    snapshot of a difference."""
    time_ns: int = 0
    """``time.monotonic_ns()`` when this snapshot was taken."""
    cpu_ns: int = 0
    """Nanoseconds that all threads of the process, not only spheres, spent on cores since
    `begin_ns`."""
    origin: int = 0
    """The number of the `KissingSpheres`; each of a process has another."""
    is_difference: bool = False
    """Whether this is what happened between two snapshots."""

    def __len__(self) -> int:
        return len(self.spheres)

    def __getitem__(self, sphere: int) -> SphereStats:
        try:
            return self.spheres[sphere]
        except IndexError:
            raise IndexError(
                f"there is no sphere {sphere}; ids are 0 (the root) to {len(self.spheres) - 1}"
            ) from None
        except TypeError:
            raise TypeError(f"a sphere's id must be an integer, got {sphere!r}") from None

    def __iter__(self) -> Iterator[SphereStats]:
        return iter(self.spheres)

    def __sub__(self, before: Stats) -> Stats:
        """Returns what happened from `before` to this snapshot.

        Raises:
            ValueError: the two are of different spheres, in the wrong order, or differences.
        """
        if not isinstance(before, Stats):
            return NotImplemented
        if (self.origin, len(self)) != (before.origin, len(before)):
            raise ValueError(
                "the two snapshots are of different spheres: "
                f"{len(self)} of KissingSpheres number {self.origin}, "
                f"{len(before)} of number {before.origin}"
            )
        if self.time_ns < before.time_ns:
            raise ValueError(
                f"the snapshot to take away was taken {(before.time_ns - self.time_ns) / 1e9:.3f} "
                "s after the other: write later - earlier"
            )
        if self.is_difference or before.is_difference:
            raise ValueError("differences have no differences; subtract the snapshots themselves")
        return replace(
            self,
            spheres=tuple(a._since(b) for a, b in zip(self.spheres, before.spheres, strict=True)),
            begin_ns=before.time_ns,
            is_difference=True,
            cpu_ns=self.cpu_ns - before.cpu_ns,
        )

    def level(self, level: int) -> tuple[SphereStats, ...]:
        """The spheres of one level, by id."""
        return tuple(s for s in self.spheres if s.level == level)

    @property
    def leaves(self) -> tuple[SphereStats, ...]:
        """The spheres that run work: those of the last level, by id."""
        return self.level(self.spheres[-1].level)

    def total(self, field: Callable[[SphereStats], int]) -> int:
        """Adds a figure over all spheres, e.g. ``stats.total(lambda s: s.items_run)``."""
        return sum(field(s) for s in self.spheres)

    @property
    def elapsed(self) -> float:
        """Seconds from `begin_ns` to `time_ns`, whether the spheres ran or not."""
        return (self.time_ns - self.begin_ns) / 1e9

    @property
    def running_time(self) -> float:
        """Seconds in which the spheres ran, between `start()` and `stop()`."""
        leaves = self.leaves
        return sum(s.total_ns for s in leaves) / len(leaves) / 1e9

    @property
    def items_run(self) -> int:
        """Work items run by all spheres."""
        return self.total(lambda s: s.items_run)

    @property
    def items_stolen(self) -> int:
        """Items run by another sphere than the one they belonged to."""
        return self.total(lambda s: s.items_stolen)

    @property
    def items_per_second(self) -> float:
        """Work items run per second of `elapsed`; 0 if no time has passed."""
        return self.items_run / self.elapsed if self.elapsed > 0 else 0.0

    @property
    def steal_rate(self) -> float:
        """Share of the items, 0 to 1, run by another sphere than the one they belonged to.

        It is high if `concurrency` is less than the number of leaves: two threads steal ten
        twelfths of twelve leaves' items. Otherwise it is high where items differ in length.
        """
        return self.items_stolen / self.items_run if self.items_run else 0.0

    @property
    def queued(self) -> int:
        """Items that waited in the leaves' queues when this was read."""
        return self.spheres[0].queued

    @property
    def messages(self) -> int:
        """Messages that spheres took out of their mailboxes, the runtime's and the users'.

        There are few beside the items: work is announced once for a batch, not for each item.
        """
        return self.total(lambda s: s.messages_received)

    @property
    def item_time_ns(self) -> int:
        """Nanoseconds inside items, added over all spheres, without pieces of gradient sums."""
        return self.total(lambda s: s.item_time_ns)

    @property
    def item_time_counts(self) -> tuple[int, ...]:
        """The histogram of all spheres' item times; see `SphereStats.item_time_counts`."""
        return add_counts(s.item_time_counts for s in self.spheres)

    @property
    def mean_item_time(self) -> float:
        """Seconds that an item took on average; 0 without items.

        If it is far above the median, ``item_time(0.5)``, a few items are much longer than others.
        """
        items = sum(self.item_time_counts)
        return self.item_time_ns / items / 1e9 if items else 0.0

    def item_time(self, q: float = 0.5) -> float:
        """The quantile of the item times in seconds; 0 without items.

        It is read from a histogram: off by less than a quarter of the true time, or by 64 ns if
        that is more.

        Args:
            q: a share of the items, 0 to 1: 0.5 gives the median, 0.95 the 95th percentile.

        Raises:
            TypeError: `q` is not a number.
            ValueError: `q` is not between 0 and 1.
        """
        return quantile_ns(self.item_time_counts, q) / 1e9

    @property
    def utilization(self) -> float:
        """The leaves' busy time as a share (0 to 1) of `running_time` times `concurrency`.

        If it is low, items come too seldom or too few at a time, or (see `imbalance`) the last item
        of a batch takes much longer than the others.
        """
        possible = self.running_time * 1e9 * self.concurrency
        busy = sum(s.busy_ns for s in self.leaves)
        return min(1.0, busy / possible) if possible > 0 else 0.0

    @property
    def imbalance(self) -> float:
        """Busy time of the busiest leaf over the mean of the `concurrency` busiest ones.

        It is between 1 (they worked equally long, or nothing was run) and `concurrency` (one leaf
        did all the work).
        """
        busy = sorted((s.busy_ns for s in self.leaves), reverse=True)[: self.concurrency]
        return busy[0] * len(busy) / sum(busy) if sum(busy) else 1.0

    @property
    def cores_used(self) -> float:
        """Cores that all threads of the process, not only spheres, kept busy on average."""
        return self.cpu_ns / 1e9 / self.elapsed if self.elapsed > 0 else 0.0

    def advice(self) -> tuple[str, ...]:
        """Returns at most three sentences on what to change, each with a figure as its reason.

        Best asked of a difference between two points of a loop, because in the figures since
        `start()` the program's own start counts as idle. Returns none if the spheres ran less than
        a second.
        """
        return advice_on(self)

    def to_prometheus(
        self, *, per_sphere: bool | None = None, labels: Mapping[str, str] | None = None
    ) -> str:
        """Returns the figures in Prometheus' text format, ``text/plain; version=0.0.4``.

        `KissingSpheres.prometheus_collector` is for a program that Prometheus scrapes.

        Args:
            per_sphere: whether there is a line for each sphere, with labels ``level``, ``sphere``
                and ``path``, or one for each level. None: for each of up to 13 spheres. Item times
                are one histogram either way.
            labels: more labels for every line, to tell several `KissingSpheres` apart.

        Raises:
            ImportError: prometheus_client is missing.
            TypeError: `per_sphere` is not True, False or None; `labels` is no mapping from strings.
            ValueError: this is a difference, and Prometheus makes differences itself; or a label
                has no valid name, or one that is used already.
        """
        from torch_spheres.observe.prometheus import page

        if self.is_difference:
            raise ValueError(
                "to_prometheus() wants a snapshot, spheres.stats(), whose counters only grow; "
                "Prometheus makes the differences (rate(...))"
            )
        return page(self, per_sphere, labels)

    def __str__(self) -> str:
        return format_stats(self)

    def __repr__(self) -> str:
        what = "Difference of two Stats" if self.is_difference else "Stats"
        return (
            f"<{what} of {counted(len(self), 'sphere')}: {counted(self.items_run, 'item')}, "
            f"{self.items_stolen:,} stolen, in {duration(self.elapsed)}; print() shows the table>"
        )
