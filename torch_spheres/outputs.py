"""The shards' outputs put together, along the rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

__all__ = ["gather_output"]


def _dimensions(value: Any) -> int | None:
    return value.dim() if isinstance(value, Tensor) else None


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return "None" if value is None else f"of type {type(value).__name__}"


def gather_output(
    i: int,
    values: Sequence[Any],
    sizes: Sequence[int],
    mean: Callable[[Sequence[Tensor]], Tensor],
) -> Any:
    """Output `i` of the module, from what it was for each shard of so many rows.

    Args:
        i: for errors.
        values: of each shard.
        sizes: rows of each shard.
        mean: of the shards' scalars.

    Raises:
        TypeError, ValueError: they cannot be put together.
    """
    first = values[0]
    if any(isinstance(v, PackedSequence) for v in values):
        raise TypeError(
            "SphereParallel cannot put together a PackedSequence that the module returned; "
            "pad it inside the module (torch.nn.utils.rnn.pad_packed_sequence, total_length=)"
        )
    for k, value in enumerate(values):
        if _dimensions(value) != _dimensions(first):
            raise ValueError(
                f"output {i} of the module is {_described(first)} for shard 0, but "
                f"{_described(value)} for shard {k}: what the module returns must not depend "
                "on the rows"
            )
    if not isinstance(first, Tensor):
        return first
    if first.dim() == 0:
        return mean(values)
    times, rest = divmod(first.shape[0], sizes[0])
    for k, value in enumerate(values):
        if rest or value.shape[0] != times * sizes[k] or value.shape[1:] != first.shape[1:]:
            raise ValueError(
                f"output {i} of shard {k} has shape {tuple(value.shape)} for {sizes[k]} rows "
                f"(shard 0's: {tuple(first.shape)} for {sizes[0]}): SphereParallel puts "
                "outputs together along the first dimension, which must be the batch's rows, "
                "or a fixed number of rows for each; transpose it inside the module"
            )
    return torch.cat(list(values))
