"""What shards cannot do at all: to be traced, and to have tangents."""

from __future__ import annotations

import torch

from torch_spheres import _compat

__all__ = ["refuse_forward_ad", "refuse_tracing"]


def refuse_tracing() -> None:
    """Raises a RuntimeError while torch records what a model does: shards are no part of it."""
    if _compat.is_tracing() or torch.compiler.is_compiling():
        raise RuntimeError(
            "SphereParallel cannot be traced, exported or drawn as a graph (torch.jit.trace, "
            "torch.onnx.export, torch.export, SummaryWriter.add_graph): shards run in other "
            "threads; trace model.module, which has the same weights"
        )


def refuse_forward_ad() -> None:
    """Raises a NotImplementedError for dual tensors, wherever they are: shards have no tangents."""
    if _compat.forward_ad_is_on():
        raise NotImplementedError(
            "SphereParallel has no forward-mode AD: inside torch.autograd.forward_ad.dual_level() "
            "tangents of inputs or weights would be lost; use the bare model.module"
        )
