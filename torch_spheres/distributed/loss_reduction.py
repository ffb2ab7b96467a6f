"""Tells a loss that sums over a rank's rows from one that is their mean, in the backward pass.

A loss that a rank computes from its own rows is taken to be a mean over them: its gradient is
weighted by the rank's share of the batch. That of a sum has its right size already, and comes out
divided. Which of the two it is can be seen in the loss's graph, whose nodes say how they reduce;
what a sum is divided by afterwards shows in the size of the gradient, where the loss is one that is
known: cross-entropy, binary cross-entropy, squares, or one whose gradients are all of one size.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_spheres import _compat

__all__ = ["loss_problem"]

_MEANS = ("MeanBackward0", "MeanBackward1")
_SUMS = ("SumBackward0", "SumBackward1")
_SCALE = ("DivBackward0", "DivBackward1", "MulBackward0", "MulBackward1")
_MOST = 1 << 12  # nodes of a graph that are looked at


@torch.no_grad()
def loss_problem(output: Any, grad: Tensor, raw: Tensor, rows: int, total: int) -> str | None:
    """What is wrong with the loss, if it can be seen; None otherwise.

    Args:
        output: the node of the output, whose backward runs.
        grad: of the output, from this rank's loss.
        raw: the output's values.
        rows: of this rank.
        total: of all ranks.
    """
    roots = _compat.backward_roots()
    if len(roots) != 1 or roots[0].numel() != 1 or rows < 2:
        return None
    kinds = _reductions(roots[0].grad_fn, output)
    count = _counted(grad, raw) if len(kinds) == 1 else None
    if len(kinds) == 1 and kinds[0].node == "MseLossBackward0":
        # s * sum((y - t)^2) has the gradients 2 * s * (y - t).
        squares = float(grad.double().square().sum())
        count = 4 * float(roots[0]) / squares if squares > 0 else None
    # (Gradients of a loss in a half type have two or three digits.)
    near = 1e-3 if roots[0].dtype in (torch.float32, torch.float64) else 2e-2
    if all(kind.is_mean for kind in kinds):
        used, positions = _used(grad, raw)
        if count is not None and used < positions and math.isclose(count, used, rel_tol=near):
            return (
                f"it is a mean over {used} of the rank's {positions} values (the others are left "
                "out, by ignore_index for one), but is weighted by the rank's rows"
            )
        return None
    if any(not kind.is_mean and kind.scales == 0 for kind in kinds):
        return "it is a sum over the rank's rows, not a mean, and comes out divided by the ranks"
    # Scaled twice, it may be a mean over the rank's rows and something else.
    if count is None or kinds[0].scales > 1:
        return None
    if _is_multiple(count, rows, near) and not _is_multiple(count, total, near):
        return None
    return (
        f"it is a sum divided by {count:.6g}, not a mean over the rank's {rows} rows of the "
        f"batch's {total}: what is a part of a sum comes out divided by the ranks"
    )


def _is_multiple(count: float, of: int, near: float) -> bool:
    """Whether it is a whole multiple, to rounding."""
    times = count / of
    return times > 0.5 and math.isclose(times, round(times), rel_tol=near)


class _Reduction(NamedTuple):
    """Where a loss's graph reduces rows."""

    is_mean: bool
    scales: int  # multiplications and divisions that come afterwards
    node: str


def _reductions(root: Any, output: Any) -> list[_Reduction]:
    """One for each way from the loss to the output."""
    found = []
    waiting, seen = [(root, 0)], {root}
    while waiting and len(seen) < _MOST:
        node, scales = waiting.pop()
        name, kind = type(node).__name__, _kind_of(node)
        # A sum of what is a mean already (over columns, over tasks) is a mean.
        if kind is not None and _leads_to(node, output):
            is_mean = kind == "mean" or not _leads_to(node, output, past_means=False)
            found.append(_Reduction(is_mean, scales, name))
        if kind is not None:
            continue
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append((following, scales + (name in _SCALE)))
    return found


def _kind_of(node: Any) -> str | None:
    name = type(node).__name__
    return "mean" if name in _MEANS else "sum" if name in _SUMS else _compat.reduction_of(node)


def _leads_to(node: Any, output: Any, *, past_means: bool = True) -> bool:
    waiting, seen = [node], {node}
    while waiting and len(seen) < _MOST:
        here = waiting.pop()
        if here is output:
            return True
        if not past_means and _kind_of(here) == "mean":
            continue
        new = {f for f, _ in here.next_functions if f is not None} - seen
        seen |= new
        waiting.extend(new)
    return False


def _used(grad: Tensor, raw: Tensor) -> tuple[int, int]:
    """Of a loss of classes: how many values it is of, and of how many it could be."""
    dim = _class_dim(grad, raw)
    if dim is None:
        return 0, 0
    return int((grad != 0).any(dim).sum()), raw.numel() // raw.shape[dim]


def _class_dim(grad: Tensor, raw: Tensor) -> int | None:
    """The dimension along which the gradient is that of a cross-entropy: it sums to zero."""
    for dim in dict.fromkeys((raw.dim() - 1, min(1, raw.dim() - 1))):
        if raw.dim() > 1 and raw.shape[dim] > 1:
            sums, sizes = grad.double().sum(dim).abs(), grad.double().abs().sum(dim)
            if sizes.max() > 0 and bool((sums <= 1e-2 * sizes + 1e-12).all()):
                return dim
    return None


def _counted(grad: Tensor, raw: Tensor) -> float | None:
    """What a known loss has been divided by; None if it is not known, or not the same for all."""
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
    """``s`` of each row whose gradient is ``s * (softmax(y) - one_hot)``; 0 where it is zero."""
    p = y.softmax(-1)
    target = g.argmin(-1, keepdim=True)
    one_hot = torch.zeros_like(p).scatter_(-1, target, 1)
    scales = g.gather(-1, target) / (p.gather(-1, target) - 1)
    expected = scales * (p - one_hot)
    if not torch.allclose(expected, g, rtol=1e-2, atol=1e-3 * float(g.abs().max())):
        return None
    return scales.reshape(-1)
