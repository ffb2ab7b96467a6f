"""`SphereParallel`: forward and backward of a batch's shards, at once, on shared weights."""

from __future__ import annotations

import contextlib
import copy
import threading
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torch_spheres.replica import Buffer, Replica, caller_context
from torch_spheres.sampler import shard_bounds
from torch_spheres.system import KissingSpheres
from torch_spheres.tree import tree_sum, tree_sums

__all__ = ["SphereParallel"]

_ALIGNMENT = 64  # bytes; kernels choose their path by it, and so their bits


class SphereParallel(nn.Module):
    """Runs a module on the spheres: the rows of each batch are split over the leaves.

    Use it in place of the module; the loop stays as it is, and ``.grad`` is complete when
    ``backward()`` returns.

    Args:
        module: the model. Its parameters are shared by all shards, never copied; each of the at
            most ``spheres.concurrency`` running shards has its own copy of everything else.
        spheres: who runs the shards; None makes a `KissingSpheres` of two levels.
        reproducible: only True so far: shards are a fixed part of the batch, run with one intra-op
            thread each, and are summed in the fixed tree, so for one build of torch the bits of
            outputs, gradients, buffers and weights do not depend on ``spheres.concurrency`` nor on
            which thread ran what.

    Inputs: tensors whose first dimension is the batch's rows, anywhere in positional and keyword
    arguments, lists, tuples and dicts; tensors without dimensions and other objects go to every
    shard as they are. Rows are split as `torch.tensor_split` does; with fewer rows than leaves only
    so many shards run. Outputs: tensors with rows are put together again, in order; tensors without
    dimensions (a loss computed inside the model) are averaged, weighted by the shards' rows.

    Buffers: every shard starts from the same values; of those that changed, floating-point ones
    become the mean over the shards that ran (summed in the tree), others those of the first shard.

    What is random inside the module (dropout) is drawn from torch's global generator by whichever
    shard comes first: such a model trains, but not reproducibly; a warning says so once.

    Raises:
        TypeError: `module` is not an `nn.Module`, or `spheres` not a `KissingSpheres`.
        NotImplementedError: ``reproducible=False``.
    """

    def __init__(
        self,
        module: nn.Module,
        spheres: KissingSpheres | None = None,
        *,
        reproducible: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
        if spheres is None:
            spheres = KissingSpheres()
        elif not isinstance(spheres, KissingSpheres):
            raise TypeError(f"spheres must be a KissingSpheres, got {type(spheres).__name__}")
        if reproducible is not True:
            raise NotImplementedError(
                f"reproducible={reproducible!r} is not there yet; leave it True"
            )
        self.module = module
        self._spheres = spheres
        self._replicas: list[Replica] = []
        self._lock = threading.Lock()
        self.register_load_state_dict_pre_hook(_add_prefix)  # type: ignore[no-untyped-call]
        _warn_if_random(module)

    @property
    def spheres(self) -> KissingSpheres:
        """The hierarchy that runs the shards."""
        return self._spheres

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the shards; see the class for what is split and how outputs are put together."""
        call = _Call(self, args, kwargs)
        with self._lock:
            for replica in self._replicas:
                replica.follow(self.module)
        if not torch.is_grad_enabled():
            return call.rebuild(call.run_forward())
        params = [p for p in self.module.parameters() if p.requires_grad]
        inputs = call.inputs_with_grad()
        outputs = _OnSpheres.apply(call, len(params), *params, *inputs)  # type: ignore[no-untyped-call]
        return call.rebuild(list(outputs))

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """For gradient accumulation, as in DistributedDataParallel; changes nothing here.

        In one process there is nothing to synchronise: ``backward()`` always adds the whole batch's
        gradient to ``.grad``, inside this context and outside.
        """
        yield

    # The bare module's keys, so that checkpoints can be exchanged with it.

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The bare module's `state_dict`."""
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Loads a `state_dict` of the bare module or of a `SphereParallel` around it."""
        return self.module.load_state_dict(state_dict, strict, assign)

    def __deepcopy__(self, memo: dict[int, Any]) -> SphereParallel:
        return SphereParallel(copy.deepcopy(self.module, memo), self._spheres)

    def __reduce__(self) -> Any:
        raise TypeError(
            "SphereParallel cannot be pickled, since threads cannot; save model.state_dict(), or "
            "the bare model.module"
        )

    def _borrow(self) -> Replica:
        with self._lock:
            if self._replicas:
                return self._replicas.pop()
        return Replica(self.module)

    def _give_back(self, replica: Replica) -> None:
        with self._lock:
            self._replicas.append(replica)


@dataclass
class _Shard:
    """One shard between its forward and its backward."""

    outputs: list[Any]
    params: list[Tensor]
    inputs: list[Tensor]
    buffers: list[tuple[Buffer, Tensor | None]]


class _Call:
    """One call of the model: its split over the leaves, and the shards' results."""

    def __init__(
        self, parallel: SphereParallel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.parallel = parallel
        self.leaves = parallel.spheres.leaves
        self.flat, self.spec = pytree.tree_flatten((args, kwargs))
        self.rows = self._count_rows()
        bounds = shard_bounds(self.rows, self.leaves)
        self.bounds = [b for b in bounds if b[1] > b[0]]
        self.shards: list[_Shard | None] = []
        self.context = caller_context()

    def _count_rows(self) -> int:
        rows = None
        for value in self.flat:
            if not isinstance(value, Tensor) or value.dim() == 0:
                continue
            if rows is None:
                rows = value.shape[0]
            elif value.shape[0] != rows:
                raise ValueError(
                    "SphereParallel splits every tensor argument along its first dimension, but "
                    f"one has {rows} rows and another, of shape {tuple(value.shape)}, "
                    f"{value.shape[0]}; make a tensor that is not part of the batch an attribute "
                    "or a buffer of the module"
                )
        if rows is None:
            raise ValueError(
                "SphereParallel found no tensor with rows among the arguments to split over the "
                "spheres; call model.module(...) instead"
            )
        if rows == 0:
            raise ValueError("SphereParallel got a batch of 0 rows")
        return rows

    def inputs_with_grad(self) -> list[Tensor]:
        return [t for t in self.flat if self._needs_grad(t)]

    @staticmethod
    def _needs_grad(value: Any) -> bool:
        return isinstance(value, Tensor) and value.requires_grad

    # ---- forward ----

    def run_forward(self) -> list[Any]:
        # The shards are cut here, on one thread: autograd does not see it, and views are cheap.
        with torch.no_grad():
            parts = [self._cut(value) for value in self.flat]
        self.shards = self.parallel.spheres.map(
            lambda k: self._forward_shard(k, [part[k] for part in parts]), range(len(self.bounds))
        )
        done = [shard for shard in self.shards if shard is not None]
        self._merge_buffers(done)
        return self._gather([shard.outputs for shard in done])

    def _cut(self, value: Any) -> list[Any]:
        if not isinstance(value, Tensor) or value.dim() == 0:
            return [value] * len(self.bounds)
        pieces = []
        for begin, end in self.bounds:
            piece = value.detach()[begin:end]
            if piece.data_ptr() % _ALIGNMENT:
                piece = piece.clone()
            pieces.append(piece)
        return pieces

    def _forward_shard(self, k: int, values: list[Any]) -> _Shard:
        replica = self.parallel._borrow()
        try:
            buffers = replica.take_buffers()
            with self.context():
                inputs = []
                for i, value in enumerate(values):
                    if self._needs_grad(self.flat[i]) and torch.is_grad_enabled():
                        values[i] = value.detach().requires_grad_()
                        inputs.append(values[i])
                args, kwargs = pytree.tree_unflatten(values, self.spec)
                output = replica.module(*args, **kwargs)
            outputs, spec = pytree.tree_flatten(output)
            if k == 0:
                self.out_spec = spec
            changed = [(buffer, buffer.changed_value()) for buffer in buffers]
            params: list[Tensor] = [p for _, p in replica.params if p.requires_grad]
            return _Shard(outputs, params, inputs, changed)
        finally:
            self.parallel._give_back(replica)

    def _gather(self, shards: list[list[Any]]) -> list[Any]:
        gathered = []
        with torch.no_grad():
            for i, first in enumerate(shards[0]):
                values = [shard[i] for shard in shards]
                if not isinstance(first, Tensor):
                    gathered.append(first)
                elif first.dim() == 0:
                    weighted = [v * w for v, w in zip(values, self._weights(), strict=True)]
                    gathered.append(tree_sum(self._padded(weighted)))
                else:
                    gathered.append(torch.cat(values))
        return gathered

    def _weights(self) -> list[float]:
        return [(end - begin) / self.rows for begin, end in self.bounds]

    def _padded(self, values: list[Tensor]) -> list[Tensor | None]:
        return [*values, *([None] * (self.leaves - len(values)))]

    def _merge_buffers(self, shards: list[_Shard]) -> None:
        with torch.no_grad():
            for i, (buffer, first) in enumerate(shards[0].buffers):
                values = [shard.buffers[i][1] for shard in shards]
                if all(value is None for value in values):
                    continue
                target = buffer.source._buffers[buffer.name]
                assert target is not None
                # A shard that left the buffer alone has the value it was given.
                given = [
                    shard.buffers[i][0].given if v is None else v
                    for shard, v in zip(shards, values, strict=True)
                ]
                if target.is_floating_point():
                    total = tree_sum(self._padded(given))
                    assert total is not None
                    target.copy_(total / len(given))
                else:
                    target.copy_(given[0] if first is None else first)

    def rebuild(self, outputs: list[Any]) -> Any:
        return pytree.tree_unflatten(outputs, self.out_spec)

    # ---- backward ----

    def run_backward(self, grads: tuple[Tensor | None, ...]) -> list[Tensor | None]:
        shards, self.shards = self.shards, []
        if not shards:
            raise RuntimeError(
                "backward through SphereParallel a second time: the shards' graphs were freed; "
                "call the model again"
            )
        with torch.no_grad():
            parts = [self._cut_grad(g) for g in grads]

        def backward_shard(k: int) -> tuple[Tensor | None, ...]:
            shard = shards[k]
            assert shard is not None
            shards[k] = None  # frees the graph as soon as this shard is done
            roots, root_grads = [], []
            for output, part in zip(shard.outputs, parts, strict=True):
                if part is not None and isinstance(output, Tensor) and output.requires_grad:
                    roots.append(output)
                    root_grads.append(part[k])
            targets = [*shard.params, *shard.inputs]
            if not roots or not targets:
                return (None,) * len(targets)
            return torch.autograd.grad(roots, targets, root_grads, allow_unused=True)

        spheres = self.parallel.spheres
        results = spheres.map(backward_shard, range(len(self.bounds)))
        params = len(results[0]) - len(self.inputs_with_grad())
        absent = [None] * (self.leaves - len(results))
        totals = tree_sums(
            [[*(r[i] for r in results), *absent] for i in range(params)], spheres=spheres
        )
        for i, value in enumerate(self.inputs_with_grad()):
            totals.append(self._gather_input_grad(value, [r[params + i] for r in results]))
        return totals

    def _cut_grad(self, grad: Tensor | None) -> list[Tensor] | None:
        if grad is None:
            return None
        if grad.dim() == 0:
            return [grad * weight for weight in self._weights()]
        pieces: list[Tensor] = self._cut(grad)
        return pieces

    def _gather_input_grad(self, value: Tensor, parts: list[Tensor | None]) -> Tensor | None:
        if all(part is None for part in parts):
            return None
        if value.dim() == 0:
            return tree_sum([*parts, *([None] * (self.leaves - len(parts)))])
        filled = [
            torch.zeros_like(value[begin:end]) if part is None else part
            for (begin, end), part in zip(self.bounds, parts, strict=True)
        ]
        return torch.cat(filled)


class _OnSpheres(torch.autograd.Function):
    """Puts the shards into the caller's graph as one node, with the parameters as its inputs.

    Autograd itself then adds the sums to ``.grad``, runs the parameters' hooks, and knows what
    ``torch.autograd.grad`` asks for.
    """

    @staticmethod
    def forward(ctx: Any, call: _Call, params: int, *_: Tensor) -> tuple[Any, ...]:
        outputs = call.run_forward()
        ctx.call = call
        ctx.params = params
        ctx.set_materialize_grads(False)
        first = call.shards[0]
        assert first is not None
        fixed = [
            o
            for o, made in zip(outputs, first.outputs, strict=True)
            if isinstance(o, Tensor) and not made.requires_grad
        ]
        ctx.mark_non_differentiable(*fixed)
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        return (None, None, *ctx.call.run_backward(grads))


def _add_prefix(_module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """When a `SphereParallel` is part of a larger module: its keys have no ``module.`` in them."""
    for key in [k for k in state_dict if k.startswith(prefix)]:
        state_dict[f"{prefix}module.{key[len(prefix) :]}"] = state_dict.pop(key)


def _warn_if_random(module: nn.Module) -> None:
    for name, part in module.named_modules():
        rate = getattr(part, "p", getattr(part, "dropout", 0))
        draws = "dropout" in type(part).__name__.lower() or isinstance(part, nn.RNNBase)
        if draws and isinstance(rate, (int, float)) and rate > 0:
            warnings.warn(
                f"{name or 'the module'} ({type(part).__name__}) draws random numbers, which "
                "SphereParallel does not key by shard yet: training will not be reproducible",
                RuntimeWarning,
                stacklevel=3,
            )
            return
