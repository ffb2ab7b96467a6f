"""Scales output gradients by this rank's share of the batch's rows.

A loss of a rank's own rows is a mean over them, so the gradient of a model's output is multiplied
by the rank's share of the batch: `scale_grad`, for every output that users get. The gradient of
what goes into `gather_rows`, or into another model on the same ranks, is the batch's already and
must keep its bits: there `unscale_grad` takes the output before it was scaled. What was computed
from an output before is multiplied by the inverse of the share, which rounds.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from torch_spheres.distributed.loss_reduction import leads_to, loss_problem
from torch_spheres.runtime.stack_level import users_level

__all__ = ["RowLossCheck", "scale_grad", "unscale_grad"]

_FIRST = 3  # backward passes that are checked, and after them those whose number is a power of two


class RowLossCheck:
    """Warns, once, of a loss that is computed from this rank's rows and is not their mean."""

    def __init__(self) -> None:
        self._passes, self._has_warned = 0, False

    def check(self, node: Any, grad: Tensor) -> None:
        """Checks the loss of the running backward pass, at the node of `scale_grad`."""
        self._passes += 1
        if self._has_warned or (self._passes > _FIRST and self._passes & (self._passes - 1)):
            return
        problem = loss_problem(node, grad, node.raw, node.rows, node.total)
        if problem is not None:
            self._has_warned = True
            warnings.warn(
                f"the loss is computed from this rank's own rows, and {problem}. Have it be a mean "
                "over the rank's rows, or compute it over the whole batch: criterion(model.gather"
                "(outputs), model.gather(targets)), or model.forward_backward with a loss that "
                "returns (sum, count)",
                UserWarning,
                stacklevel=users_level(),
            )


class _ScaleGrad(torch.autograd.Function):
    """The same values; backward multiplies the gradient by ``rows / total``."""

    @staticmethod
    def forward(ctx: Any, raw: Tensor, rows: int, total: int, check: RowLossCheck) -> Tensor:
        ctx.raw, ctx.rows, ctx.total, ctx.check = raw, rows, total, check
        return raw.clone()  # a view could not be changed in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.check.check(ctx, grad)
        return grad * (ctx.rows / ctx.total), None, None, None


def scale_grad(output: Any, rows: int, total: int, check: RowLossCheck) -> Any:
    """An output for users, whose gradient is multiplied by this rank's share, ``rows / total``."""
    if not isinstance(output, Tensor) or output.dim() == 0 or not output.requires_grad:
        return output
    return _ScaleGrad.apply(output, rows, total, check)  # type: ignore[no-untyped-call]


def unscale_grad(value: Any, total: int, dim: int = 0) -> Any:
    """The rank's rows `value`, for a place whose gradient is that of all `total` rows already."""
    if not isinstance(value, Tensor) or value.dim() == 0 or not value.requires_grad:
        return value
    node: Any = value.grad_fn
    if _scales(node):
        return node.raw
    rows = value.shape[dim]
    if rows == 0 or not torch.is_grad_enabled() or node is None or not leads_to(node, _scales):
        return value  # not computed from an output, or from one that another model has taken in
    unscaled, factor = value.view_as(value), total / rows
    unscaled.register_hook(lambda grad: grad * factor)
    return unscaled


def _scales(node: Any) -> bool:
    is_ours = type(node).__name__ == f"{_ScaleGrad.__name__}Backward"
    return is_ours and isinstance(getattr(node, "raw", None), Tensor)
