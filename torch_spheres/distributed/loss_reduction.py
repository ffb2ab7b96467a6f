"""`loss_problem`: recognises, in the backward pass, a loss that is no mean over a rank's rows.

The gradient of a loss that a rank computes from its own rows is weighted by the rank's share of the
batch, as that of a mean has to be. The gradient of a sum would come out divided by the ranks. The
nodes of the loss's graph say how they reduce. What a sum is divided by afterwards shows in the size
of the gradient, where the loss is known: cross-entropy, binary cross-entropy, squared error, or one
whose gradients are all of one size. `grad_scale.RowLossCheck` turns the answer into a warning.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_spheres import _compat

__all__ = ["leads_to", "loss_problem"]

_MEANS = ("MeanBackward0", "MeanBackward1")
_SUMS = ("SumBackward0", "SumBackward1")
_SCALE = ("DivBackward0", "DivBackward1", "MulBackward0", "MulBackward1")
_MOST = 1 << 12  # nodes of a graph that are visited


@torch.no_grad()
def loss_problem(output: Any, grad: Tensor, raw: Tensor, rows: int, total: int) -> str | None:
    """What is wrong with the loss, for a warning; None if nothing is, or it is unknown.

    Args:
        output: the output's autograd node, whose backward runs.
        grad: the output's gradient, from this rank's loss.
        raw: the output's values, of the same shape.
        rows: number of this rank's rows.
        total: number of all ranks' rows.
    """
    roots = _compat.backward_roots()
    if len(roots) != 1 or roots[0].numel() != 1 or rows < 2:
        return None
    reductions = _reductions(roots[0].grad_fn, output)
    divisor = _divisor(grad, raw) if len(reductions) == 1 else None
    if len(reductions) == 1 and reductions[0].node == "MseLossBackward0":
        # s * sum((y - t)^2) has the gradients 2 * s * (y - t).
        squares = float(grad.double().square().sum())
        divisor = 4 * float(roots[0]) / squares if squares > 0 else None
    # Gradients of a loss in a half type have two or three digits.
    near = 1e-3 if roots[0].dtype in (torch.float32, torch.float64) else 2e-2
    if all(r.is_mean for r in reductions):
        used, positions = _used_targets(grad, raw)
        if divisor is not None and used < positions and math.isclose(divisor, used, rel_tol=near):
            return (
                f"it is a mean over {used} of the rank's {positions} values (the others are left "
                "out, by ignore_index for one), but is weighted by the rank's rows"
            )
        return None
    if any(not r.is_mean and r.scales == 0 for r in reductions):
        return "it is a sum over the rank's rows, not a mean, and comes out divided by the ranks"
    # Scaled twice, it may be a mean over the rank's rows and something else.
    if divisor is None or reductions[0].scales > 1:
        return None
    if _is_multiple(divisor, rows, near) and not _is_multiple(divisor, total, near):
        return None
    return (
        f"it is a sum divided by {divisor:.6g}, not a mean over the rank's {rows} rows of the "
        f"batch's {total}: what is a part of a sum comes out divided by the ranks"
    )


def _is_multiple(count: float, of: int, near: float) -> bool:
    """Whether `count` is a whole multiple, within the relative error `near`."""
    times = count / of
    return times > 0.5 and math.isclose(times, round(times), rel_tol=near)


class _Reduction(NamedTuple):
    """A node of a loss's graph that reduces rows."""

    is_mean: bool
    scales: int  # multiplications and divisions between it and the loss
    node: str


def _reductions(root: Any, output: Any) -> list[_Reduction]:
    """The first reduction on each path from the loss to the output."""
    found, is_output = [], lambda node: node is output
    waiting, seen = [(root, 0)], {root}
    while waiting and len(seen) < _MOST:
        node, scales = waiting.pop()
        name, kind = type(node).__name__, _kind_of(node)
        # A sum of what is a mean already (over columns, over tasks) is a mean.
        if kind is not None and leads_to(node, is_output, most=_MOST):
            is_mean = kind == "mean" or not leads_to(node, is_output, _is_mean, _MOST)
            found.append(_Reduction(is_mean, scales, name))
        if kind is not None:
            continue
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append((following, scales + (name in _SCALE)))
    return found


def _kind_of(node: Any) -> str | None:
    """``"mean"`` or ``"sum"`` for a node that reduces."""
    name = type(node).__name__
    return "mean" if name in _MEANS else "sum" if name in _SUMS else _compat.reduction_of(node)


def _is_mean(node: Any) -> bool:
    return _kind_of(node) == "mean"


def leads_to(
    node: Any,
    is_goal: Callable[[Any], bool],
    is_end: Callable[[Any], bool] = lambda _: False,
    most: float = math.inf,
) -> bool:
    """Whether a graph has a goal in it, not counting what is behind ends or `most` nodes."""
    waiting, seen = [node], {node}
    while waiting and len(seen) < most:
        here = waiting.pop()
        if is_goal(here):
            return True
        if not is_end(here):
            new = {f for f, _ in here.next_functions if f is not None} - seen
            seen |= new
            waiting.extend(new)
    return False


def _used_targets(grad: Tensor, raw: Tensor) -> tuple[int, int]:
    """How many targets a cross-entropy uses, and of how many; (0, 0) for another loss."""
    dim = _class_dim(grad, raw)
    if dim is None:
        return 0, 0
    return int((grad != 0).any(dim).sum()), raw.numel() // raw.shape[dim]


def _class_dim(grad: Tensor, raw: Tensor) -> int | None:
    """The dimension of a cross-entropy's classes, along which the gradient sums to zero."""
    for dim in dict.fromkeys((raw.dim() - 1, min(1, raw.dim() - 1))):
        if raw.dim() > 1 and raw.shape[dim] > 1:
            sums, sizes = grad.double().sum(dim).abs(), grad.double().abs().sum(dim)
            if sizes.max() > 0 and bool((sums <= 1e-2 * sizes + 1e-12).all()):
                return dim
    return None


def _divisor(grad: Tensor, raw: Tensor) -> float | None:
    """What a known loss is divided by; None if unknown, or not the same for all rows."""
    if not raw.is_floating_point() or grad.layout is not torch.strided:
        return None
    g, y = grad.double(), raw.double()
    sizes = g.abs()
    if sizes.max() == 0:
        return None
    if bool((sizes >= sizes.max() * (1 - 1e-3)).all()):
        return float(1 / sizes.max())
    dim = _class_dim(grad, raw)
    if dim is not None:
        scales = _scales_of_classes(g.movedim(dim, -1), y.movedim(dim, -1))
    else:  # binary cross-entropy of logits: s * (sigmoid(y) - target)
        p = y.sigmoid()
        scales = torch.where(g > 0, g / p, g / (p - 1))
    if scales is None or not bool(torch.isfinite(scales).all()):
        return None
    scales = scales[scales > 0]
    if len(scales) == 0 or scales.max() > scales.min() * (1 + 1e-2):
        return None
    return float(1 / scales.mean())


def _scales_of_classes(g: Tensor, y: Tensor) -> Tensor | None:
    """``s`` of each row, where the gradient `g` is ``s * (softmax(y) - one_hot)``; else None."""
    p = y.softmax(-1)
    target = g.argmin(-1, keepdim=True)
    one_hot = torch.zeros_like(p).scatter_(-1, target, 1)
    scales = g.gather(-1, target) / (p.gather(-1, target) - 1)
    expected = scales * (p - one_hot)
    if not torch.allclose(expected, g, rtol=1e-2, atol=1e-3 * float(g.abs().max())):
        return None
    return scales.reshape(-1)
