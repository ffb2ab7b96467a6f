"""All ranks' rows of a tensor, for losses over the whole batch."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_spheres.faces import own_rows_only
from torch_spheres.ranks import Ranks

__all__ = ["gather_rows"]


def gather_rows(rows: Tensor, ranks: Ranks, leaves: int) -> Tensor:
    """All ranks' rows, in the order of the batch.

    In the backward pass, this rank's part of the gradient is that of its rows, as it is.
    """
    mine = rows.detach().cpu().resolve_conj().resolve_neg().contiguous()
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
    if not rows.requires_grad:
        return whole
    own = own_rows_only(rows, total).reshape(len(rows), *shape).to(dtype)
    return whole.index_copy_(0, places[ranks.rank].to(rows.device), own)
