"""One call of a `SphereParallel` model: its shards' forward and backward, on the spheres."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from torch_spheres.context import caller_context
from torch_spheres.folding import GradientFold, rounded
from torch_spheres.nesting import Nesting, flatten, unflatten
from torch_spheres.random import CallRandom, ShardRandom
from torch_spheres.replica import Buffer, Replica, ReplicaPool
from torch_spheres.splitting import Split, aligned
from torch_spheres.system import KissingSpheres
from torch_spheres.tree import tree_sum
from torch_spheres.tuning import Plan

__all__ = ["Call", "Crew", "Shard"]

T = TypeVar("T")

# torch.compile traces when compiled code meets something new, and must not in two threads at once.
_compiling = threading.RLock()


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


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


def gradients_of(
    roots: Sequence[Tensor],
    targets: Sequence[Tensor],
    root_grads: Sequence[Tensor | None],
    keep: bool = False,
) -> tuple[Tensor | None, ...]:
    """`torch.autograd.grad` of roots and gradients that fit each other: spared its checks of that.

    They take as long as the engine itself needs for a small shard.
    """
    found: tuple[Tensor | None, ...] = torch.autograd.Variable._execution_engine.run_backward(
        tuple(roots),
        tuple(root_grads),
        keep_graph=keep,
        create_graph=False,
        inputs=tuple(targets),
        allow_unreachable=True,
        accumulate_grad=False,
    )
    return found


@dataclass(frozen=True)
class Crew:
    """Who runs a plan's shards."""

    spheres: KissingSpheres
    plan: Plan

    @property
    def concurrency(self) -> int:
        """How many shards run at once, at most."""
        return max(1, self.plan.workers)

    def map(self, fn: Callable[[int], T], count: int) -> list[T]:
        """``[fn(0), ..., fn(count - 1)]``; the first error stops the rest."""
        if self.plan.workers == 0:
            return [fn(k) for k in range(count)]
        if self.plan.workers == 1:
            return self.spheres.map(lambda _: [fn(k) for k in range(count)], range(1))[0]
        return self.spheres.map(fn, range(count))


class _InShard:
    """A block in which a thread works for one shard.

    A class and not a generator, for speed: twelve shards enter it twice in a step.
    """

    __slots__ = ("_active", "_call", "_compiling", "_k", "_record", "_settings", "_shard", "_what")

    def __init__(self, call: Call, k: int, what: str, shard: Shard) -> None:
        self._call, self._k, self._what, self._shard = call, k, what, shard

    def _warmth(self) -> Any:
        """What compiled code has to have seen before two threads may run it at once."""
        module = self._shard.replica.module
        size = self._call.split.sizes[self._k]
        return self._what, torch.is_grad_enabled(), module.training, size

    def __enter__(self) -> None:
        call = self._call
        self._compiling = call.compiled and self._warmth() not in self._shard.replica.warm
        if self._compiling:
            _compiling.acquire()
        self._settings = call.context()
        self._settings.__enter__()
        self._active = self._shard.random.active()
        self._active.__enter__()
        self._record = None
        if torch.autograd.profiler._is_profiler_enabled:
            name = f"SphereParallel shard {self._k} {self._what}"
            self._record = torch.profiler.record_function(name)
            self._record.__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._record is not None:
            self._record.__exit__(kind, error, traceback)
        self._active.__exit__(kind, error, traceback)
        self._settings.__exit__(kind, error, traceback)
        if self._compiling:
            _compiling.release()
            if error is None:
                self._shard.replica.warm.add(self._warmth())
        if isinstance(error, Exception):
            begin, end = self._call.split.bounds[self._k]
            error.add_note(
                f"in the {self._what} of shard {self._k}, rows {begin} to {end - 1} of the batch"
            )


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
        # The calling thread itself has all but the grad mode, which autograd takes away.
        grad = torch.is_grad_enabled()
        self.context: Callable[[], AbstractContextManager[Any]] = (
            (lambda: torch.set_grad_enabled(grad)) if crew.plan.workers == 0 else caller_context()
        )
        self.random = CallRandom()
        self.shards: list[Shard | None] = []
        self.nesting: Nesting | None = None  # of the outputs
        pool.follow(module)
        self.compiled = any(map(_is_compiled, module.modules()))
        self.trainable = [p for p in module.parameters() if p.requires_grad]
        self.differentiable = [
            i
            for i, value in enumerate(self.split.flat)
            if isinstance(value, Tensor) and value.requires_grad
        ]

    @property
    def inputs_with_grad(self) -> list[Tensor]:
        """Tensors among the arguments that require a gradient."""
        return [self.split.flat[i] for i in self.differentiable]

    def in_shard(self, k: int, what: str, shard: Shard) -> _InShard:
        """On a sphere's thread: the caller's settings and the shard's random numbers."""
        return _InShard(self, k, what, shard)

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
        self.merge_buffers(shards)
        self.check_random()
        return self._gather(shards)

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
            targets = [*shard.params, *shard.inputs]
            if not roots or not targets:
                return [None] * len(shard.params), [None] * len(shard.inputs)
            with self.in_shard(k, "backward", shard):
                found = gradients_of(roots, targets, root_grads, keep)
            return list(found[: len(shard.params)]), list(found[len(shard.params) :])

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
