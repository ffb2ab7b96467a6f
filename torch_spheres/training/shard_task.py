"""One shard of a batch: what it holds from its forward to its backward, and where it runs."""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

from torch_spheres import _compat
from torch_spheres.runtime.caller_context import CallerContext
from torch_spheres.runtime.rng import ShardRandom, current_shard
from torch_spheres.runtime.trace_hooks import phase_since
from torch_spheres.training.batch_split import Split, without_dim
from torch_spheres.training.graph_leaves import ShardGraph
from torch_spheres.training.pytree import Nesting, flatten, unflatten
from torch_spheres.training.replica import Buffer, Replica

if TYPE_CHECKING:
    from torch_spheres.training.sharded_call import ShardedCall

__all__ = ["Shard", "compiled_variant", "in_shard"]

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
    shares_leaves: bool = False  # with other shards, beside the replica's
    inputs: list[Tensor] = field(default_factory=list)  # that require a gradient
    buffers: list[tuple[Buffer, Tensor | None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        replica, inputs = self.replica, self.inputs  # (the shard itself would be a cycle)
        self.random.own_leaves = lambda: {*replica.leaves, *map(id, inputs)}
        self.random.number_of = replica.number_of

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
            if self.shares_leaves:
                raise RuntimeError(_CHECKPOINT)
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


class in_shard:  # noqa: N801 - used as a function is
    """A block in which a thread works for shard `k`: `what` says how, for profiles and errors.

    With the shard's random numbers, and the settings of the call or of another `context`. (A
    generator as a context takes longer, and every shard has two or three of these.)
    """

    __slots__ = ("_begin", "_call", "_entered", "_first", "_gate", "_k", "_shard", "_what")

    def __init__(
        self,
        call: ShardedCall,
        k: int,
        what: str,
        shard: Shard,
        context: CallerContext | None = None,
    ) -> None:
        self._call, self._k, self._what, self._shard = call, k, what, shard
        begin, end = call.split.bounds[k]
        # Key of a compiled variant, whose first run is serialised.
        self._gate = call.compiled and (what, call.compiled, end - begin)
        self._first = self._gate is not None and self._gate not in shard.replica.compiled_variants
        self._entered: list[Any] = [(context or call.context)(), shard.random.active()]
        if self._gate is not None:
            self._entered.append(_compat.static_shapes())
        if self._first:
            self._entered.insert(0, _compiling)
        if _compat.profiler_is_on():
            name = f"SphereParallel shard {call.split.leaves[k]} {what}"
            self._entered.append(torch.profiler.record_function(name))

    def __enter__(self) -> None:
        self._begin = time.monotonic_ns()
        for i, context in enumerate(self._entered):
            try:
                context.__enter__()
            except BaseException:
                del self._entered[i:]
                self._leave(*sys.exc_info())
                raise

    def _leave(self, *error: Any) -> None:
        """Leaves all of them, the last one first, also if one fails to."""
        if self._entered:
            try:
                self._entered.pop().__exit__(*error)
            finally:
                self._leave(*error)

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        try:
            self._leave(kind, error, traceback)
        finally:
            call, k = self._call, self._k
            leaf = call.split.leaves[k]
            phase_since(call.executor.spheres, self._what, leaf, self._begin)
            if isinstance(error, Exception):
                _explain(error, call, k, self._what)
        if self._first and error is None:
            self._shard.replica.compiled_variants.add(self._gate)


def compiled_variant(module: nn.Module, split: Split) -> tuple[Any, ...]:
    """What compiled code depends on, but for the rows: new ones are compiled anew."""
    leaves = zip(split.flat, split.dims, strict=True)
    shapes = [
        (without_dim(v.shape, d), without_dim(v.stride(), d), v.dtype, v.requires_grad)
        for v, d in leaves
        if isinstance(v, Tensor)
    ]
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), module.training
    autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
    return (*modes, *autocast, *shapes)


def _explain(error: Exception, call: ShardedCall, k: int, what: str) -> None:
    """Adds notes to an error: what may be the matter, and where it was."""
    if "Expected more than 1 value per channel" in str(error):
        error.add_note(
            "a shard has too few rows for batch norm to train: use larger batches (two rows "
            "for each of the leaves), and drop_last=True in the loader"
        )
    if "backward through the graph a second time" in str(error):
        error.add_note(
            "the model, or the loss, computes with a tensor that was computed outside of it: "
            "all shards go back through that graph. Compute it inside"
        )
    begin, end = call.split.bounds[k]
    leaf = call.split.leaves[k]
    error.add_note(f"in the {what} of shard {leaf}, rows {begin} to {end - 1} of the batch")


_CHECKPOINT = (
    "the forward has a checkpoint with use_reentrant=True, which runs a backward of its own for "
    "all that it reaches, and it computes with tensors that are no parameters of registered layers "
    "(a layer in a list, a function that holds the original of a layer): all shards would write to "
    "their .grad. Use use_reentrant=False, or register the layer and reach it by way of self"
)
_checkpoint: Any = CheckpointFunction.forward


def _noticed_checkpoint(ctx: Any, run: Any, *args: Any) -> Any:
    """Activation checkpointing with ``use_reentrant=True``, noticed by the shard it is in.

    Such a checkpoint runs a backward of its own inside the backward, which adds to ``.grad`` of the
    leaves it meets, whatever the outer backward was asked for. So the shard computes its gradients
    in the same way.
    """
    shard = current_shard()
    if not isinstance(shard, ShardRandom):
        return _checkpoint(ctx, run, *args)
    shard.reentrant = True

    def looked_at(*values: Any) -> Any:
        outputs = run(*values)
        if torch.is_grad_enabled():  # it runs again, before its backward
            own = shard.own_leaves().union(map(id, values))
            if not own.issuperset(ShardGraph(flatten(outputs)[0]).leaves):
                raise RuntimeError(_CHECKPOINT)
        return outputs

    return _checkpoint(ctx, looked_at, *args)


CheckpointFunction.forward = staticmethod(_noticed_checkpoint)  # type: ignore[method-assign]
