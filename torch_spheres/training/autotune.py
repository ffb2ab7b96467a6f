"""How `SphereParallel` chooses its way: it measures a few and keeps the fastest.

With ``reproducible=True`` they differ in nothing but who runs the shards, so that the choice shows
in no bit; with ``reproducible=False`` the bare module on the whole batch is one of them.

A way (`Plan`) is measured over whole calls, forward and backward, in blocks of three steps, of
which the first does not count: it finds the caches and the memory of the way before. All ways that
are worth a try have a block; those close to the best then have two more. So it takes 6 to 63 steps,
in which the training goes on as ever. Later some calls are timed as well: a way that has become
much slower than it was is measured anew, beside the others (see runtime/openmp.py for a cause).
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
from torch_spheres.runtime.openmp import start_openmp_threads

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
    keeps_openmp: bool = False  # the caller's OpenMP threads are not ended, see runtime/openmp.py

    @property
    def name(self) -> str:
        """As users see it."""
        shards = "1 shard" if self.shards == 1 else f"{self.shards} shards"
        if self.workers == 0:
            what = "whole batch" if self.shards == 1 else f"{shards} in turn"
            return f"{what}, intra-op threads"
        kept = ", OpenMP threads kept" if self.keeps_openmp else ""
        return f"{shards} on {self.workers} sphere{'s' if self.workers > 1 else ''}{kept}"


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
    ways = _with_and_without_openmp(leaves, workers)
    return ways if workers == 1 else [*ways, Plan(leaves, 1, _TINY)]


def waiting_ways(leaves: int, concurrency: int) -> list[Plan]:
    """Ways in which shards can wait for each other: each on a leaf of its own."""
    return _with_and_without_openmp(leaves, min(concurrency, leaves))


def _with_and_without_openmp(shards: int, workers: int) -> list[Plan]:
    if workers == 1:
        return [Plan(shards, 1)]
    return [Plan(shards, workers, keeps_openmp=True), Plan(shards, workers)]


def all_ways(leaves: int, concurrency: int) -> list[Plan]:
    """Ways that may differ in bits; first the one that torch would go."""
    plans = [Plan(1, 0), Plan(max(leaves, 12), 0)]
    if concurrency == 0:
        return plans
    if 1 < concurrency < leaves:
        plans += _with_and_without_openmp(concurrency, concurrency)
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
    _ROUNDS = 3
    _FINAL = 1.2  # in later rounds are those that took at most so much of the fastest's time
    _TIMED = 4  # one of so many calls is timed after the choice
    _SLOWER = 1.4  # times what the chosen way took: it has become slow
    _PATIENCE = 3  # timed calls in a row that have to be so slow
    _CALLS = 20  # between a choice and the next one; doubled with each

    def __init__(self, plans: Sequence[Plan]) -> None:
        self._lock = threading.Lock()
        self._records = [_Record(plan) for plan in plans]
        self._queue = [*self._records]  # those that have a block in this round still to come
        self._step = 0
        self._round = 1
        self.chosen: Plan | None = plans[0] if len(plans) == 1 else None
        # On an accelerator timing would have the caller wait for the device.
        self._watches = len(plans) > 1 and any(plan.workers for plan in plans)
        self._pause = self._CALLS
        self._calls = self._slow = 0  # calls since the choice; of those timed, the last slow ones
        self._chosen_cost = 0.0

    @property
    def costs(self) -> dict[str, float]:
        """What each way took that has been tried, in seconds per row of the batch."""
        with self._lock:
            return {r.plan.name: r.cost for r in self._records if r.costs}

    def trial(self, rows: int) -> Trial | None:
        """The next measurement; None for most calls once the choice has been made."""
        with self._lock:
            if self.chosen is None:
                return Trial(self, self._queue[0].plan, rows)
            self._calls += 1
            is_timed = self._watches and self._calls % self._TIMED == 0
            return Trial(self, self.chosen, rows) if is_timed else None

    def record(self, plan: Plan, seconds: float, rows: int) -> None:
        """A measurement's result."""
        with self._lock:
            if self.chosen is not None:
                if plan is self.chosen:
                    self._watch(seconds / rows)
                return
            if self._queue[0].plan is not plan:
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
        self._queue = [r for r in tried if r.cost <= self._FINAL * best.cost]
        if len(self._queue) == 1 or self._round == self._ROUNDS:
            self.chosen, self._chosen_cost = best.plan, best.cost
            self._calls = self._slow = 0
        self._round += 1

    def _watch(self, cost: float) -> None:
        """Has all ways measured anew if the chosen one has become slow."""
        self._slow = self._slow + 1 if cost > self._SLOWER * self._chosen_cost else 0
        if self._slow < self._PATIENCE or self._calls < self._pause:
            return
        self._pause *= 2
        self._records = [_Record(record.plan) for record in self._records]
        self._queue, self._step, self._round = [*self._records], 0, 1
        self.chosen = None


def _now() -> float:
    """Seconds, once what an accelerator has been given so far is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


class Trial:
    """One call that is being measured: its forward, and its backward if there is one."""

    def __init__(self, tuner: Tuner, plan: Plan, rows: int) -> None:
        self._tuner, self.plan, self._rows = tuner, plan, rows
        self._since = _now()
        self._forward = 0.0

    def forward_done(self, outputs: Sequence[object]) -> None:
        """The measurement ends here if nothing is differentiable, else with the backward."""
        self._forward = self._elapsed()
        tracked = [o for o in outputs if isinstance(o, Tensor) and o.requires_grad]
        if not tracked:
            self._tuner.record(self.plan, self._forward, self._rows)
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
        self._tuner.record(self.plan, self._forward + self._elapsed(), self._rows)

    def _elapsed(self) -> float:
        """Seconds since the forward, or the backward, began.

        OpenMP threads that were ended are made again, which the loss or the optimizer pays for.
        """
        if self.plan.workers > 1 and not self.plan.keeps_openmp:
            start_openmp_threads()
        return _now() - self._since


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
