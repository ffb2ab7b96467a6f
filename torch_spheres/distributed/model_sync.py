"""Whether all ranks have the same model; from then on with the same values."""

from __future__ import annotations

import itertools
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from torch_spheres.distributed.group import Ranks

__all__ = ["sync_module"]


def sync_module(module: nn.Module, ranks: Ranks, settings: dict[str, Any]) -> None:
    """Finds out whether all ranks have the same model, and gives them rank 0's values.

    Raises:
        ValueError: they do not, or were set up differently.
    """
    params = [(n, tuple(p.shape), p.dtype, p.requires_grad) for n, p in _named(module)]
    everybody = ranks.objects((settings, params), "the comparison of models")
    first = everybody[0]
    for rank, (theirs, names) in enumerate(everybody):
        for key, value in theirs.items():
            if value != first[0][key]:
                _refuse(f"{key} is {first[0][key]!r} on rank 0 and {value!r} on rank {rank}")
        for mine, other in itertools.zip_longest(first[1], names):
            if mine != other:
                _refuse(f"rank 0 has {_shown(mine)} where rank {rank} has {_shown(other)}")
    ranks.broadcast([t for _, t in _named(module)], "the broadcast of the model")


def _named(module: nn.Module) -> list[tuple[str, Tensor]]:
    named = [*module.named_parameters(), *module.named_buffers()]
    return [(n, t) for n, t in named if not nn.parameter.is_lazy(t)]


def _shown(entry: tuple[str, tuple[int, ...], torch.dtype, bool] | None) -> str:
    if entry is None:
        return "nothing"
    name, shape, dtype, trainable = entry
    return f"{name!r} ({dtype}, {shape}{', trainable' if trainable else ''})"


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"the ranks do not have the same model: {text}")
