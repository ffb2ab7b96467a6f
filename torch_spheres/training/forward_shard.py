"""`forward_shard`: the forward of one shard on a replica; used by both kinds of call."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from torch_spheres.runtime.rng import ShardRandom
from torch_spheres.training.change_detection import checksum, contents, version_of
from torch_spheres.training.pytree import flatten_output
from torch_spheres.training.replica import Replica
from torch_spheres.training.shard_task import Shard, in_shard

if TYPE_CHECKING:
    from torch_spheres.training.sharded_call import ShardedCall

__all__ = ["forward_shard"]


def forward_shard(call: ShardedCall, k: int, replica: Replica) -> Shard:
    """Runs the forward of the call's shard `k` on the calling thread, see `in_shard`.

    Raises:
        RuntimeError: the forward wrote in place to its arguments.
        Exception: any error of the module, with a note of how the arguments were cut.
    """
    shard = Shard(ShardRandom(call.random, call.split.numbers[k], call.split.leaves[k]), replica)
    grad = torch.is_grad_enabled
    taken = replica.begin_shard(call.large_buffers.has_copy)
    try:
        with in_shard(call, k, "forward", shard):
            values = call.split.parts(k)
            for i in call.differentiable if grad() else ():
                values[i] = values[i].detach().requires_grad_()
                shard.inputs.append(values[i])
            args, kwargs = call.split.arguments.build(values)
            before = contents(call.split.arguments.keys, (*args, *kwargs.values()))
            tensors = call.split.outside_objects(values)  # without caches, which forwards write to
            versions = [version_of(v) for v in tensors]
            sums = [checksum(v) for v in tensors] if call.closely else []
            called = replica.module.forward if call.replicas.calls_forward else replica.module
            output = called(*args, **kwargs)
            now = [checksum(v) for v in tensors] if call.closely else []
            if now != sums or versions != [version_of(v) for v in tensors]:
                raise RuntimeError(
                    "the module's forward wrote in place to its arguments, of which a shard "
                    "has a part or a copy: x = x.clone() first, or return what is new"
                )
            call.effects.compare_arguments(before)
    except Exception as error:
        error.add_note(call.split.described())
        raise
    shard.outputs, shard.nesting = flatten_output(output)
    call.effects.record_attributes(replica)
    shard.buffers = [(buffer, buffer.changed_value()) for buffer in taken]
    shard.params = call.reached.targets(replica)
    return shard
