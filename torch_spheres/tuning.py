"""What ``reproducible=False`` does: measures a few ways to run a batch, and keeps the fastest.

A way (`Plan`) is measured over whole calls, forward and backward, in blocks of three steps, of
which the first does not count: it finds the caches and the memory of the way before. All ways have
a block; those close to the best then have two more. So it takes some 12 to 30 steps, in which the
training goes on as ever.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Plan", "Trial", "Tuner", "Tuners", "candidates"]


@dataclass(frozen=True)
class Plan:
    """One way to run a batch."""

    name: str
    shards: int  # 1: the bare module gets the whole batch
    alone: bool  # run by the calling thread with all its intra-op threads, not by the spheres


def candidates(leaves: int, concurrency: int, whole: bool = True) -> list[Plan]:
    """The ways worth trying, the one that torch would go first.

    Args:
        leaves: shards of the reproducible way.
        concurrency: spheres that run at once.
        whole: whether the batch may be run whole, or in as few shards as there are spheres; it
            takes the memory of the whole batch's activations.
    """
    plans = [Plan("whole batch, intra-op threads", 1, alone=True)] if whole else []
    many = max(leaves, 12)
    plans.append(Plan(f"{many} shards in turn, intra-op threads", many, alone=True))
    counts = {leaves, min(concurrency, leaves)} if whole else {leaves}
    plans += [
        Plan(f"{count} shards on {min(count, concurrency)} spheres", count, alone=False)
        for count in sorted(counts - {1})
    ]
    return plans


@dataclass
class _Record:
    plan: Plan
    costs: list[float] = field(default_factory=list)  # seconds per row, of each step that counts

    @property
    def cost(self) -> float:
        """The middle of the faster half, since others on the machine only make it slower."""
        faster = sorted(self.costs)[: (len(self.costs) + 1) // 2]
        return statistics.median(faster)


class Tuner:
    """Chooses the plan of each call.   Any thread."""

    _STEPS = 3  # of a block; the first of them does not count
    _ROUNDS = 3
    _FINAL = 1.2  # in later rounds are those that took at most so much of the fastest's time

    def __init__(self, plans: Sequence[Plan]) -> None:
        self._lock = threading.Lock()
        self._records = [_Record(plan) for plan in plans]
        self._queue = [*self._records]  # those that have a block in this round still to come
        self._step = 0
        self._round = 1
        self.chosen: Plan | None = plans[0] if len(plans) == 1 else None

    @property
    def costs(self) -> dict[str, float]:
        """What each way took that has been tried, in seconds per row of the batch."""
        with self._lock:
            return {r.plan.name: r.cost for r in self._records if r.costs}

    def trial(self, rows: int) -> Trial | None:
        """The next measurement; None when the choice has been made."""
        with self._lock:
            return None if self.chosen is not None else Trial(self, self._queue[0].plan, rows)

    def record(self, plan: Plan, cost: float) -> None:
        """A measurement's result, in seconds per row."""
        with self._lock:
            if self.chosen is not None or self._queue[0].plan is not plan:
                return  # of calls that overlap, the first counts
            current = self._queue[0]
            self._step += 1
            if self._step > 1:
                current.costs.append(cost)
            if self._step == self._STEPS:
                self._step = 0
                self._queue.pop(0)
                if not self._queue:
                    self._end_round()

    def _end_round(self) -> None:
        best = min(self._records, key=lambda r: r.cost)
        self._queue = [r for r in self._records if r.cost <= self._FINAL * best.cost]
        if len(self._queue) == 1 or self._round == self._ROUNDS:
            self.chosen = best.plan
        self._round += 1


class Trial:
    """One call that is being measured: its forward, and its backward if there is one."""

    def __init__(self, tuner: Tuner, plan: Plan, rows: int) -> None:
        self._tuner, self.plan, self._rows = tuner, plan, rows
        self._since = time.perf_counter()
        self._forward = 0.0

    def forward_done(self, outputs: Sequence[object]) -> None:
        """The measurement ends here if nothing is differentiable, else with the backward."""
        self._forward = time.perf_counter() - self._since
        tracked = [o for o in outputs if isinstance(o, Tensor) and o.requires_grad]
        if not tracked:
            self._tuner.record(self.plan, self._forward / self._rows)
            return
        begun = False

        def backward_begins(_: Tensor) -> None:
            nonlocal begun
            if not begun:
                begun = True
                self._since = time.perf_counter()
                # Called when all of this backward is done, with .grad complete.
                torch.autograd.Variable._execution_engine.queue_callback(self.done)

        for output in tracked:
            output.register_hook(backward_begins)

    def done(self) -> None:
        """The end of the backward, or of all."""
        elapsed = self._forward + time.perf_counter() - self._since
        self._tuner.record(self.plan, elapsed / self._rows)


class Tuners:
    """A tuner for each kind of call: with gradients or without, training or not, by size."""

    def __init__(self, leaves: int, concurrency: int) -> None:
        self._leaves, self._concurrency = leaves, concurrency
        self._tuners: dict[Hashable, Tuner] = {}
        self._lock = threading.Lock()
        self.latest: Tuner | None = None  # of calls with gradients

    def of(self, rows: int, training: bool, whole: bool = True) -> Tuner:
        """The tuner for calls of about so many rows (within a factor of two)."""
        grad = torch.is_grad_enabled()
        key = (rows.bit_length(), grad, training, whole)
        with self._lock:
            tuner = self._tuners.get(key)
            if tuner is None:
                tuner = Tuner(candidates(self._leaves, self._concurrency, whole))
                self._tuners[key] = tuner
            if grad:
                self.latest = tuner
            return tuner
