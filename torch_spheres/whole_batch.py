"""All ranks' rows of a tensor, for losses over the whole batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_spheres.ranks import Ranks
from torch_spheres.sampler import shard_bounds
from torch_spheres.sharing import SharedCall

__all__ = ["gather_rows"]


def gather_rows(rows: Tensor, ranks: Ranks, leaves: int) -> Tensor:
    """All ranks' rows, in the order of the batch."""
    gathered: Tensor = _Gathered.apply(rows, ranks, leaves)  # type: ignore[no-untyped-call]
    return gathered


class _Gathered(torch.autograd.Function):
    """Everybody's rows; in the backward pass, this rank's part of the gradient as it is."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, ranks: Ranks, leaves: int) -> Tensor:
        counts = ranks.meet("gather", [len(rows)])[:, 0].tolist()
        total = sum(counts)
        if counts != [ranks.rows(r, total, leaves) for r in range(ranks.world)]:
            raise ValueError(
                f"gather(): the ranks have {counts} rows, which are not their groups' parts of a "
                f"batch of {total}"
            )
        # As bytes, since not every type can be sent; all ranks' as many as the most.
        row = rows[:1].reshape(-1).nbytes if len(rows) else 0
        shape, dtype, row = max(
            ranks.objects((tuple(rows.shape[1:]), rows.dtype, row), "gather"), key=lambda s: s[2]
        )
        sent = torch.zeros(max(counts) * row, dtype=torch.uint8)
        sent[: rows.nbytes] = rows.detach().cpu().contiguous().view(-1).view(torch.uint8)
        table = ranks.gather(sent, "gather")
        bounds = shard_bounds(total, leaves)
        order = [
            i
            for r in range(ranks.world)
            for leaf in ranks.leaves(r, leaves)
            for i in range(*bounds[leaf])
        ]
        pieces = [table[r, : counts[r] * row] for r in range(ranks.world)]
        gathered = torch.cat(pieces).view(dtype).view(total, *shape)
        where = torch.tensor(order)
        out = torch.empty_like(gathered)
        out[where] = gathered
        own = sum(counts[: ranks.rank])
        ctx.own = where[own : own + counts[ranks.rank]]
        _mark_whole(rows)
        return out.to(rows.device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad[ctx.own.to(grad.device)], None, None


def _mark_whole(rows: Tensor) -> None:
    """The calls that these rows come from: their loss is one over all ranks' rows."""
    waiting, seen = [rows.grad_fn], set()
    while waiting:
        node: Any = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        call = getattr(node, "call", None)
        if isinstance(call, SharedCall):
            call.is_whole = True
        else:
            waiting.extend(following for following, _ in node.next_functions)
