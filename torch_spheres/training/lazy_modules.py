"""Initialises lazy modules, which take their shapes from the first batch; used by `Engine`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from torch_spheres.distributed.model_sync import sync_module
from torch_spheres.errors import DeferredError

if TYPE_CHECKING:
    from torch_spheres.training.sharded_call import ShardedCall

__all__ = ["initialise", "is_lazy"]


def is_lazy(module: nn.Module) -> bool:
    """Whether a module is lazy and has not seen its first batch."""
    return isinstance(module, LazyModuleMixin) and bool(module.has_uninitialized_params())


def initialise(call: ShardedCall) -> None:
    """Runs the module once on the first shard's rows.

    Evaluation mode keeps it from changing statistics and drawing random numbers.
    """
    module = call.module
    training = [m for m in module.modules() if m.training]
    with DeferredError() as caught:
        if not call.split.bounds:
            raise ValueError("the first batch of a lazy module needs rows on every rank")
        module.eval()
        args, kwargs = call.split.arguments.build(call.split.parts(0))
        try:
            with torch.no_grad():
                module(*args, **kwargs)
        finally:
            for part in training:
                part.training = True
    call.collective.agree("the initialisation of lazy modules", caught)
    if call.ranks is not None:
        sync_module(module, call.ranks, {})
