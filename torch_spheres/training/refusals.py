"""Raises errors for what shards cannot do: tracing, forward-mode AD, some batch norms.

Used by `Engine`, `ShardedCall` and `RankCollective`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from torch_spheres import _compat

__all__ = [
    "refuse_compiled",
    "refuse_forward_ad",
    "refuse_off_cpu",
    "refuse_ranks_without_rows",
    "refuse_shards_of_one_row",
    "refuse_torchs_sync_batch_norm",
    "refuse_tracing",
]


def refuse_tracing() -> None:
    """Raises a RuntimeError while torch traces a model, which cannot see other threads."""
    if _compat.is_tracing() or torch.compiler.is_compiling():
        raise RuntimeError(
            "SphereParallel cannot be traced, exported or drawn as a graph (torch.jit.trace, "
            "torch.onnx.export, torch.export, SummaryWriter.add_graph): shards run in other "
            "threads; trace model.module, which has the same weights"
        )


def refuse_forward_ad() -> None:
    """Raises a NotImplementedError under forward-mode AD: shards have no tangents."""
    if _compat.forward_ad_is_on():
        raise NotImplementedError(
            "SphereParallel has no forward-mode AD: inside torch.autograd.forward_ad.dual_level() "
            "tangents of inputs or weights would be lost; use the bare model.module"
        )


# ---- synchronised batch norm ----


def refuse_torchs_sync_batch_norm(model: nn.Module, part: nn.Module) -> None:
    """Raises a TypeError if a part of the model is torch's `SyncBatchNorm`, which needs a GPU."""
    if not isinstance(part, nn.SyncBatchNorm):
        return
    tensors = [t for t in (part.weight, part.running_mean) if t is not None]
    if all(t.is_cpu for t in tensors):
        name = next((name for name, each in model.named_modules() if each is part), "")
        raise TypeError(
            f"module has torch's SyncBatchNorm in it, {name or 'the module'!r}, which synchronises "
            "on GPUs alone, and never the shards of a process: use "
            "ts.convert_sync_batchnorm(model), which takes over its weights and statistics"
        )


def refuse_off_cpu(on_cpu: bool) -> None:
    """Raises a RuntimeError on accelerators, where shards cannot wait for each other."""
    if not on_cpu:
        raise RuntimeError(
            "the model has batch norms of ts.convert_sync_batchnorm() in training mode, and is on "
            "an accelerator, where the shards run one after another and cannot wait for each "
            "other's statistics: use it on the CPU, or torch's own batch norm, which sees a "
            "shard's rows"
        )


def refuse_compiled(together: bool) -> None:
    """Raises a RuntimeError for compiled parts of a model whose shards wait for each other."""
    if together:
        raise RuntimeError(
            "the model has batch norms of ts.convert_sync_batchnorm() in training mode, and parts "
            "that torch.compile has compiled: code is compiled by one shard at a time, which "
            "cannot wait for the others' statistics. Leave one of the two out"
        )


def refuse_ranks_without_rows(rows: Sequence[int]) -> None:
    """Raises a ValueError if a rank has no rows and so no part in the layers' sums."""
    if 0 in rows:
        raise ValueError(
            f"the ranks have {list(rows)} rows: with batch norms of ts.convert_sync_batchnorm() "
            "in training mode each of them needs a row at least, and a batch of fewer rows than "
            "there are shards has none for the last ranks; use larger batches, and drop_last=True "
            "in the loader"
        )


def refuse_shards_of_one_row(rows: int, shards: int) -> None:
    """Raises a ValueError where several ranks train a batch norm on shards of one row.

    One process would run fewer shards, but the ranks' rows are divided before the call.
    """
    if rows < 2 * shards:
        raise ValueError(
            f"a batch of {rows} rows over {shards} shards has shards of one row, of which a "
            "BatchNorm1d that trains over rows can have no statistics: use drop_last=True, batches "
            f"of {2 * shards} rows or more, or ts.convert_sync_batchnorm(model)"
        )
