"""Gradients of the whole batch, from losses over all ranks' rows or over this rank's own.

A loss that a rank computes from its own rows is a mean over them, so the gradient that it sends
back has to be multiplied by the rank's share of the batch. What comes back from all rows (by
`gather`), or from another model on the same ranks, is the batch's gradient already, and must keep
its bits. So an output has two faces: users get one whose gradient is multiplied, and where it goes
straight into a `gather` or another model, the other is taken. What was computed from an output
first went through the one, and is made up for, which rounds.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from torch_spheres.distributed.group import Ranks
from torch_spheres.distributed.loss_reduction import look_at_loss
from torch_spheres.runtime.stack_level import users_level

__all__ = ["Losses", "face", "gather_rows", "own_rows_only"]

_FIRST = 3  # backward passes that are looked at, and then those whose number is a power of two


def gather_rows(rows: Tensor, ranks: Ranks, leaves: int, dim: int = 0) -> Tensor:
    """All ranks' rows, in the order of the batch, along a dimension.

    In the backward pass, this rank's part of the gradient is that of its rows, as it is.
    """
    front = rows.movedim(dim, 0) if dim else rows
    mine = front.detach().cpu().resolve_conj().resolve_neg().contiguous()
    # As bytes, since numpy does not have every type.
    told = ranks.objects(
        (tuple(mine.shape), mine.dtype, mine.view(-1).view(torch.uint8).numpy()), "gather"
    )
    if not all(shape for shape, _, _ in told):
        raise ValueError("gather(): a tensor without dimensions has no rows")
    counts = [shape[0] for shape, _, _ in told]
    total, division = sum(counts), ranks.divide(leaves)
    if counts != division.counts(total):
        raise ValueError(
            f"gather(): the ranks have {counts} rows, which are not their groups' parts of a "
            f"batch of {total}"
        )
    kinds = [(shape[1:], dtype) for shape, dtype, _ in told]
    known = {kind for kind, count in zip(kinds, counts, strict=True) if count}
    if len(known) > 1:
        raise ValueError(f"gather(): the ranks have rows of different shapes or types: {kinds}")
    shape, dtype = next(iter(known), kinds[0])
    places = [
        torch.tensor([i for own in division.ranges(r, total) for i in own], dtype=torch.int64)
        for r in range(ranks.world)
    ]
    whole = torch.empty((total, *shape), dtype=dtype)
    for where, (_, _, values) in zip(places, told, strict=True):
        if len(where):  # numpy has no memory where there is none
            whole[where] = torch.from_numpy(values).view(dtype).view(len(where), *shape)
    whole = whole.to(rows.device)
    if rows.requires_grad:
        own = own_rows_only(rows, total, dim).movedim(dim, 0).reshape(len(front), *shape).to(dtype)
        whole = whole.index_copy_(0, places[ranks.rank].to(rows.device), own)
    return whole.movedim(0, dim) if dim else whole


class _Face(torch.autograd.Function):
    """The same values; the gradient is multiplied by the rank's share of the rows."""

    @staticmethod
    def forward(ctx: Any, raw: Tensor, rows: int, total: int, losses: Losses) -> Tensor:
        ctx.raw, ctx.rows, ctx.total, ctx.losses = raw, rows, total, losses
        return raw.clone()  # (a view of it could not be changed in place)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.losses.look(ctx, grad)
        return grad * (ctx.rows / ctx.total), None, None, None


class Losses:
    """The losses of a rank's own rows, of one model: the first are looked at."""

    def __init__(self) -> None:
        self._seen, self._told = 0, False

    def look(self, output: Any, grad: Tensor) -> None:
        """In the backward of an output; warns, once, of a loss that is no mean over the rows."""
        self._seen += 1
        if self._told or (self._seen > _FIRST and self._seen & (self._seen - 1)):
            return
        wrong = look_at_loss(output, grad, output.raw, output.rows, output.total)
        if wrong is not None:
            self._told = True
            warnings.warn(
                f"the loss is computed from this rank's own rows, and {wrong}. Have it be a mean "
                "over the rank's rows, or compute it over the whole batch: criterion(model.gather"
                "(outputs), model.gather(targets)), or model.forward_backward with a loss that "
                "returns (sum, count)",
                UserWarning,
                stacklevel=users_level(),
            )


def face(raw: Any, rows: int, total: int, losses: Losses) -> Any:
    """What users get of an output."""
    if not isinstance(raw, Tensor) or raw.dim() == 0 or not raw.requires_grad:
        return raw
    return _Face.apply(raw, rows, total, losses)  # type: ignore[no-untyped-call]


def own_rows_only(value: Any, total: int, dim: int = 0) -> Any:
    """A rank's rows, to be used where the gradient that comes back is that of all `total` rows."""
    if not isinstance(value, Tensor) or value.dim() == 0 or not value.requires_grad:
        return value
    node: Any = value.grad_fn
    if _is_face(node):
        return node.raw
    rows = value.shape[dim]
    if rows == 0 or not torch.is_grad_enabled() or not _has_face(node):
        return value
    # What comes back is the gradient of the whole batch, on its way to a `_Face`.
    made_up, times = value.view_as(value), total / rows
    made_up.register_hook(lambda grad: grad * times)
    return made_up


def _is_face(node: Any) -> bool:
    return type(node).__name__ == "_FaceBackward" and isinstance(getattr(node, "raw", None), Tensor)


def _has_face(node: Any) -> bool:
    """Whether an output is behind it, which has not been through another model since."""
    waiting, seen = [node], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if _is_face(node):
            return True
        waiting.extend(following for following, _ in node.next_functions)
    return False
