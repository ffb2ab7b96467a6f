"""What a display is made of: the totals of each kissing sphere at one moment, and their rates."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch_spheres._core import State, Topology

if TYPE_CHECKING:
    from torch_spheres.system import KissingSpheres

__all__ = ["Rates", "Reading", "Rows", "SubtreeTotals"]

_STATES = tuple(State)
# What a subtree is said to do: the first of these that one of its spheres does.
_TELLING = (
    State.PROCESSING,
    State.ACCUMULATING,
    State.WAITING,
    State.READY,
    State.IDLE,
    State.TERMINATING,
)


_lock = threading.RLock()  # a signal's handler may count while its thread does


class Rows:
    """How many samples the spheres have had to do with; counted from any thread.

    Wrapped loaders count the rows that they hand out. Once the user has told a number (`tell`,
    `advance`), it is the user's that counts.
    """

    def __init__(self) -> None:
        self._loaded = 0
        self._told: int | None = None

    def loaded(self, rows: int) -> None:
        """A loader has handed out a batch."""
        with _lock:
            self._loaded += rows

    def advance(self, rows: int) -> None:
        """The user has done so many more."""
        with _lock:
            self._told = (self._told or 0) + rows

    def tell(self, rows: int) -> None:
        """The user has done so many in all."""
        with _lock:
            self._told = rows

    @property
    def value(self) -> int | None:
        """Samples so far; None where nobody knows."""
        told = self._told
        return (self._loaded or None) if told is None else told


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()  # the parent's may be held by a thread that is not here


os.register_at_fork(after_in_child=_after_fork)


@dataclass(frozen=True, slots=True)
class SubtreeTotals:
    """A kissing sphere and all spheres below it, added up; the root's is of the root alone."""

    sphere: int
    """Id of the subtree's first sphere."""
    states: tuple[int, ...]
    """How many of its spheres are in each state, in the order of `State`."""
    items: int
    """Work items run, stolen ones included."""
    stolen: int
    """Of those, items that belonged to another sphere."""
    queued: int
    """Items that wait in the queues of its leaves."""
    busy_ns: int
    """Nanoseconds of work since `start()`, added up over its spheres."""

    @property
    def path(self) -> str:
        """``"root"``, ``"0"`` to ``"11"``."""
        return Topology.path_string(self.sphere)

    @property
    def spheres(self) -> int:
        """How many they are."""
        return sum(self.states)

    @property
    def state(self) -> tuple[State, int]:
        """The most telling state that one of its spheres is in, and how many are."""
        for state in _TELLING:
            if count := self.states[_STATES.index(state)]:
                return state, count
        return State.TERMINATING, 0


@dataclass(frozen=True, slots=True)
class Reading:
    """All of a `KissingSpheres` at one moment, small enough to be taken four times a second."""

    levels: int
    concurrency: int
    running: bool
    time_ns: int
    """When it was taken, by ``time.monotonic_ns()``."""
    elapsed_ns: int
    """Nanoseconds since `start()`, or between `start()` and `stop()`."""
    subtrees: tuple[SubtreeTotals, ...]
    """The root, then the kissing spheres if there are any."""
    samples: int | None
    """Rows so far; None where nobody knows."""

    @property
    def spheres(self) -> int:
        """1, 13, 157 or 1885."""
        return Topology(self.levels).total

    @property
    def leaves(self) -> int:
        """1, 12, 144 or 1728."""
        return Topology(self.levels).leaves

    @property
    def items(self) -> int:
        """Work items run by all spheres."""
        return sum(s.items for s in self.subtrees)

    @property
    def stolen(self) -> int:
        """Items that another sphere ran than the one they belonged to."""
        return sum(s.stolen for s in self.subtrees)

    @property
    def queued(self) -> int:
        """Items that wait."""
        return sum(s.queued for s in self.subtrees)

    @property
    def working(self) -> int:
        """Spheres that process or accumulate."""
        process, accumulate = map(_STATES.index, (State.PROCESSING, State.ACCUMULATING))
        return sum(s.states[process] + s.states[accumulate] for s in self.subtrees)

    @classmethod
    def of(cls, spheres: KissingSpheres) -> Reading:
        """Reads the counters now, from any thread, in a forked child too."""
        elapsed, subtrees = spheres._core.subtrees()
        return cls(
            levels=spheres.levels,
            concurrency=spheres.concurrency,
            running=spheres.running,
            time_ns=time.monotonic_ns(),
            elapsed_ns=elapsed,
            subtrees=tuple(SubtreeTotals(*subtree) for subtree in subtrees),
            samples=spheres._rows.value,
        )

    def to_json(self) -> list[Any]:
        """For `from_json`, in another process."""
        subtrees = [
            [s.sphere, s.states, s.items, s.stolen, s.queued, s.busy_ns] for s in self.subtrees
        ]
        return [
            self.levels,
            self.concurrency,
            self.running,
            self.time_ns,
            self.elapsed_ns,
            subtrees,
            self.samples,
        ]

    @classmethod
    def from_json(cls, values: Sequence[Any]) -> Reading:
        """What `to_json` gave.

        Raises:
            TypeError, ValueError: it did not come from there.
        """
        levels, concurrency, running, time_ns, elapsed_ns, subtrees, samples = values
        return cls(
            levels=int(levels),
            concurrency=int(concurrency),
            running=bool(running),
            time_ns=int(time_ns),
            elapsed_ns=int(elapsed_ns),
            subtrees=tuple(
                SubtreeTotals(int(sphere), tuple(map(int, states)), *map(int, figures))
                for sphere, states, *figures in subtrees
            ),
            samples=None if samples is None else int(samples),
        )


class Rates:
    """What has happened per second of late: between the newest reading and one a while before."""

    def __init__(self, seconds: float = 1.0) -> None:
        self._span_ns = seconds * 1e9
        self._readings: deque[Reading] = deque()
        self._first: Reading | None = None

    def add(self, reading: Reading) -> None:
        """A newer reading of the same spheres."""
        readings = self._readings
        readings.append(reading)
        self._first = self._first or reading
        while len(readings) > 2 and reading.time_ns - readings[1].time_ns >= self._span_ns:
            readings.popleft()

    def settle(self) -> None:
        """It is over: what is shown from here on is of the whole time since the first reading."""
        if self._first is not None and len(self._readings) > 1:
            self._readings = deque([self._first, self.latest])

    @property
    def latest(self) -> Reading:
        """The newest reading; there must have been one."""
        return self._readings[-1]

    @property
    def items(self) -> float:
        """Items per second; 0 before the second reading."""
        return self._per_second(self.latest.items - self._readings[0].items)

    @property
    def samples(self) -> float | None:
        """Samples per second; None where nobody knows."""
        now, before = self.latest.samples, self._readings[0].samples
        return None if now is None else self._per_second(now - (before or 0))

    def busy(self, index: int | None = None) -> float:
        """The share, 0 to 1, of what could have run that did: of a subtree by its index, or all.

        No more leaves run at once than `concurrency`, however many a subtree has. Before the second
        reading it is the share since `start()`.
        """
        now, before = self.latest, self._readings[0]
        span = now.time_ns - before.time_ns
        which = range(len(now.subtrees)) if index is None else [index]
        busy = sum(now.subtrees[i].busy_ns for i in which)
        if span <= 0 or before.elapsed_ns > now.elapsed_ns:  # no other one, or started anew
            span = now.elapsed_ns
        else:
            busy -= sum(before.subtrees[i].busy_ns for i in which)
        leaves = now.leaves
        if index is not None and len(now.subtrees) > 1:
            leaves = leaves // (len(now.subtrees) - 1) if index else 1
        could = span * min(now.concurrency, leaves)
        return min(1.0, max(0.0, busy / could)) if could > 0 else 0.0

    def _per_second(self, count: int) -> float:
        span = self.latest.time_ns - self._readings[0].time_ns
        return max(0.0, count / span * 1e9) if span > 0 else 0.0
