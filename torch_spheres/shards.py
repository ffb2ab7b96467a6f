"""One call of a `SphereParallel` model: its shards' forward and backward, on the spheres."""

from __future__ import annotations

import contextvars
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.rnn import PackedSequence

from torch_spheres.context import CallerContext, caller_context
from torch_spheres.folding import GradientFold, rounded
from torch_spheres.intra_op import rest
from torch_spheres.nesting import Nesting, flatten
from torch_spheres.random import CallRandom, ShardRandom
from torch_spheres.replica import Replica, ReplicaPool
from torch_spheres.shard import InShard, Shard
from torch_spheres.splitting import Split, aligned
from torch_spheres.system import KissingSpheres
from torch_spheres.tree import tree_sum
from torch_spheres.tuning import Plan

__all__ = ["Call", "Crew", "is_compiled"]

T = TypeVar("T")


def _dimensions(value: Any) -> int | None:
    return value.dim() if isinstance(value, Tensor) else None


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return "None" if value is None else f"of type {type(value).__name__}"


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile was called on it, not on a part of it."""
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


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
        if self.plan.workers == 0:
            return [fn(k) for k in range(count)]
        # Context variables are the caller's too: torch's compiler keeps its configuration in them.
        ours = contextvars.copy_context()
        if self.plan.workers == 1:
            alone = self.spheres.map(lambda _: ours.run(lambda: [*map(fn, range(count))]), range(1))
            return alone[0]
        rest()
        return self.spheres.map(lambda k: ours.copy().run(fn, k), range(count))


class Call:
    """One call's split, its shards, and what has to be put together from them."""

    def __init__(
        self,
        module: nn.Module,
        pool: ReplicaPool,
        crew: Crew,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self.module, self.pool, self.crew = module, pool, crew
        self.split = Split((args, kwargs), crew.plan.shards)
        self.context = crew.context()
        self.random = CallRandom()
        self.shards: list[Shard | None] = []
        self.nesting: Nesting | None = None  # of the outputs
        pool.follow(module)
        self.compiled = self._signature() if any(map(is_compiled, module.modules())) else None
        self._versions = self._parameter_versions()
        self.trainable = [p for p in module.parameters() if p.requires_grad]
        self.differentiable = [
            i
            for i, value in enumerate(self.split.flat)
            if isinstance(value, Tensor) and value.requires_grad
        ]

    def _signature(self) -> tuple[Any, ...]:
        """What compiled code depends on, but for the rows: new ones are compiled anew."""
        tensors = [v for v in self.split.flat if isinstance(v, Tensor)]
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), self.module.training
        autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        shapes = [(v.shape[1:], v.stride()[1:], v.dtype, v.requires_grad) for v in tensors]
        return (*modes, *autocast, *shapes)

    @property
    def inputs_with_grad(self) -> list[Tensor]:
        """Tensors among the arguments that require a gradient."""
        return [self.split.flat[i] for i in self.differentiable]

    def in_shard(
        self, k: int, what: str, shard: Shard, context: CallerContext | None = None
    ) -> InShard:
        """On a sphere's thread: the caller's settings and the shard's random numbers.

        The settings are those of the call, unless others are given.
        """
        begin, end = self.split.bounds[k]
        name = f"SphereParallel shard {k} {what}"
        place = f"the {what} of shard {k}, rows {begin} to {end - 1} of the batch"
        gate = self.compiled and (what, self.compiled, end - begin)
        return InShard(shard, name, place, context or self.context, gate)

    # ---- forward ----

    def forward_shard(self, k: int, replica: Replica) -> Shard:
        """Runs one shard's forward in the calling thread's context, see `in_shard`."""
        shard = Shard(ShardRandom(self.random, k), replica)
        grad = torch.is_grad_enabled
        taken = replica.take_buffers()
        with self.in_shard(k, "forward", shard):
            values = [self.split.part(i, k) for i in range(len(self.split.flat))]
            for i in self.differentiable if grad() else ():
                values[i] = values[i].detach().requires_grad_()
                shard.inputs.append(values[i])
            args, kwargs = self.split.build(values)
            output = replica.module(*args, **kwargs)
        shard.outputs, shard.nesting = flatten(output)
        shard.buffers = [(buffer, buffer.changed_value()) for buffer in taken]
        shard.params = [mine for _, mine in replica.params if mine.requires_grad]
        return shard

    def run_forward(self) -> list[Any]:
        """All shards' forward on the spheres; the outputs put together, as flat leaves."""

        def run(k: int) -> Shard:
            replica = self.pool.borrow(self.module)
            try:
                return self.forward_shard(k, replica)
            finally:
                self.pool.give_back(replica)

        shards = self.crew.map(run, len(self.split.bounds))
        self.shards = list(shards)
        self.check_parameters()
        self.merge_buffers(shards)
        self.check_random()
        return self._gather(shards)

    def _parameter_versions(self) -> list[int]:
        parameters = self.module.parameters()
        return [0 if is_lazy(p) or p.is_inference() else p._version for p in parameters]

    def check_parameters(self) -> None:
        """Shards share the weights: what writes to one in a forward writes in every shard."""
        versions = self._parameter_versions()
        if versions == self._versions:
            return
        now = zip(self.module.named_parameters(), versions, self._versions, strict=True)
        names = [name for (name, _), after, before in now if after != before]
        raise RuntimeError(
            f"the module's forward wrote to its parameters {names}, which has happened once for "
            "each shard, and in several threads; make them buffers, whose new values "
            "SphereParallel averages over the shards, or update them outside of the forward"
        )

    def check_random(self) -> None:
        """Warns when random numbers were drawn that belong to no shard."""
        if self.random.missed_any():
            warnings.warn(
                "something drew random numbers from torch's default generator while the shards "
                "ran, but not through an operator that SphereParallel can key by shard (a custom "
                "C++ operator, a CUDA kernel with its own dropout, or another thread): the result "
                "is not reproducible. Draw with torch's own operators inside the module, or use "
                "torch.nn.attention.sdpa_kernel(SDPBackend.MATH)",
                RuntimeWarning,
                stacklevel=4,
            )

    def _gather(self, shards: Sequence[Shard]) -> list[Any]:
        first = shards[0]
        self.nesting = first.nesting
        for k, shard in enumerate(shards):
            if shard.nesting != first.nesting:
                raise ValueError(
                    f"the module returned {first.nesting} for shard 0, but {shard.nesting} for "
                    f"shard {k}: the outputs' structure must not depend on the rows"
                )
        with torch.no_grad():
            return [self._gather_output(i, shards) for i in range(len(first.outputs))]

    def _gather_output(self, i: int, shards: Sequence[Shard]) -> Any:
        values = [shard.outputs[i] for shard in shards]
        first = values[0]
        if any(isinstance(v, PackedSequence) for v in values):
            raise TypeError(
                "SphereParallel cannot put together a PackedSequence that the module returned; "
                "pad it inside the module (torch.nn.utils.rnn.pad_packed_sequence, total_length=)"
            )
        for k, value in enumerate(values):
            if _dimensions(value) != _dimensions(first):
                raise ValueError(
                    f"output {i} of the module is {_described(first)} for shard 0, but "
                    f"{_described(value)} for shard {k}: what the module returns must not depend "
                    "on the rows"
                )
        if not isinstance(first, Tensor):
            return first
        if first.dim() == 0:
            return self._mean(values)
        sizes = self.split.sizes
        times, rest = divmod(first.shape[0], sizes[0])
        for k, value in enumerate(values):
            if rest or value.shape[0] != times * sizes[k] or value.shape[1:] != first.shape[1:]:
                raise ValueError(
                    f"output {i} of shard {k} has shape {tuple(value.shape)} for {sizes[k]} rows "
                    f"(shard 0's: {tuple(first.shape)} for {sizes[0]}): SphereParallel puts "
                    "outputs together along the first dimension, which must be the batch's rows, "
                    "or a fixed number of rows for each; transpose it inside the module"
                )
        return torch.cat(values)

    def _mean(self, values: Sequence[Tensor]) -> Tensor:
        """Of the shards' scalars, weighted by their rows."""
        weighted = [v * w for v, w in zip(values, self.split.weights, strict=True)]
        total = tree_sum(self.padded(weighted))
        assert total is not None
        return total

    def padded(self, values: Sequence[Tensor | None]) -> list[Tensor | None]:
        """One place for each leaf: those without rows are absent."""
        return [*values, *([None] * (self.split.places - len(values)))]

    def merge_buffers(self, shards: Sequence[Shard]) -> None:
        """Of the buffers that changed, the mean over the shards; the first shard's if integer."""
        with torch.no_grad():
            for i, (buffer, _) in enumerate(shards[0].buffers):
                values = [shard.buffers[i][1] for shard in shards]
                if all(value is None for value in values):
                    continue
                target = buffer.source._buffers[buffer.name]
                assert target is not None
                # A shard that left the buffer alone has the value it was given.
                given = [buffer.given if v is None else v for v in values]
                if any(v.shape != target.shape for v in given):
                    raise ValueError(
                        f"buffer {buffer.name!r} of {type(buffer.source).__name__} was given "
                        "another shape while a shard ran; SphereParallel merges buffers by value"
                    )
                if target.is_floating_point() or target.is_complex():
                    total = tree_sum(self.padded(given))
                    assert total is not None
                    target.copy_(total / len(given))
                else:
                    target.copy_(given[0])

    # ---- backward ----

    def run_backward(self, grads: tuple[Tensor | None, ...]) -> list[Tensor | None]:
        """All shards' backward; gradients of `trainable`, then of `inputs_with_grad`."""
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        context = self.crew.context()  # now: an autocast block usually ends with the forward
        shards = self.shards
        if not shards:
            raise RuntimeError(
                "backward through SphereParallel a second time: the shards' graphs were freed; "
                "use backward(retain_graph=True) the first time, or call the model again"
            )
        if not keep:
            self.shards = []
        pieces = [self._cut_grad(g, i, shards) for i, g in enumerate(grads)]

        def backward(k: int) -> tuple[list[Tensor | None], list[Tensor | None]]:
            shard = shards[k]
            assert shard is not None
            if not keep:
                shards[k] = None  # frees the graph as soon as this shard is done
            roots, root_grads = [], []
            for output, cut in zip(shard.outputs, pieces, strict=True):
                if cut is not None and isinstance(output, Tensor) and output.requires_grad:
                    roots.append(output)
                    root_grads.append(cut[k])
            if not roots:
                return [None] * len(shard.params), [None] * len(shard.inputs)
            with self.in_shard(k, "backward", shard, context):
                return shard.backward(roots, root_grads, keep)

        sums, input_grads = self.fold(backward)
        gathered = [
            self.gather_input_grad(value, [g[i] for g in input_grads])
            for i, value in enumerate(self.inputs_with_grad)
        ]
        return [*sums, *gathered]

    def fold(
        self, work: Callable[[int], tuple[list[Tensor | None], list[Tensor | None]]]
    ) -> tuple[list[Tensor | None], list[list[Tensor | None]]]:
        """Runs ``work(k)`` for every shard; the sum of what it returns first, the rest by shard."""
        count = len(self.split.bounds)
        fold = GradientFold(self.split.places, range(count), self.crew.concurrency)
        rest: list[list[Tensor | None]] = [[] for _ in range(count)]

        def item(_: int) -> None:
            k = fold.begin()
            if k is None:
                return
            try:
                with torch.no_grad():
                    grads, rest[k] = work(k)
                    fold.add(k, grads)
            except BaseException:
                fold.fail()
                raise

        self.crew.map(item, count)
        with torch.no_grad():
            return rounded(fold.finish(self.crew.spheres), self.trainable), rest

    def _cut_grad(self, grad: Tensor | None, i: int, shards: list[Shard | None]) -> Any:
        if grad is None:
            return None
        if grad.dim() == 0:
            return [grad * weight for weight in self.split.weights]
        sizes = [0 if shard is None else shard.outputs[i].shape[0] for shard in shards]
        return [aligned(piece) for piece in grad.split(sizes)]

    def gather_input_grad(self, value: Tensor, parts: list[Tensor | None]) -> Tensor | None:
        """The gradient of an argument from those of its parts."""
        if all(part is None for part in parts):
            return None
        if value.dim() == 0:
            return tree_sum(self.padded(parts))
        filled = [
            torch.zeros_like(value[begin:end]) if part is None else part
            for (begin, end), part in zip(self.split.bounds, parts, strict=True)
        ]
        return torch.cat(filled)
