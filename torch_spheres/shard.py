"""One shard of a batch: what it holds from its forward to its backward, and where it runs."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from torch_spheres import _compat
from torch_spheres.checkpoints import Checkpoints
from torch_spheres.context import CallerContext
from torch_spheres.nesting import Nesting, unflatten
from torch_spheres.random import ShardRandom
from torch_spheres.replica import Buffer, Replica

__all__ = ["InShard", "Shard"]

# torch.compile traces when compiled code meets something new, and must not in two threads at once.
_compiling = threading.RLock()


@dataclass
class Shard:
    """One shard from its forward to its backward."""

    random: ShardRandom
    replica: Replica
    outputs: list[Any] = field(default_factory=list)
    nesting: Nesting | None = None
    params: list[Tensor] = field(default_factory=list)  # the replica's, as the module's own
    inputs: list[Tensor] = field(default_factory=list)  # that require a gradient
    buffers: list[tuple[Buffer, Tensor | None]] = field(default_factory=list)
    checkpoints: Checkpoints = field(default_factory=Checkpoints)

    def rebuild(self) -> Any:
        """What the module returned."""
        assert self.nesting is not None
        return unflatten(self.outputs, self.nesting)

    def backward(
        self, roots: list[Tensor], grads: list[Tensor] | None = None, keep: bool = False
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Gradients of the roots with respect to `params`, and to `inputs`."""
        targets = [*self.params, *self.inputs]
        # (Some may have been frozen since the forward.)
        wanted = [t for t in targets if t.requires_grad]
        if not wanted:
            found: list[Tensor | None] = []
        elif self.checkpoints.reentrant:
            with self.replica.grads:  # another shard of this replica may be on its way as well
                torch.autograd.backward(roots, grads, retain_graph=keep)
                found = [t.grad for t in wanted]
                for t in wanted:
                    t.grad = None
        else:
            if grads is None:
                grads = [torch.ones_like(root) for root in roots]
            found = list(_compat.gradients(roots, grads, wanted, keep))
        rest = iter(found)
        all_found = [next(rest) if t.requires_grad else None for t in targets]
        return all_found[: len(self.params)], all_found[len(self.params) :]


class InShard:
    """A block in which a thread works for one shard.

    A class and not a generator, for speed: each of twelve shards enters it twice in a step.

    Args:
        shard: whose random numbers are drawn in the block.
        name: for profiles.
        place: for errors: the note on them says "in" this.
        context: what the caller has set.
        gate: for compiled code: what it has to have seen once before two threads may run it.
        traced: what has a trace show the block.
    """

    __slots__ = ("_compiled", "_context", "_gate", "_name", "_place", "_shard", "_stack", "_traced")

    def __init__(
        self,
        shard: Shard,
        name: str,
        place: str,
        context: CallerContext,
        gate: Any,
        traced: contextlib.AbstractContextManager[None],
    ) -> None:
        self._shard, self._name, self._place, self._context = shard, name, place, context
        self._traced = traced
        self._compiled = gate is not None
        self._gate = gate if gate not in shard.replica.warm else None

    def __enter__(self) -> None:
        self._traced.__enter__()
        with contextlib.ExitStack() as stack:
            if self._gate is not None:
                stack.enter_context(_compiling)
            stack.enter_context(self._context())
            if self._compiled:
                stack.enter_context(_compat.static_shapes())
            stack.enter_context(self._shard.random.active())
            stack.enter_context(self._shard.checkpoints.noticed())
            if _compat.profiler_is_on():
                stack.enter_context(torch.profiler.record_function(self._name))
            self._stack = stack.pop_all()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, traceback)
        self._traced.__exit__(kind, error, traceback)
        if error is None and self._gate is not None:
            self._shard.replica.warm.add(self._gate)
        elif isinstance(error, Exception):
            error.add_note(f"in {self._place}")
