"""The figures of a live display: totals of each kissing sphere at one moment, and their rates.

`Live` takes readings and gives their `Rates` to one of the `displays`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple

from torch_spheres._core import State, Topology
from torch_spheres.observe.table import counted

if TYPE_CHECKING:
    from torch_spheres.spheres import KissingSpheres

__all__ = ["STATE_STYLES", "Rates", "Reading", "Totals"]

STATE_STYLES = {
    State.PROCESSING: "green",
    State.ACCUMULATING: "cyan",
    State.WAITING: "yellow",
    State.READY: "",
    State.IDLE: "dim",
    State.TERMINATING: "dim",
}
"""rich's style of each state. Several spheres are shown in the first state that one of them has."""


class Totals(NamedTuple):
    """Sums over some spheres."""

    states: tuple[int, ...]
    """How many of the spheres are in each state, in the order of `State`."""
    items: int
    """Work items run, stolen ones included."""
    stolen: int
    """Items run that belonged to another sphere."""
    queued: int
    """Items that wait in the leaves' queues."""
    busy_ns: int
    """Nanoseconds of work since `start()`."""

    @property
    def state(self) -> State:
        """The state to show for all of them."""
        return next(s for s in STATE_STYLES if self.states[s.value])

    @property
    def state_words(self) -> str:
        """The state in words; of several spheres with how many are in it."""
        if self.state is State.TERMINATING:
            return "stopped"
        word = self.state.name.lower()
        return f"{word} {self.states[self.state.value]:,}" if sum(self.states) > 1 else word

    @property
    def working(self) -> int:
        """How many spheres process or accumulate."""
        return sum(self.states[s.value] for s in (State.PROCESSING, State.ACCUMULATING))


@dataclass(frozen=True, slots=True)
class Reading:
    """A `KissingSpheres` at one moment; cheap enough to be taken four times a second."""

    spheres: int
    leaves: int
    concurrency: int
    condition: str
    """``"running"``, ``"stopped"``, ``"not started"`` or ``"of another process"``."""
    time_ns: int
    """``time.monotonic_ns()`` at that moment."""
    elapsed_ns: int
    """Nanoseconds since `start()`, or between `start()` and `stop()`."""
    subtrees: dict[str, Totals]
    """By path: the root alone, then each kissing sphere with all spheres below it."""
    total: Totals
    """All spheres."""
    samples: int | None
    """Rows so far; None if unknown."""

    @classmethod
    def of(cls, spheres: KissingSpheres) -> Reading:
        """Reads the counters now; works on any thread, and in a forked child."""
        elapsed, subtrees = spheres._read_subtrees()
        totals = {Topology.path_string(first): Totals(*figures) for first, *figures in subtrees}
        states, *figures = zip(*totals.values(), strict=True)
        state = "running" if spheres.running else "stopped" if spheres._starts else "not started"
        return cls(
            spheres=spheres.total_spheres,
            leaves=spheres.leaves,
            concurrency=spheres.concurrency,
            condition="of another process" if spheres._forked else state,
            time_ns=time.monotonic_ns(),
            elapsed_ns=elapsed,
            subtrees=totals,
            total=Totals(tuple(map(sum, zip(*states, strict=True))), *map(sum, figures)),
            samples=spheres._samples.value,
        )

    @property
    def heading(self) -> str:
        """The number of spheres, and how long they have run, in words."""
        time = f" {timedelta(seconds=self.elapsed_ns // 10**9)}" if self.elapsed_ns else ""
        leaves = "1 leaf" if self.leaves == 1 else f"{self.leaves:,} leaves"
        return (
            f"{counted(self.spheres, 'sphere')}, {self.concurrency:,} of {leaves} at once, "
            f"{self.condition}{time}"
        )


@dataclass(frozen=True, slots=True)
class Rates:
    """Figures per second between two readings of the same spheres (or the same reading twice)."""

    before: Reading
    now: Reading

    @property
    def items(self) -> float:
        """Items per second."""
        return self._per_second(self.now.total.items - self.before.total.items)

    @property
    def samples(self) -> float:
        """Samples per second."""
        return self._per_second((self.now.samples or 0) - (self.before.samples or 0))

    def busy(self, path: str | None = None) -> float:
        """Busy time as a share (0 to 1) of the most that `concurrency` allows.

        With one reading it is the share since `start()`.

        Args:
            path: of a subtree; None: all spheres.
        """
        now, before = self.now, self.before
        ran, ran_before = (r.total if path is None else r.subtrees[path] for r in (now, before))
        span, busy_ns = now.time_ns - before.time_ns, ran.busy_ns - ran_before.busy_ns
        if (
            span <= 0 or before.elapsed_ns > now.elapsed_ns
        ):  # one reading, or the spheres were started again
            span, busy_ns = now.elapsed_ns, ran.busy_ns
        leaves = now.leaves
        if path is not None:
            leaves = 1 if path == "root" else leaves // (len(now.subtrees) - 1)
        most = span * min(now.concurrency, leaves)
        return min(1.0, max(0.0, busy_ns / most)) if most > 0 else 0.0

    def _per_second(self, count: int) -> float:
        span = self.now.time_ns - self.before.time_ns
        return max(0.0, count / span * 1e9) if span > 0 else 0.0

    # ---- in words ----

    @property
    def throughput(self) -> str:
        """Items and samples in all and per second, in words."""
        now = self.now
        items = f"{counted(now.total.items, 'item')} ({self.items:,.0f}/s)"
        if now.samples is None:
            return items
        return f"{items}, {counted(now.samples, 'sample')} ({self.samples:,.0f}/s)"

    @property
    def line(self) -> str:
        """One line for a log."""
        total = self.now.total
        return (
            f"{self.now.heading}: {self.throughput}, {total.stolen:,} stolen, "
            f"{total.queued:,} queued, {total.working:,} at work, {self.busy():.0%} busy"
        )

    @property
    def table(self) -> list[tuple[str, str, Totals, float]]:
        """Path, state, totals and busy share of each subtree, and last of all spheres."""
        now = self.now
        rows = [(path, t.state_words, t, self.busy(path)) for path, t in now.subtrees.items()]
        return [*rows, ("all", f"{now.total.working:,} at work", now.total, self.busy())]
