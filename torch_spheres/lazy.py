"""Modules that learn their shapes from the first batch."""

from __future__ import annotations

import torch
from torch import nn

from torch_spheres.shards import Call

__all__ = ["initialise"]


def initialise(module: nn.Module, call: Call) -> Exception | None:
    """Lazy modules take their shapes from a first run: on the first shard's rows, without a trace.

    In evaluation mode, so that it leaves statistics and random numbers alone.
    """
    if not call.split.bounds:
        return ValueError("the first batch of a lazy module needs rows on every rank")
    training = [m for m in module.modules() if m.training]
    module.eval()
    values = [call.split.part(i, 0) for i in range(len(call.split.flat))]
    args, kwargs = call.split.build(values)
    try:
        with torch.no_grad():
            module(*args, **kwargs)
    except Exception as error:  # noqa: BLE001
        return error
    finally:
        for part in training:
            part.training = True
    return None
