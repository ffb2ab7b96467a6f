"""`Stats`: the figures of all spheres in a frozen snapshot, and differences of two snapshots.

`KissingSpheres.stats` makes them. What is derived from a whole `Stats` is in table.py, advice.py,
prometheus.py and tensorboard.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from torch_spheres.observe.advice import advice_on
from torch_spheres.observe.histogram import add_counts, quantile_ns
from torch_spheres.observe.sphere_stats import SphereStats
from torch_spheres.observe.table import counted, duration, format_stats

__all__ = ["Stats"]


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
    """The figures of each sphere, by id."""
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
        """Computes what happened from `before` to this snapshot.

        Args:
            before: an earlier snapshot of the same spheres.

        Returns:
            The difference, whose `is_difference` is True.

        Raises:
            ValueError: the two are of different spheres, in the wrong order, or differences.
        """
        if not isinstance(before, Stats):
            return NotImplemented
        _check_difference(self, before)
        return replace(
            self,
            spheres=tuple(a._since(b) for a, b in zip(self.spheres, before.spheres, strict=True)),
            begin_ns=before.time_ns,
            is_difference=True,
            cpu_ns=self.cpu_ns - before.cpu_ns,
        )

    def level(self, level: int) -> tuple[SphereStats, ...]:
        """Selects the spheres of one level.

        Args:
            level: 0 for the root.

        Returns:
            Their figures, by id; none if there is no such level.
        """
        return tuple(s for s in self.spheres if s.level == level)

    @property
    def leaves(self) -> tuple[SphereStats, ...]:
        """The spheres that run work: those of the last level, by id."""
        return self.level(self.spheres[-1].level)

    def total(self, field: Callable[[SphereStats], int]) -> int:
        """Adds a figure over all spheres, e.g. ``stats.total(lambda s: s.items_run)``.

        Args:
            field: called with each sphere's figures; returns what is added.

        Returns:
            The sum.
        """
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
        """Messages that spheres took out of their mailboxes, the runtime's and the users'."""
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
        """Reads a quantile of the item times from their histogram.

        Args:
            q: a share of the items, 0 to 1: 0.5 gives the median, 0.95 the 95th percentile.

        Returns:
            Seconds, off by less than a quarter of the true time, or by 64 ns if that is more; 0
            without items.

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
        """Says what to change.

        Best asked of a difference between two points of a loop, because in the figures since
        `start()` the program's own start counts as idle.

        Returns:
            At most three sentences, each with a figure as its reason; none if the spheres ran less
            than a second.
        """
        return advice_on(self)

    def to_prometheus(
        self, *, per_sphere: bool | None = None, labels: Mapping[str, str] | None = None
    ) -> str:
        """Formats the figures for Prometheus.

        `KissingSpheres.prometheus_collector` is for a program that Prometheus scrapes.

        Args:
            per_sphere: whether there is a line for each sphere, with labels ``level``, ``sphere``
                and ``path``, or one for each level. None: for each of up to 13 spheres. Item times
                are one histogram either way.
            labels: more labels for every line, to tell several `KissingSpheres` apart.

        Returns:
            Prometheus' text format, ``text/plain; version=0.0.4``.

        Raises:
            ImportError: prometheus_client is missing.
            TypeError: `per_sphere` is not True, False or None; `labels` is no mapping from strings.
            ValueError: this is a difference, and Prometheus makes differences itself; or a label
                has no valid name, or one that is used already.
        """
        from torch_spheres.observe.prometheus import page

        return page(self, per_sphere, labels)

    def __str__(self) -> str:
        return format_stats(self)

    def __repr__(self) -> str:
        what = "Difference of two Stats" if self.is_difference else "Stats"
        return (
            f"<{what} of {counted(len(self), 'sphere')}: {counted(self.items_run, 'item')}, "
            f"{self.items_stolen:,} stolen, in {duration(self.elapsed)}; print() shows the table>"
        )


def _check_difference(after: Stats, before: Stats) -> None:
    """Raises a ValueError if the two have no difference."""
    if (after.origin, len(after)) != (before.origin, len(before)):
        raise ValueError(
            "the two snapshots are of different spheres: "
            f"{len(after)} of KissingSpheres number {after.origin}, "
            f"{len(before)} of number {before.origin}"
        )
    if after.time_ns < before.time_ns:
        raise ValueError(
            f"the snapshot to take away was taken {(before.time_ns - after.time_ns) / 1e9:.3f} "
            "s after the other: write later - earlier"
        )
    if after.is_difference or before.is_difference:
        raise ValueError("differences have no differences; subtract the snapshots themselves")
