"""Who runs the shards of a call, and in which context."""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import nn

from torch_spheres.distributed.group import Ranks
from torch_spheres.errors import StoppedError
from torch_spheres.runtime.caller_context import CallerContext, caller_context
from torch_spheres.runtime.openmp import openmp_threads_asleep
from torch_spheres.runtime.pool import SpherePool
from torch_spheres.training.autotune import Plan
from torch_spheres.training.shard_sums import ShardSums

__all__ = ["ShardExecutor"]

T = TypeVar("T")


@dataclass(frozen=True)
class ShardExecutor:
    """Runs a plan's shards on a pool, or on the calling thread.

    Attributes:
        together: the shards wait for each other, in layers that need all of them.
        make_shard_sums: only then: makes what a pass of so many shards waits at.
    """

    spheres: SpherePool
    plan: Plan
    together: bool = False
    make_shard_sums: Callable[[int], ShardSums] | None = None

    @property
    def concurrency(self) -> int:
        """How many shards are on their way at once, at most."""
        return self.plan.shards if self.together else max(1, self.plan.workers)

    def for_call(self, module: nn.Module, places: int, ranks: Ranks | None) -> ShardExecutor:
        """One that brings the shards of a call together, if they wait for each other."""
        if not self.together:
            return self
        sums = lambda count: ShardSums(self.spheres, module, places, count, ranks)  # noqa: E731
        return replace(self, make_shard_sums=sums)

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
        try:
            if self.plan.workers == 1:  # leaves other cores to whoever wants them
                return self._on_spheres(fn, count)
            with openmp_threads_asleep():
                return self._on_spheres(fn, count)
        except StoppedError as error:
            error.add_note(
                "a model runs its forward and its backward on the spheres that it was given: both "
                "belong inside their 'with' block, or before stop()"
            )
            raise

    def _on_spheres(self, fn: Callable[[int], T], count: int) -> list[T]:
        # Context variables are the caller's too: torch's compiler keeps its configuration in them.
        variables = contextvars.copy_context()
        if self.make_shard_sums is not None:

            def run_all(run: Callable[[int], Any]) -> list[Any]:
                return self.spheres.map(lambda k: variables.copy().run(run, k), range(count))

            return self.make_shard_sums(count).map(run_all, fn)
        if self.plan.workers == 1:
            one_item = lambda _: variables.run(lambda: [*map(fn, range(count))])  # noqa: E731
            return self.spheres.map(one_item, range(1))[0]
        return self.spheres.map(lambda k: variables.copy().run(fn, k), range(count))
