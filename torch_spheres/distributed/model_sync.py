"""`sync_module`: gives all ranks rank 0's values of a model, if all have the same model."""

from __future__ import annotations

import itertools
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from torch_spheres.distributed.group import Ranks

__all__ = ["sync_module"]

_Parameter = tuple[str, tuple[int, ...], torch.dtype, bool]  # name, shape, dtype, requires_grad


def sync_module(module: nn.Module, ranks: Ranks, settings: dict[str, Any]) -> None:
    """Copies rank 0's parameters and buffers to all ranks, after a comparison of the models.

    Args:
        module: of this rank.
        ranks: that share its batches.
        settings: what else has to be the same on all ranks, by name.

    Raises:
        ValueError: the ranks have different models or settings.
    """
    params = [(n, tuple(p.shape), p.dtype, p.requires_grad) for n, p in _materialized(module)]
    everybody = ranks.objects((settings, params), "the comparison of models")
    first_settings, first_params = everybody[0]
    for rank, (theirs, names) in enumerate(everybody):
        for key, value in theirs.items():
            if value != first_settings[key]:
                _refuse(f"{key} is {first_settings[key]!r} on rank 0 and {value!r} on rank {rank}")
        for first, other in itertools.zip_longest(first_params, names):
            if first != other:
                _refuse(f"rank 0 has {_shown(first)} where rank {rank} has {_shown(other)}")
    ranks.broadcast([t for _, t in _materialized(module)], "the broadcast of the model")


def _materialized(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers that have a shape already."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return [(n, t) for n, t in named if not nn.parameter.is_lazy(t)]


def _shown(entry: _Parameter | None) -> str:
    if entry is None:
        return "nothing"
    name, shape, dtype, trainable = entry
    return f"{name!r} ({dtype}, {shape}{', trainable' if trainable else ''})"


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"the ranks do not have the same model: {text}")
