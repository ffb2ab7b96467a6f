"""Merges buffers that the shards have changed, such as batch norm's; used by `ShardedCall`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from torch_spheres.runtime.stack_level import users_level
from torch_spheres.training.replica_pool import ReplicaPool
from torch_spheres.training.shard import Shard
from torch_spheres.training.sync_batch_norm import SyncBatchNorm

if TYPE_CHECKING:
    from torch_spheres.training.sharded_call import ShardedCall

__all__ = ["LargeBuffers", "adopt_new_shapes", "buffers_of", "merge_buffers", "needs_two_rows"]

Place = tuple[nn.Module, str]
_LARGE = 1 << 16  # bytes; a smaller buffer is copied faster than it is compared


class LargeBuffers:
    """Decides which large buffers are copied for each shard of a call; small ones always are.

    Args:
        replicas: keep the names of large buffers that a forward writes to.
        learns: whether this call's first shard gets copies of all, and shows which it writes to.
    """

    def __init__(self, replicas: ReplicaPool, *, learns: bool) -> None:
        self._replicas, self._learnt = replicas, not learns

    @staticmethod
    def any_in(module: nn.Module) -> bool:
        """Whether a module has large buffers."""
        return any(b.nbytes > _LARGE for b in module.buffers())

    def has_copy(self, part: nn.Module, name: str, value: Tensor) -> bool:
        """Whether a shard that begins now gets a copy of the buffer."""
        is_small = value.nbytes <= _LARGE
        return is_small or not self._learnt or (id(part), name) in self._replicas.written

    def learn(self, shard: Shard) -> None:
        """Records the buffers that the first shard has written to."""
        self._learnt = True
        for buffer, value in shard.buffers:
            if value is not None:
                self._replicas.written.add((id(buffer.source), buffer.name))


def buffers_of(module: nn.Module) -> list[Place]:
    """The module's buffers, in the order of `Replica.begin_shard`."""
    return [(m, name) for m in module.modules() for name, v in m._buffers.items() if v is not None]


def adopt_new_shapes(shards: Sequence[Shard], alone: bool) -> ValueError | None:
    """Replaces the module's buffers to which all shards gave the same value of a new shape.

    Returns the error if the shards do not agree, or this process is not alone with the batch.
    """
    for i, (buffer, _) in enumerate(shards[0].buffers if shards else ()):
        values = [shard.buffers[i][1] for shard in shards]
        if all(v is None or v.shape == buffer.given.shape for v in values):
            continue
        first = values[0]
        agree = first is not None and all(v is not None and torch.equal(v, first) for v in values)
        if first is None or not agree or not alone:
            shapes = sorted({tuple(v.shape) for v in values if v is not None})
            return ValueError(
                f"buffer {buffer.name!r} of {type(buffer.source).__name__}, of shape "
                f"{tuple(buffer.given.shape)}, was given others while the shards ran: {shapes}. "
                "SphereParallel takes the mean of the shards' buffers, which have to have one "
                "shape: run a batch through model.module first where the first batch gives a "
                "buffer its shape (observers of quantization), and return from forward what grows "
                "with the rows"
            )
        buffer.source._buffers[buffer.name] = first.clone()
        for shard in shards:
            shard.buffers[i] = (shard.buffers[i][0], None)
    return None


def merge_buffers(call: ShardedCall, shards: Sequence[Shard], changed: Mapping[int, Place]) -> None:
    """Sets changed buffers to the mean over the shards; integer ones to the first shard's value.

    The keys of `changed` are numbers in `buffers_of`.
    """
    if not changed:
        return
    _warn_of_integers(call, shards, changed)
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
        split = call.split
        ran = min(split.total, split.shards) if call.ranks is not None else len(split.bounds)
        totals = call.totals([given for _, given in sums], [t for t, _ in sums])
        for (target, _), total in zip(sums, totals, strict=True):
            assert total is not None
            target.copy_(total / ran)
        values = call.collective.first_shards([v for _, v in firsts], [t for t, _ in firsts])
        for (target, _), value in zip(firsts, values, strict=True):
            target.copy_(value)


def _warn_of_integers(
    call: ShardedCall, shards: Sequence[Shard], changed: Mapping[int, Place]
) -> None:
    """Warns, once for each buffer, that other shards' integers are dropped."""
    for i, (source, name) in changed.items():
        values = [shard.buffers[i][1] for shard in shards]
        first = next((v for v in values if v is not None), None)
        if first is None or first.is_floating_point() or first.is_complex():
            continue
        path = f"{type(source).__name__}.{name}"
        agree = all(v is not None and torch.equal(v, first) for v in values)
        if agree or path in call.replicas.reported:
            continue
        call.replicas.reported.add(path)
        warnings.warn(
            f"the shards left different numbers in the buffer {path}, of {first.dtype}, of which "
            "the first shard's are kept (floating-point buffers become the mean over the shards, "
            "so that sums come out as a shard's share). Count outside of the module, from what it "
            "returns",
            UserWarning,
            stacklevel=users_level(),
        )


def needs_two_rows(part: nn.Module) -> bool:
    """Whether a module is a batch norm over rows, which cannot train on a shard of one row."""
    return (
        part.training and isinstance(part, nn.BatchNorm1d) and not isinstance(part, SyncBatchNorm)
    )
