"""`convert_sync_batchnorm`: batch norm with the statistics of all shards and ranks.

Torch's `SyncBatchNorm` is for GPUs and whole processes; this one is for the shards of
`SphereParallel` on CPUs. The shards' counts, means and squared deviations are combined in float64
in the fixed tree (shard_sums.py), and so are the two sums of the backward. So the bits depend
neither on the threads nor on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.parametrize import is_parametrized

from torch_spheres import _compat
from torch_spheres.runtime.rng import ShardRandom, current_source
from torch_spheres.training.shard_sums import Total, shard_sums_here

__all__ = ["SyncBatchNorm", "convert_sync_batchnorm", "sees_all_rows", "waits_for_others"]

_HALF = (torch.bfloat16, torch.float16)
_KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_LAZY = (nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d)
_OWN = (nn.BatchNorm1d.forward, nn.SyncBatchNorm.forward)  # all BatchNorms have the first

if TYPE_CHECKING:
    _Base = nn.BatchNorm1d
else:
    _Base = nn.Module


def convert_sync_batchnorm(module: nn.Module) -> nn.Module:
    """Replaces a model's batch norms by layers that see the whole batch in `SphereParallel`.

    ::

        model = ts.SphereParallel(ts.convert_sync_batchnorm(model))

    As `torch.nn.SyncBatchNorm.convert_sync_batchnorm`, but for CPUs, and for shards as well as
    ranks. In training mode, in the shards of a `SphereParallel` or of `parallelize_`, mean and
    variance are those of all shards of all ranks, as plain torch computes them for the whole batch,
    up to rounding, forward and backward, with the same bits for any `concurrency` and number of
    ranks. Elsewhere, and in evaluation mode, the layer is torch's own batch norm.

    A shard waits in such a layer for all others, on a leaf of its own. So the activations, and in
    backward the gradients, of all shards are alive at a time, with `forward_backward` too; a work
    item that occupies a leaf delays the model until it ends; and every rank needs rows. All
    shards have to pass the same layers in the same order, or there is a RuntimeError. Models on
    accelerators, or with compiled parts, are refused in training mode.

    Source: Ioffe and Szegedy, "Batch normalization", 2015. The variance is the sum of the squares
    within the shards and between their means, divided by the number of values.

    Args:
        module: with `BatchNorm1d`, `BatchNorm2d`, `BatchNorm3d` or torch's `SyncBatchNorm` layers,
            which are replaced in place. The new layers share their parameters, buffers, hooks and
            other attributes. float64 inputs are computed in float64, other types in float32.

    Returns:
        The module; a new one if it is a batch norm itself.

    Raises:
        TypeError: `module` is no module, or has a batch norm with its own forward, or one that is
            parametrized.
        ValueError: a lazy batch norm has no shapes yet.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    layers = {n: part for n, part in module.named_modules() if isinstance(part, (*_KINDS, *_LAZY))}
    for name, part in layers.items():
        _check(name, part)
    made: dict[Any, nn.Module] = {part: _converted(part) for part in layers.values()}
    for parent in [*module.modules()]:
        for name, child in parent._modules.items():
            if child in made:
                parent._modules[name] = made[child]
    return made.get(module, module)


def _check(name: str, part: nn.Module) -> None:
    where = f"the {type(part).__name__} {name!r}"
    if isinstance(part, _LAZY):
        raise ValueError(f"{where} has no shapes yet: run a batch through the model first")
    if not isinstance(part, SyncBatchNorm) and type(part).forward not in _OWN:
        raise TypeError(
            f"{where} has a forward of its own, of which a converted layer would have nothing; "
            "convert the layers beside it one by one, or replace it by torch's batch norm"
        )
    if is_parametrized(part):
        raise TypeError(f"{where} is parametrized: convert it before you register that")


def _converted(part: nn.Module) -> nn.Module:
    if isinstance(part, SyncBatchNorm):
        return part
    kind = next(made for kind, made in _CONVERTED.items() if isinstance(part, kind))
    made = kind.__new__(kind)
    vars(made).update(vars(part))  # in the same hook dicts, so that handles can remove hooks
    for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        vars(made)[name] = vars(part)[name].copy()
    vars(made).pop("process_group", None)
    return made


class SyncBatchNorm(_Base):
    """Base of the converted layers, see `convert_sync_batchnorm`.

    Input and output have the shape and dtype of the original layer's.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """Batch norm; in a shard that trains, with the statistics of the whole batch."""
        return self._forward_in_training(input) if self.training else super().forward(input)

    @_compat.disable_compiler
    def _forward_in_training(self, x: Tensor) -> Tensor:
        shard = current_source()
        if not isinstance(shard, ShardRandom):
            return super().forward(x)
        sums, layer = shard_sums_here(), shard.number_of(self)
        if sums is None or layer is None:
            raise RuntimeError(
                "a converted batch norm is called in a shard that the model does not know of: it "
                "is registered nowhere (layers in a list: use nn.ModuleList), or was put into "
                "training mode by the forward itself. Register it, and call train() before"
            )
        self._check_input_dim(x)
        if x.shape[1] != self.num_features:
            raise ValueError(f"expected {self.num_features} channels, got {x.shape[1]}")
        found = sums.reduce(shard.leaf, layer, "forward", _of_shard(x.detach()), _statistics)
        count, mean, variance = found
        kept = torch.float64 if x.dtype is torch.float64 else torch.float32
        self._track(count, mean, variance)
        where = shard.leaf, layer
        return _Normalise.apply(  # type: ignore[no-any-return, no-untyped-call]
            x, self.weight, self.bias, mean.to(kept), variance.to(kept), count, self.eps, where
        )

    @torch.no_grad()
    def _track(self, count: float, mean: Tensor, variance: Tensor) -> None:
        if not self.track_running_stats:
            return
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        for running, new in (
            (self.running_mean, mean),
            (self.running_var, variance * (count / (count - 1))),
        ):
            if running is not None:
                running.mul_(1 - momentum).add_(new.to(running.dtype), alpha=momentum)


class SyncBatchNorm1d(SyncBatchNorm, nn.BatchNorm1d):
    """A converted `BatchNorm1d`."""


class SyncBatchNorm2d(SyncBatchNorm, nn.BatchNorm2d):
    """A converted `BatchNorm2d`."""


class SyncBatchNorm3d(SyncBatchNorm, nn.BatchNorm3d):
    """A converted `BatchNorm3d`."""


class SyncBatchNormNd(SyncBatchNorm, nn.BatchNorm1d):
    """A converted `torch.nn.SyncBatchNorm`, which takes inputs of two dimensions or more."""

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002 - torch's name
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")


_CONVERTED: dict[type[nn.Module], type[SyncBatchNorm]] = {
    nn.BatchNorm1d: SyncBatchNorm1d,
    nn.BatchNorm2d: SyncBatchNorm2d,
    nn.BatchNorm3d: SyncBatchNorm3d,
    nn.SyncBatchNorm: SyncBatchNormNd,
}


def waits_for_others(module: nn.Module) -> bool:
    """Whether a module's shards wait for each other's statistics."""
    return any(isinstance(part, SyncBatchNorm) and part.training for part in module.modules())


def sees_all_rows(module: nn.Module) -> bool:
    """Whether a comparison with the bare module shows nothing about a call in training mode.

    A converted batch norm without running statistics uses its rows' in evaluation mode too.
    """
    return any(
        isinstance(part, SyncBatchNorm) and part.training and part.running_mean is None
        for part in module.modules()
    )


def _of_shard(x: Tensor) -> tuple[int, Tensor, Tensor]:
    """Number of values per channel, their mean, and the sum of squared deviations from it."""
    count = x.numel() // x.shape[1] if x.numel() else 0
    if count == 0:
        zeros = torch.zeros(x.shape[1], dtype=torch.float64)
        return 0, zeros, zeros
    if x.dtype in _HALF:
        x = x.float()
    mean, variance = torch.batch_norm_update_stats(x, None, None, 0.0)
    return count, mean.double(), variance.double() * count


def _statistics(
    shards: Mapping[int, tuple[int, Tensor, Tensor]], total: Total
) -> tuple[float, Tensor, Tensor]:
    """The whole batch's number of values per channel, mean and variance."""
    sums = total({
        k: torch.cat([torch.tensor([n], dtype=torch.float64), mean * n])
        for k, (n, mean, _) in shards.items()
    })  # fmt: skip
    count, mean = float(sums[0]), sums[1:] / sums[0]
    if count <= 1:
        raise ValueError(
            "batch norm cannot train on a batch of one value for each channel, which has no "
            "variance: use larger batches, and drop_last=True in the loader"
        )
    squares = total({k: m2 + (own - mean) ** 2 * n for k, (n, own, m2) in shards.items()})
    return count, mean, squares / count


class _Normalise(torch.autograd.Function):
    """The batch norm of a shard, given the whole batch's mean and variance."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        count: float,
        eps: float,
        where: tuple[int, int],
    ) -> Tensor:
        ctx.count, ctx.eps, ctx.where = count, eps, where
        ctx.save_for_backward(x, weight, mean, torch.rsqrt(variance + eps))
        if not x.numel():  # torch's kernels fail for a shard that has selected no rows
            return torch.empty_like(x)
        if x.dtype in _HALF:  # torch's kernel takes all three in one type
            weight = None if weight is None else weight.to(mean.dtype)
            bias = None if bias is None else bias.to(mean.dtype)
        # In evaluation mode the kernel takes mean and variance as they are.
        return torch.native_batch_norm(
            x, weight, bias, mean, variance, training=False, momentum=0.0, eps=eps
        )[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, invstd = ctx.saved_tensors
        scale = torch.ones_like(mean) if weight is None else weight.to(mean.dtype)
        products, plain = _sums_of_shard(grad, x, mean, invstd, scale, ctx.eps)
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_x = None
        if needs_x:
            sums = shard_sums_here()
            if sums is None:
                raise RuntimeError(
                    "a loss was computed from a tensor that a shard made inside the model; its "
                    "batch norm needs the gradients of all shards. Return the tensor from forward"
                )
            leaf, layer = ctx.where
            own = torch.cat([products, plain]).double()
            both = sums.reduce(leaf, layer, "backward", own, lambda values, total: total(values))
            means = (both / ctx.count).to(mean.dtype)
            grad_x = _grad_of_input(grad, x, mean, invstd, scale * invstd, *means.chunk(2))
        return (
            grad_x,
            products.to(weight.dtype) if needs_weight else None,
            plain.to(weight.dtype if weight is not None else plain.dtype) if needs_bias else None,
            *(None,) * 5,
        )


def _sums_of_shard(
    grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Sums of the gradient times the normalised input, and of the gradient."""
    if not x.numel():
        return torch.zeros_like(mean), torch.zeros_like(mean)
    _, products, plain = torch.ops.aten.native_batch_norm_backward(
        grad, x, scale, None, None, mean, invstd, train=True, eps=eps,
        output_mask=[False, True, True],
    )  # fmt: skip
    return products, plain


def _grad_of_input(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    factor: Tensor,
    mean_product: Tensor,
    mean_grad: Tensor,
) -> Tensor:
    """``factor * (grad - mean_grad - (x - mean) * invstd * mean_product)``, in two passes."""
    dtype = x.dtype
    if not x.numel():
        return torch.empty_like(x)
    if dtype in _HALF:
        grad, x = grad.float(), x.float()
    ones, slope = torch.ones_like(mean), -factor * invstd * mean_product
    rest = torch.native_batch_norm(
        x, slope, -factor * mean_grad, mean, ones, training=False, momentum=0.0, eps=0.0
    )[0]
    shape = (1, -1, *(1,) * (x.dim() - 2))
    return rest.addcmul_(grad, factor.view(shape)).to(dtype)
