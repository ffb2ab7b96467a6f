"""All ranks' rows of a tensor, for losses over the whole batch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torch_spheres.faces import own_rows_only
from torch_spheres.ranks import Ranks

__all__ = ["gather_rows"]


def gather_rows(rows: Tensor, ranks: Ranks, leaves: int) -> Tensor:
    """All ranks' rows, in the order of the batch."""
    told = ranks.objects((len(rows), (tuple(rows.shape[1:]), rows.dtype)), "gather")
    counts, kinds = [n for n, _ in told], [kind for _, kind in told]
    total = sum(counts)
    division = ranks.divide(leaves)
    if counts != division.counts(total):
        raise ValueError(
            f"gather(): the ranks have {counts} rows, which are not their groups' parts of a "
            f"batch of {total}"
        )
    known = [kind for kind, count in zip(kinds, counts, strict=True) if count]
    if any(kind != known[0] for kind in known):
        raise ValueError(f"gather(): the ranks have rows of different shapes or types: {kinds}")
    rows = own_rows_only(rows, total)
    gathered: Tensor = _Gathered.apply(  # type: ignore[no-untyped-call]
        rows, ranks, leaves, counts, known[0]
    )
    return gathered


class _Gathered(torch.autograd.Function):
    """Everybody's rows; in the backward pass, this rank's part of the gradient as it is."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        ranks: Ranks,
        leaves: int,
        counts: list[int],
        kind: tuple[tuple[int, ...], torch.dtype],
    ) -> Tensor:
        total, (shape, dtype) = sum(counts), kind
        row = math.prod(shape) * dtype.itemsize
        # As bytes, since not every type can be sent; all ranks' as many as the most.
        sent = torch.zeros(max(counts) * row, dtype=torch.uint8)
        mine = rows.detach().cpu().resolve_conj().resolve_neg().contiguous()
        sent[: mine.nbytes] = mine.view(-1).view(torch.uint8)
        table = ranks.gather(sent, "gather")
        division = ranks.divide(leaves)
        order = [i for r in range(ranks.world) for own in division.ranges(r, total) for i in own]
        pieces = [table[r, : counts[r] * row] for r in range(ranks.world)]
        gathered = torch.cat(pieces).view(dtype).view(total, *shape)
        where = torch.tensor(order)
        out = torch.empty_like(gathered)
        out[where] = gathered
        own = sum(counts[: ranks.rank])
        ctx.own = where[own : own + counts[ranks.rank]]
        return out.to(rows.device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return grad[ctx.own.to(grad.device)], None, None, None, None
