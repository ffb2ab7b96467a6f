"""Buffers that shards have changed: the statistics of batch norm and the like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from torch_spheres.shard import Shard

if TYPE_CHECKING:
    from torch_spheres.shards import Call

__all__ = ["buffers_of", "merge_buffers", "misshapen"]

Place = tuple[nn.Module, str]


def buffers_of(module: nn.Module) -> list[Place]:
    """As `Replica.begin_shard` lists them."""
    return [(m, name) for m in module.modules() for name, v in m._buffers.items() if v is not None]


def misshapen(shards: Sequence[Shard]) -> ValueError | None:
    """The error of a buffer that cannot be merged, if there is one."""
    for shard in shards:
        for buffer, value in shard.buffers:
            if value is not None and value.shape != buffer.given.shape:
                return ValueError(
                    f"buffer {buffer.name!r} of {type(buffer.source).__name__} was given another "
                    "shape while a shard ran; SphereParallel merges buffers by value"
                )
    return None


def merge_buffers(call: Call, shards: Sequence[Shard], changed: Mapping[int, Place]) -> None:
    """Of the buffers that changed, the mean over the shards; the first shard's if integer.

    Args:
        call: knows how to sum, over other processes too.
        shards: of this process.
        changed: where they are, by their number in `buffers_of`.
    """
    if not changed:
        return
    sums: list[tuple[Tensor, list[Tensor]]] = []
    firsts: list[tuple[Tensor, Tensor | None]] = []
    with torch.no_grad():
        for i, (source, name) in changed.items():
            target = source._buffers[name]
            assert target is not None
            # A shard that left the buffer alone has the value it was given.
            taken = [shard.buffers[i] for shard in shards]
            given = [buffer.given if value is None else value for buffer, value in taken]
            if target.is_floating_point() or target.is_complex():
                sums.append((target, given))
            else:
                firsts.append((target, given[0] if given else None))
        totals = call.totals([given for _, given in sums], [t for t, _ in sums])
        for (target, _), total in zip(sums, totals, strict=True):
            assert total is not None
            target.copy_(total / call.ran)
        values = call.first_shards([v for _, v in firsts], [t for t, _ in firsts])
        for (target, _), value in zip(firsts, values, strict=True):
            target.copy_(value)
