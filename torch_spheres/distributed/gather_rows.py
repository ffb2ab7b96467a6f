"""`gather_rows`: a tensor of the whole batch from every rank's rows; behind ``model.gather``."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_spheres.distributed.grad_scale import unscale_grad
from torch_spheres.distributed.group import Ranks

__all__ = ["gather_rows"]


def gather_rows(rows: Tensor, ranks: Ranks, leaves: int, dim: int = 0) -> Tensor:
    """All ranks' rows, in the order of the batch, along dimension `dim`.

    In the backward pass this rank's rows get their part of the gradient, unscaled.

    Args:
        rows: this rank's, of the shape and type of the others' but for their number.
        ranks: that share the batch.
        leaves: that the batch was divided over.
        dim: of the rows.

    Raises:
        ValueError: the ranks' rows are not those of one batch, or differ in shape or type.
    """
    front = rows.movedim(dim, 0) if dim else rows
    mine = front.detach().cpu().resolve_conj().resolve_neg().contiguous()
    # As bytes, since numpy does not have every type.
    everybody = ranks.objects(
        (tuple(mine.shape), mine.dtype, mine.view(-1).view(torch.uint8).numpy()), "gather"
    )
    if not all(shape for shape, _, _ in everybody):
        raise ValueError("gather(): a tensor without dimensions has no rows")
    counts = [shape[0] for shape, _, _ in everybody]
    total, division = sum(counts), ranks.divide(leaves)
    if counts != division.counts(total):
        raise ValueError(
            f"gather(): the ranks have {counts} rows, which are not their groups' parts of a "
            f"batch of {total}"
        )
    kinds = [(shape[1:], dtype) for shape, dtype, _ in everybody]
    known = {kind for kind, count in zip(kinds, counts, strict=True) if count}
    if len(known) > 1:
        raise ValueError(f"gather(): the ranks have rows of different shapes or types: {kinds}")
    shape, dtype = next(iter(known), kinds[0])
    places = [
        torch.tensor([i for own in division.ranges(r, total) for i in own], dtype=torch.int64)
        for r in range(ranks.world)
    ]
    whole = torch.empty((total, *shape), dtype=dtype)
    for where, (_, _, values) in zip(places, everybody, strict=True):
        if len(where):  # numpy has no memory where there is none
            whole[where] = torch.from_numpy(values).view(dtype).view(len(where), *shape)
    whole = whole.to(rows.device)
    if rows.requires_grad:
        own = unscale_grad(rows, total, dim).movedim(dim, 0).reshape(len(front), *shape).to(dtype)
        whole = whole.index_copy_(0, places[ranks.rank].to(rows.device), own)
    return whole.movedim(0, dim) if dim else whole
