"""Tells a loss that sums over a rank's rows from one that is their mean, in the backward pass.

A loss that a rank computes from its own rows is taken to be a mean over them: its gradient is
weighted by the rank's share of the batch. That of a sum has its right size already, and comes out
divided. Which of the two it is can be seen in the loss's graph, whose nodes say how they reduce;
what a sum is divided by afterwards shows in the size of the gradient, where the loss is one that is
known: cross-entropy, binary cross-entropy, squares, or one whose gradients are all of one size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torch_spheres import _compat

__all__ = ["look_at_loss"]

_MEANS = ("MeanBackward0", "MeanBackward1")
_SUMS = ("SumBackward0", "SumBackward1")
_SCALE = ("DivBackward0", "DivBackward1", "MulBackward0", "MulBackward1")
_MOST = 1 << 12  # nodes of a graph that are looked at


@torch.no_grad()
def look_at_loss(output: Any, grad: Tensor, raw: Tensor, rows: int, total: int) -> str | None:
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
    if len(kinds) == 1 and kinds[0][2] == "MseLossBackward0":
        # s * sum((y - t)^2) has the gradients 2 * s * (y - t).
        squares = float(grad.double().square().sum())
        count = 4 * float(roots[0]) / squares if squares > 0 else None
    if all(kind == "mean" for kind, _, _ in kinds):
        used, positions = _used(grad, raw)
        if count is not None and used < positions and math.isclose(count, used, rel_tol=1e-3):
            return (
                f"it is a mean over {used} of the rank's {positions} values (the others are left "
                "out, by ignore_index for one), but is weighted by the rank's rows"
            )
        return None
    if any(kind == "sum" and not scaled for kind, scaled, _ in kinds):
        return "it is a sum over the rank's rows, not a mean, and comes out divided by the ranks"
    if count is None:
        return None
    share = count / rows
    if _fits(share) and not math.isclose(share * rows % total, 0, abs_tol=1e-3 * total):
        return None
    return (
        f"it is a sum divided by {count:.6g}, not a mean over the rank's {rows} rows of the "
        f"batch's {total}: what is a part of a sum comes out divided by the ranks"
    )


def _fits(number: float) -> bool:
    """Whether it is a whole number, to rounding."""
    return number > 0.5 and math.isclose(number, round(number), rel_tol=1e-3)


def _reductions(root: Any, output: Any) -> list[tuple[str, bool, str]]:
    """``"mean"`` or ``"sum"``, whether it is scaled afterwards, and the node, on each way."""
    found = []
    waiting, seen = [(root, False)], {root}
    while waiting and len(seen) < _MOST:
        node, scaled = waiting.pop()
        name = type(node).__name__
        kind = _compat.reduction_of(node)
        kind = "mean" if name in _MEANS else "sum" if name in _SUMS else kind
        if kind is not None:
            if _leads_to(node, output):
                found.append((kind, scaled, name))
            continue
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append((following, scaled or name in _SCALE))
    return found


def _leads_to(node: Any, output: Any) -> bool:
    waiting, seen = [node], {node}
    while waiting and len(seen) < _MOST:
        here = waiting.pop()
        if here is output:
            return True
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
