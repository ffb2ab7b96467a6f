"""How `SphereParallel` chooses its way: it measures a few and keeps the fastest.

With ``reproducible=True`` they differ in nothing but who runs the shards, so that the choice shows
in no bit; with ``reproducible=False`` the bare module on the whole batch is one of them.

A way (`Plan`) is measured over whole calls, forward and backward, in blocks of three steps, of
which the first does not count: it finds the caches and the memory of the way before. All ways that
are worth a try have a block, those not far from the best a second, and those close to it a third.
So it takes 6 to 45 steps in which the training goes on as ever. Calls that are checked closely take
longer and do not count, of which there are at most 8 more.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torch_spheres import _compat

__all__ = [
    "Plan", "Trial", "Tuner", "Tuners", "all_ways", "lean_ways", "reproducible_ways",
    "waiting_ways",
]  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """One way to run a batch."""

    shards: int  # 1 without workers: the bare module gets the whole batch
    workers: int  # spheres at once, each with one intra-op thread; 0: the calling thread, with all
    limit: float = float("inf")  # seconds: not worth a try if another way took longer

    @property
    def name(self) -> str:
        """As users see it."""
        shards = "1 shard" if self.shards == 1 else f"{self.shards} shards"
        if self.workers == 0:
            what = "whole batch" if self.shards == 1 else f"{shards} in turn"
            return f"{what}, intra-op threads"
        return f"{shards} on {self.workers} sphere{'s' if self.workers > 1 else ''}"


# Where twelve shards take longer than this there is enough to do for more than one sphere: what
# speaks for one alone are the hand-overs of Python's GIL between tiny operators.
_TINY = 0.05


def reproducible_ways(leaves: int, concurrency: int) -> list[Plan]:
    """Ways that differ in nothing but time: the same shards, each with one intra-op thread.

    Without concurrency, on an accelerator: one after another.
    """
    if concurrency == 0:
        return [Plan(leaves, 0)]
    workers = min(concurrency, leaves)
    ways = [Plan(leaves, workers)]
    return ways if workers == 1 else [*ways, Plan(leaves, 1, _TINY)]


def waiting_ways(leaves: int, concurrency: int) -> list[Plan]:
    """The way in which shards can wait for each other: each on a leaf of its own."""
    return [Plan(leaves, min(concurrency, leaves))]


def all_ways(leaves: int, concurrency: int) -> list[Plan]:
    """Ways that may differ in bits; first the one that torch would go."""
    plans = [Plan(1, 0), Plan(max(leaves, 12), 0)]
    if concurrency == 0:
        return plans
    if 1 < concurrency < leaves:
        plans.append(Plan(concurrency, concurrency))
    return [*plans, *(plan for plan in reproducible_ways(leaves, concurrency) if leaves > 1)]


def lean_ways(leaves: int, concurrency: int) -> list[Plan]:
    """Of `all_ways` those with few activations alive: small shards, as many as can run."""
    in_turn = Plan(max(leaves, 12), 0)
    return [in_turn, *(p for p in reproducible_ways(leaves, concurrency) if p != in_turn)]


@dataclass
class _Record:
    plan: Plan
    costs: list[float] = field(default_factory=list)  # seconds per row, of each step that counts
    seconds: float = 0.0  # the last step's

    @property
    def cost(self) -> float:
        """The middle of the faster half, since others on the machine only make it slower."""
        faster = sorted(self.costs)[: (len(self.costs) + 1) // 2]
        return statistics.median(faster)


class Tuner:
    """Chooses the plan of each call.   Any thread."""

    _STEPS = 3  # of a block; the first of them does not count
    # In later rounds are those that took at most so much of the fastest's time. (One block alone is
    # easily a third too slow, where others have the machine for a few seconds.)
    _CLOSE_TO_BEST = (1.4, 1.2)
    _CLOSE = 8  # calls at most that do not count because they were checked closely

    def __init__(self, plans: Sequence[Plan]) -> None:
        self._lock = threading.Lock()
        self._records = [_Record(plan) for plan in plans]
        self._queue = [*self._records]  # those that have a block in this round still to come
        self._step = 0
        self._round = 1
        self.chosen: Plan | None = plans[0] if len(plans) == 1 else None
        self._close = 0

    @property
    def costs(self) -> dict[str, float]:
        """What each way took that has been tried, in seconds per row of the batch."""
        with self._lock:
            return {r.plan.name: r.cost for r in self._records if r.costs}

    def trial(self, rows: int) -> Trial | None:
        """The next measurement; None once the choice has been made."""
        with self._lock:
            return Trial(self, self._queue[0].plan, rows) if self.chosen is None else None

    def passes_over(self) -> bool:
        """Whether a call that is checked closely does not count, since not all of them are."""
        with self._lock:
            self._close += 1
            return self._close <= self._CLOSE

    def record(self, plan: Plan, seconds: float, rows: int) -> None:
        """A measurement's result."""
        with self._lock:
            if self.chosen is not None or self._queue[0].plan is not plan:
                return  # of calls that overlap, the first counts
            current = self._queue[0]
            current.seconds = seconds
            self._step += 1
            if self._step > 1:
                current.costs.append(seconds / rows)
            if self._step < self._STEPS:
                return
            self._step = 0
            self._queue.pop(0)
            fastest = min(r.seconds for r in self._records if r.costs)
            self._queue = [r for r in self._queue if fastest < r.plan.limit]
            if not self._queue:
                self._end_round()

    def _end_round(self) -> None:
        tried = [r for r in self._records if r.costs]
        best = min(tried, key=lambda r: r.cost)
        if self._round <= len(self._CLOSE_TO_BEST):
            most = self._CLOSE_TO_BEST[self._round - 1] * best.cost
            self._queue = [r for r in tried if r.cost <= most]
        if len(self._queue) <= 1:
            self.chosen = best.plan
        self._round += 1


def _now() -> float:
    """Seconds, once what an accelerator has been given so far is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


class Trial:
    """One call that is being measured: its forward, and its backward if there is one.

    Attributes:
        closely: whether the call is checked closely, which takes longer: then it does not count.
    """

    closely = False

    def __init__(self, tuner: Tuner, plan: Plan, rows: int) -> None:
        self._tuner, self.plan, self._rows = tuner, plan, rows
        self._since = _now()
        self._forward = 0.0

    def forward_done(self, outputs: Sequence[object]) -> None:
        """The measurement ends here if nothing is differentiable, else with the backward."""
        self._forward = _now() - self._since
        tracked = [o for o in outputs if isinstance(o, Tensor) and o.requires_grad]
        if not tracked:
            self._end(self._forward)
            return
        begun = False

        def backward_begins(_: Tensor) -> None:
            nonlocal begun
            if not begun:
                begun = True
                self._since = _now()
                # Called when all of this backward is done, with .grad complete.
                _compat.after_backward(self.done)

        for output in tracked:
            output.register_hook(backward_begins)

    def done(self) -> None:
        """The end of the backward, or of all."""
        self._end(self._forward + _now() - self._since)

    def _end(self, seconds: float) -> None:
        if not (self.closely and self._tuner.passes_over()):
            self._tuner.record(self.plan, seconds, self._rows)


class Tuners:
    """A tuner for each kind of call: training or not, by size, ..."""

    def __init__(self) -> None:
        self._tuners: dict[Hashable, Tuner] = {}
        self._lock = threading.Lock()
        self.latest: Tuner | None = None  # of calls with gradients

    def of(self, kind: Hashable, plans: Callable[[], list[Plan]]) -> Tuner:
        """The tuner for a kind of calls; those with gradients are apart from those without."""
        grad = torch.is_grad_enabled()
        key = (grad, kind)
        with self._lock:
            tuner = self._tuners.get(key)
            if tuner is None:
                tuner = self._tuners[key] = Tuner(plans())
            if grad:
                self.latest = tuner
            return tuner
