"""The figures of a display: totals of each kissing sphere at one moment, and their rates."""

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
"""rich's style of each state; of several spheres the first that one of them is in is shown."""


class Totals(NamedTuple):
    """Figures of some spheres, added up."""

    states: tuple[int, ...]
    """How many of the spheres are in each state, in the order of `State`."""
    items: int
    """Work items run, stolen ones included."""
    stolen: int
    """Of those, items that belonged to another sphere."""
    queued: int
    """Items that wait in the queues of the leaves."""
    busy_ns: int
    """Nanoseconds of work since `start()`."""

    @property
    def state(self) -> State:
        """The state to show for all of them."""
        return next(s for s in STATE_STYLES if self.states[s.value])

    @property
    def state_words(self) -> str:
        """The state, and how many are in it where they are several."""
        if self.state is State.TERMINATING:
            return "stopped"
        word = self.state.name.lower()
        return f"{word} {self.states[self.state.value]:,}" if sum(self.states) > 1 else word

    @property
    def working(self) -> int:
        """How many process or accumulate."""
        return sum(self.states[s.value] for s in (State.PROCESSING, State.ACCUMULATING))


@dataclass(frozen=True, slots=True)
class Reading:
    """All of a `KissingSpheres` at one moment, small enough to be taken four times a second."""

    spheres: int
    leaves: int
    concurrency: int
    condition: str
    """``"running"``, ``"stopped"``, ``"not started"`` or ``"of another process"``."""
    time_ns: int
    """When it was taken, by ``time.monotonic_ns()``."""
    elapsed_ns: int
    """Nanoseconds since `start()`, or between `start()` and `stop()`."""
    subtrees: dict[str, Totals]
    """By path: of the root alone, then of each kissing sphere with all spheres below it."""
    total: Totals
    """Of all spheres."""
    samples: int | None
    """Rows so far; None where nobody knows."""

    @classmethod
    def of(cls, spheres: KissingSpheres) -> Reading:
        """Reads the counters now, from any thread, in a forked child too."""
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
        """How many spheres there are, and for how long they have run."""
        time = f" {timedelta(seconds=self.elapsed_ns // 10**9)}" if self.elapsed_ns else ""
        leaves = "1 leaf" if self.leaves == 1 else f"{self.leaves:,} leaves"
        return (
            f"{counted(self.spheres, 'sphere')}, {self.concurrency:,} of {leaves} at once, "
            f"{self.condition}{time}"
        )


@dataclass(frozen=True, slots=True)
class Rates:
    """What has happened per second between two readings of the same spheres, which may be one."""

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
        """The share, 0 to 1, of what could have run that did, of one subtree or of all spheres.

        No more leaves run at once than `concurrency`, however many a subtree has. With one reading
        it is the share since `start()`.
        """
        now, before = self.now, self.before
        ran, ran_before = (r.total if path is None else r.subtrees[path] for r in (now, before))
        span, busy_ns = now.time_ns - before.time_ns, ran.busy_ns - ran_before.busy_ns
        if span <= 0 or before.elapsed_ns > now.elapsed_ns:  # one reading, or started anew
            span, busy_ns = now.elapsed_ns, ran.busy_ns
        leaves = now.leaves
        if path is not None:
            leaves = 1 if path == "root" else leaves // (len(now.subtrees) - 1)
        could = span * min(now.concurrency, leaves)
        return min(1.0, max(0.0, busy_ns / could)) if could > 0 else 0.0

    def _per_second(self, count: int) -> float:
        span = self.now.time_ns - self.before.time_ns
        return max(0.0, count / span * 1e9) if span > 0 else 0.0

    # ---- in words ----

    @property
    def throughput(self) -> str:
        """Items and samples, and how many per second."""
        now = self.now
        items = f"{counted(now.total.items, 'item')} ({self.items:,.0f}/s)"
        if now.samples is None:
            return items
        return f"{items}, {counted(now.samples, 'sample')} ({self.samples:,.0f}/s)"

    @property
    def line(self) -> str:
        """Everything that matters in one line, for a log."""
        total = self.now.total
        return (
            f"{self.now.heading}: {self.throughput}, {total.stolen:,} stolen, "
            f"{total.queued:,} queued, {total.working:,} at work, {self.busy():.0%} busy"
        )

    @property
    def table(self) -> list[tuple[str, str, Totals, float]]:
        """Path, state, totals and busy share of each subtree, and of all spheres at the end."""
        now = self.now
        rows = [(path, t.state_words, t, self.busy(path)) for path, t in now.subtrees.items()]
        return [*rows, ("all", f"{now.total.working:,} at work", now.total, self.busy())]
