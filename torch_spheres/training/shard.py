"""`Shard`: what a shard holds from its forward to its backward, and how its forward is run.

Used by `ShardedCall` and `LossAndGradients`.
"""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torch_spheres import _compat
from torch_spheres.runtime.caller_context import CallerContext
from torch_spheres.runtime.rng import ShardRandom
from torch_spheres.runtime.thread_hooks import take_one_intra_op_thread
from torch_spheres.runtime.trace_hooks import phase_since
from torch_spheres.training.batch_split import Split, without_dim
from torch_spheres.training.change_detection import checksum, contents, version_of
from torch_spheres.training.module_copy import Buffer
from torch_spheres.training.pytree import Nesting, flatten_output, unflatten
from torch_spheres.training.reentrant_checkpoint import REFUSED
from torch_spheres.training.replica import Replica

if TYPE_CHECKING:
    from torch_spheres.training.sharded_call import ShardedCall

__all__ = ["Shard", "compiled_variant", "forward_shard", "in_shard"]

_compiling = threading.RLock()  # torch.compile must not trace in two threads at once


@dataclass
class Shard:
    """One shard from its forward to its backward.

    Attributes:
        random: its random numbers.
        replica: on which its forward ran.
        outputs: of the module, as flat leaves.
        nesting: structure of `outputs`.
        params: leaves whose gradients are wanted, see `ReachedTensors.targets`.
        shares_leaves: whether other shards' graphs have leaves of this one's.
        inputs: the shard's parts of arguments that require a gradient.
        buffers: each buffer, and the value that the forward left in it if it has changed.
    """

    random: ShardRandom
    replica: Replica
    outputs: list[Any] = field(default_factory=list)
    nesting: Nesting | None = None
    params: list[Tensor] = field(default_factory=list)
    shares_leaves: bool = False
    inputs: list[Tensor] = field(default_factory=list)
    buffers: list[tuple[Buffer, Tensor | None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        replica, inputs = self.replica, self.inputs  # a reference to the shard would be a cycle
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
        targets = [*self.params, *self.inputs]  # some may have been frozen since the forward
        wanted = [t for t in targets if t.requires_grad]
        if not wanted:
            found: list[Tensor | None] = []
        elif self.random.reentrant:
            if self.shares_leaves:
                raise RuntimeError(REFUSED)
            with self.replica.grads:  # another shard of this replica may run its backward
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
    """Context in which a thread works for shard `k`, with its random numbers and settings.

    A class is faster than a generator, and every shard enters two or three of these.

    Args:
        call: whose shard it is.
        k: number of the shard.
        what: ``"forward"``, ``"loss"`` or ``"backward"``, for profiles and errors.
        shard: the shard.
        context: settings of the caller's thread; those of the call by default.
    """

    __slots__ = ("_begin", "_call", "_contexts", "_first", "_gate", "_k", "_shard", "_what")

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
        self._contexts: list[Any] = [(context or call.context)(), shard.random.active()]
        if self._gate is not None:
            self._contexts.append(_compat.static_shapes())
        if self._first:
            self._contexts.insert(0, _compiling)
        if _compat.profiler_is_on():
            name = f"SphereParallel shard {call.split.numbers[k]} {what}"
            self._contexts.append(torch.profiler.record_function(name))

    def __enter__(self) -> None:
        self._begin = time.monotonic_ns()
        if torch.get_num_threads() != 1 and self._call.executor.plan.workers > 0:
            take_one_intra_op_thread()  # an earlier forward has set another number
        for i, context in enumerate(self._contexts):
            try:
                context.__enter__()
            except BaseException:
                del self._contexts[i:]
                self._exit_all(*sys.exc_info())
                raise

    def _exit_all(self, *error: Any) -> None:
        """Exits all contexts, the last one first, also if one raises."""
        if self._contexts:
            try:
                self._contexts.pop().__exit__(*error)
            finally:
                self._exit_all(*error)

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        try:
            self._exit_all(kind, error, traceback)
        finally:
            call, k = self._call, self._k
            number = call.split.numbers[k]
            phase_since(call.executor.spheres, self._what, number, self._begin)
            if isinstance(error, Exception):
                _add_notes(error, call, k, self._what)
        if self._first and error is None:
            self._shard.replica.compiled_variants.add(self._gate)


def forward_shard(call: ShardedCall, k: int, replica: Replica) -> Shard:
    """Runs the forward of the call's shard `k` on the calling thread, see `in_shard`.

    Raises:
        RuntimeError: the forward wrote in place to its arguments.
        Exception: any error of the module, with a note of how the arguments were cut.
    """
    shard = Shard(ShardRandom(call.random, call.split.numbers[k], call.split.leaves[k]), replica)
    grad = torch.is_grad_enabled
    taken = replica.begin_shard(call.large_buffers.has_copy)
    try:
        with in_shard(call, k, "forward", shard):
            values = call.split.parts(k)
            for i in call.differentiable if grad() else ():
                values[i] = values[i].detach().requires_grad_()
                shard.inputs.append(values[i])
            args, kwargs = call.split.arguments.build(values)
            before = contents(call.split.arguments.keys, (*args, *kwargs.values()))
            tensors = call.split.outside_objects(values)  # without caches, which forwards write to
            versions = [version_of(v) for v in tensors]
            sums = [checksum(v) for v in tensors] if call.closely else []
            called = replica.module.forward if call.replicas.calls_forward else replica.module
            output = called(*args, **kwargs)
            now = [checksum(v) for v in tensors] if call.closely else []
            if now != sums or versions != [version_of(v) for v in tensors]:
                raise RuntimeError(
                    "the module's forward wrote in place to its arguments, of which a shard "
                    "has a part or a copy: x = x.clone() first, or return what is new"
                )
            call.effects.compare_arguments(before)
    except Exception as error:
        error.add_note(call.split.described())
        raise
    shard.outputs, shard.nesting = flatten_output(output)
    call.effects.record_attributes(replica)
    shard.buffers = [(buffer, buffer.changed_value()) for buffer in taken]
    shard.params = call.reached.targets(replica)
    return shard


def compiled_variant(module: nn.Module, split: Split) -> tuple[Any, ...]:
    """What compiled code depends on beside the number of rows."""
    leaves = zip(split.flat, split.dims, strict=True)
    shapes = [
        (without_dim(v.shape, d), without_dim(v.stride(), d), v.dtype, v.requires_grad)
        for v, d in leaves
        if isinstance(v, Tensor)
    ]
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), module.training
    autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
    return (*modes, *autocast, *shapes)


def _add_notes(error: Exception, call: ShardedCall, k: int, what: str) -> None:
    """Adds notes to an error: its likely cause, and its shard."""
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
    number = call.split.numbers[k]
    error.add_note(f"in the {what} of shard {number}, rows {begin} to {end - 1} of the batch")
