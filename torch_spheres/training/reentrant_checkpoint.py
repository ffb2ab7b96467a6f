"""Activation checkpoints with ``use_reentrant=True``, noticed by the shard that they are in.

Importing this module replaces `torch.utils.checkpoint.CheckpointFunction.forward`, which does what
it did outside of shards.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import CheckpointFunction

from torch_spheres.runtime.rng import ShardRandom, current_source
from torch_spheres.training.graph_leaves import ShardGraph
from torch_spheres.training.pytree import flatten

__all__ = ["REFUSED"]

REFUSED = (
    "the forward has a checkpoint with use_reentrant=True, which runs a backward of its own for "
    "all that it reaches, and it computes with tensors that are no parameters of registered layers "
    "(a layer in a list, a function that holds the original of a layer): all shards would write to "
    "their .grad. Use use_reentrant=False, or register the layer and reach it by way of self"
)
_checkpoint: Any = CheckpointFunction.forward


def _checkpoint_in_shard(ctx: Any, run: Any, *args: Any) -> Any:
    """Tells the shard of a checkpoint with ``use_reentrant=True``.

    Such a checkpoint runs a backward of its own inside the backward, which adds to ``.grad`` of all
    leaves that it reaches. So the shard has to compute its gradients in ``.grad`` too.
    """
    source = current_source()
    if not isinstance(source, ShardRandom):
        return _checkpoint(ctx, run, *args)
    source.reentrant = True

    def checked_run(*values: Any) -> Any:
        outputs = run(*values)
        if torch.is_grad_enabled():  # it runs again, before its backward
            own = source.own_leaves().union(map(id, values))
            if not own.issuperset(ShardGraph(flatten(outputs)[0]).leaves):
                raise RuntimeError(REFUSED)
        return outputs

    return _checkpoint(ctx, checked_run, *args)


CheckpointFunction.forward = staticmethod(_checkpoint_in_shard)  # type: ignore[method-assign]
