"""Who runs the shards of a call, and in which context."""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from torch_spheres.context import CallerContext, caller_context
from torch_spheres.intra_op import rest
from torch_spheres.system import KissingSpheres
from torch_spheres.tuning import Plan

__all__ = ["Crew"]

T = TypeVar("T")


@dataclass(frozen=True)
class Crew:
    """Who runs a plan's shards."""

    spheres: KissingSpheres
    plan: Plan

    @property
    def concurrency(self) -> int:
        """How many shards run at once, at most."""
        return max(1, self.plan.workers)

    def context(self) -> CallerContext:
        """What the calling thread has set, to be set wherever the shards run."""
        if self.plan.workers > 0:
            return caller_context()
        grad = torch.is_grad_enabled()  # it keeps all but this, which autograd takes away
        return lambda: torch.set_grad_enabled(grad)

    def map(self, fn: Callable[[int], T], count: int) -> list[T]:
        """``[fn(0), ..., fn(count - 1)]``; the first error stops the rest."""
        if self.plan.workers == 0 or count == 0:
            return [fn(k) for k in range(count)]
        # Context variables are the caller's too: torch's compiler keeps its configuration in them.
        ours = contextvars.copy_context()
        if self.plan.workers == 1:
            alone = self.spheres.map(lambda _: ours.run(lambda: [*map(fn, range(count))]), range(1))
            return alone[0]
        rest()
        return self.spheres.map(lambda k: ours.copy().run(fn, k), range(count))
