"""Statistics of the spheres: frozen values that can be taken from each other."""

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
    """One sphere at one moment, or between two (see `Stats`).

    Times are in nanoseconds since `start()`, counts since creation; in a difference both are what
    came between, but `state`, `queued` and `queue_high_water` are as they were at its end.
    """

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
    """Items that wait in its queue at this moment; for inner spheres, in those of its subtree. 0
    most of the time: leaves starve between batches of work."""
    stolen_from: tuple[int, ...] = ()
    """`items_stolen` by the symmetry group of the sibling that each belonged to: twelve counts; on
    the root by the group of the leaf. Empty for the other inner spheres, which run no items."""
    item_time_ns: int = 0
    """Time inside the items counted in `item_time_counts`."""
    item_time_counts: tuple[int, ...] = field(default=(), repr=False)
    """Items by how long they took: how many took less than ``ITEM_TIME_EDGES_NS[0]``, how many from
    there to less than ``ITEM_TIME_EDGES_NS[1]``, and so on; the last count is of those beyond the
    last edge. Python items are measured one by one, waits for the GIL included; those of less than
    half a microsecond eight at a time, and native ones by the chunk, each counted with the mean.
    Pieces of gradient sums are left out."""

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

        With fewer turns than leaves (`Stats.concurrency`) most leaves have little; see
        `Stats.utilization`.
        """
        return self.busy_ns / self.total_ns if self.total_ns else 0.0

    def item_time(self, q: float = 0.5) -> float:
        """As `Stats.item_time`, of the items that this sphere ran."""
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
    """Path, level and group."""
    level = Topology.level(sphere)
    return Topology.path_string(sphere), level, Topology.group(sphere) if level else None


def _from_core(core: _core.SphereStats, last: int) -> SphereStats:
    path, level, group = _place(core.id)
    figures: dict[str, Any] = {name: getattr(core, name) for name in _FIGURES}
    figures |= zip(_STATE_TIMES, core.state_ns, strict=False)
    if level not in (0, last):
        figures["stolen_from"] = ()  # it runs no items
    return SphereStats(path=path, level=level, group=group, **figures)


def sphere_stats(core: _core.System) -> tuple[SphereStats, ...]:
    """The figures of all spheres now, by id."""
    read = core.stats()
    last = Topology.level(len(read) - 1)
    return tuple(_from_core(figures, last) for figures in read)


@dataclass(frozen=True, slots=True, repr=False)
class Stats:
    """All spheres at one moment; iterate over it, or index it by sphere id.

    ``after - before`` is what happened between two snapshots of the same spheres, a `Stats` again::

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
    """Cores that the process could use when the spheres were made; 0: not known."""
    begin_ns: int = 0
    """When counting began, on the clock of ``time.monotonic_ns()``: at the first `start()`, or the
    earlier snapshot of a difference."""
    time_ns: int = 0
    """When this was read, on the clock of ``time.monotonic_ns()``."""
    cpu_ns: int = 0
    """Time that all threads of the process, those of others too, spent on cores since `begin_ns`.
    Beside `elapsed` it says how many cores were kept busy."""
    origin: int = 0
    """Which `KissingSpheres` of the process this is of: a number of its own for each."""
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
        """What happened after `before` up to this snapshot.

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
        """Sum of a figure over all spheres, e.g. ``stats.total(lambda s: s.items_run)``."""
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
        """Items that another sphere ran than the one they belonged to."""
        return self.total(lambda s: s.items_stolen)

    @property
    def items_per_second(self) -> float:
        """Work items run in a second of `elapsed`; 0 when no time has passed."""
        return self.items_run / self.elapsed if self.elapsed > 0 else 0.0

    @property
    def steal_rate(self) -> float:
        """Share of the items, 0 to 1, that another sphere ran than the one they belonged to.

        With fewer turns than leaves (`concurrency`) most are: of twelve leaves' items two threads
        steal ten twelfths. With as many turns as leaves it is high where items differ in length.
        """
        return self.items_stolen / self.items_run if self.items_run else 0.0

    @property
    def queued(self) -> int:
        """Items that waited in the leaves' queues when this was read."""
        return self.spheres[0].queued

    @property
    def messages(self) -> int:
        """Messages that spheres took out of their mailboxes, those of the runtime and the users'.

        Few beside the items: news of work is sent once for a batch, not for each item.
        """
        return self.total(lambda s: s.messages_received)

    @property
    def item_time_ns(self) -> int:
        """Nanoseconds inside items, over all spheres. Pieces of gradient sums are left out."""
        return self.total(lambda s: s.item_time_ns)

    @property
    def item_time_counts(self) -> tuple[int, ...]:
        """Items of all spheres by how long they took; see `SphereStats.item_time_counts`."""
        return add_counts(s.item_time_counts for s in self.spheres)

    @property
    def mean_item_time(self) -> float:
        """Seconds that an item took on average; 0 without items.

        Far above the median, ``item_time(0.5)``: a few items are much longer than the others.
        """
        items = sum(self.item_time_counts)
        return self.item_time_ns / items / 1e9 if items else 0.0

    def item_time(self, q: float = 0.5) -> float:
        """Seconds that a share `q` of the items, 0 to 1, stayed below; 0 without items.

        ``item_time(0.5)`` is the median, ``item_time(0.95)`` what 95 % stayed below. It is read
        from a histogram: off by less than a quarter of the true time, or by 64 ns if that is more.

        Raises:
            TypeError: `q` is no number.
            ValueError: `q` is not between 0 and 1.
        """
        return quantile_ns(self.item_time_counts, q) / 1e9

    @property
    def utilization(self) -> float:
        """Share, 0 to 1, of what `concurrency` leaves could have worked in the time they ran.

        1: there was work for every turn, all the time. Low: items come too seldom or too few at a
        time, or (see `imbalance`) all wait for the longest.
        """
        possible = self.running_time * 1e9 * self.concurrency
        busy = sum(s.busy_ns for s in self.leaves)
        return min(1.0, busy / possible) if possible > 0 else 0.0

    @property
    def imbalance(self) -> float:
        """Busy time of the busiest leaf over the mean of the `concurrency` busiest ones.

        1: they worked equally long. 2: the busiest worked twice as long as they did on average,
        and if that was at the end the others waited for it. At most `concurrency`. 1 if nothing
        was run.
        """
        busy = sorted((s.busy_ns for s in self.leaves), reverse=True)[: self.concurrency]
        return busy[0] * len(busy) / sum(busy) if sum(busy) else 1.0

    @property
    def cores_used(self) -> float:
        """Cores that the process kept busy on average, threads of others included."""
        return self.cpu_ns / 1e9 / self.elapsed if self.elapsed > 0 else 0.0

    def advice(self) -> tuple[str, ...]:
        """At most three sentences on what to change, each with the figure that speaks for it.

        Empty when there is nothing to say, or less than a second of running to judge from. Ask a
        difference between two points of the same loop: in the figures since `start()` the program's
        own start counts as idle.
        """
        return advice_on(self)

    def to_prometheus(
        self, *, per_sphere: bool | None = None, labels: Mapping[str, str] | None = None
    ) -> str:
        """The figures as a page for Prometheus, as `prometheus_client` writes it.

        For a program that is scraped while it runs see `KissingSpheres.prometheus_collector`.

        Args:
            per_sphere: a line for each sphere, with labels ``level``, ``sphere`` and ``path``;
                otherwise one for each level. Default: for up to 13 spheres. Item times are one
                histogram either way.
            labels: more labels for every line, to tell several `KissingSpheres` apart.

        Serve it as ``text/plain; version=0.0.4``.

        Raises:
            ImportError: there is no prometheus_client: ``pip install "torch_spheres[prometheus]"``.
            TypeError: `per_sphere` is not True, False or None; `labels` is no mapping from names.
            ValueError: this is a difference, and Prometheus makes differences itself; or a label's
                name is not a name, or one of ours.
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
