"""One shard of a batch: what it holds from its forward to its backward, and where it runs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction

from torch_spheres import _compat
from torch_spheres.context import CallerContext
from torch_spheres.nesting import Nesting, unflatten
from torch_spheres.phases import phase
from torch_spheres.random import ShardRandom, current_shard
from torch_spheres.replica import Buffer, Replica

if TYPE_CHECKING:
    from torch_spheres.shards import Call

__all__ = ["Shard", "in_shard"]

# torch.compile traces when compiled code meets something new, and must not in two threads at once.
_compiling = threading.RLock()
_NOTHING = contextlib.nullcontext()


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

    def rebuild(self) -> Any:
        """What the module returned."""
        assert self.nesting is not None
        return unflatten(self.outputs, self.nesting)

    def backward(
        self, roots: list[Tensor], grads: list[Tensor], keep: bool = False
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Gradients of the roots with respect to `params`, and to `inputs`."""
        targets = [*self.params, *self.inputs]
        # (Some may have been frozen since the forward.)
        wanted = [t for t in targets if t.requires_grad]
        if not wanted:
            found: list[Tensor | None] = []
        elif self.random.reentrant:
            with self.replica.grads:  # another shard of this replica may be on its way as well
                torch.autograd.backward(roots, grads, retain_graph=keep)
                found = [t.grad for t in wanted]
                for t in wanted:
                    t.grad = None
        else:
            found = list(_compat.gradients(roots, grads, wanted, keep))
        rest = iter(found)
        all_found = [next(rest) if t.requires_grad else None for t in targets]
        return all_found[: len(self.params)], all_found[len(self.params) :]


@contextlib.contextmanager
def in_shard(
    call: Call, k: int, what: str, shard: Shard, context: CallerContext | None = None
) -> Iterator[None]:
    """A block in which a thread works for shard `k`: `what` says how, for profiles and errors.

    With the shard's random numbers, and the settings of the call or of another `context`.
    """
    begin, end = call.split.bounds[k]
    leaf = call.split.leaves[k]
    # Key of a compiled variant, whose first run is serialised.
    gate = call.compiled and (what, call.compiled, end - begin)
    first = gate is not None and gate not in shard.replica.warm
    name = f"SphereParallel shard {leaf} {what}"
    try:
        with (
            phase(call.crew.spheres, what, leaf),
            _compiling if first else _NOTHING,
            (context or call.context)(),
            _NOTHING if gate is None else _compat.static_shapes(),
            shard.random.active(),
            torch.profiler.record_function(name) if _compat.profiler_is_on() else _NOTHING,
        ):
            yield
    except Exception as error:
        if "Expected more than 1 value per channel" in str(error):
            error.add_note(
                "a shard has too few rows for batch norm to train: use larger batches (two rows "
                "for each of the leaves), and drop_last=True in the loader"
            )
        error.add_note(f"in the {what} of shard {leaf}, rows {begin} to {end - 1} of the batch")
        raise
    if first:
        shard.replica.warm.add(gate)


_checkpoint: Any = CheckpointFunction.forward


def _noticed_checkpoint(ctx: Any, *args: Any) -> Any:
    """Activation checkpointing with ``use_reentrant=True``, noticed by the shard it is in.

    Such a checkpoint runs a backward of its own inside the backward, which adds to ``.grad`` of the
    leaves it meets, whatever the outer backward was asked for. So the shard computes its gradients
    in the same way.
    """
    shard = current_shard()
    if isinstance(shard, ShardRandom):
        shard.reentrant = True
    return _checkpoint(ctx, *args)


CheckpointFunction.forward = staticmethod(_noticed_checkpoint)  # type: ignore[method-assign]
