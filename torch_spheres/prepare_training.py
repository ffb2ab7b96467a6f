"""`prepare`: has a model, its optimizer and its loader run on the spheres, in one line."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn
from torch.utils.data import DataLoader

from torch_spheres.data.loader import SphereLoader, wrap
from torch_spheres.distributed.group import ProcessGroup
from torch_spheres.spheres import KissingSpheres
from torch_spheres.training.gradient_hook import GradientHook, trains
from torch_spheres.training.module import SphereParallel

__all__ = ["prepare"]

Optimizer = TypeVar("Optimizer", bound=torch.optim.Optimizer)
T = TypeVar("T")


def prepare(
    model: nn.Module,
    optimizer: Optimizer,
    loader: DataLoader[T],
    spheres: KissingSpheres | None = None,
    *,
    reproducible: bool = True,
    process_group: ProcessGroup | bool | None = None,
    shards: int | None = None,
) -> tuple[SphereParallel, Optimizer, SphereLoader[T]]:
    """Has a model, its optimizer and its loader run on the spheres; the loop stays as it is.

    ``model, optimizer, loader = ts.prepare(model, optimizer, loader)``

    Args:
        model: becomes a `SphereParallel`; its parameters stay the same objects.
        optimizer: of the model's parameters; gets a `GradientHook` that lives as long as it does.
        loader: is wrapped by `wrap`, unless it is wrapped already.
        spheres: that run the shards; None makes a `KissingSpheres` of two levels, which is
            ``model.spheres``.
        reproducible: as of `SphereParallel`.
        process_group: that shares each batch, as of `SphereParallel` and `wrap`.
        shards: into how many a batch is cut, as of `SphereParallel` and `wrap`.

    Returns:
        The `SphereParallel`, the optimizer itself, and the `SphereLoader`.

    Raises:
        TypeError: an argument has another type.
        ValueError: the optimizer has none of the model's parameters, so that it would never see a
            gradient.
    """
    if not isinstance(loader, DataLoader):
        raise TypeError(
            f"loader must be a torch.utils.data.DataLoader, got {type(loader).__name__}; for a "
            "dataset: DataLoader(dataset, batch_size=...)"
        )
    parallel = SphereParallel(
        model, spheres, reproducible=reproducible, process_group=process_group, shards=shards
    )
    if isinstance(optimizer, torch.optim.Optimizer) and not trains(optimizer, model):
        raise ValueError(
            "the optimizer has none of the model's parameters; was it made for a copy of the "
            "model, or before the model was given new ones?"
        )
    GradientHook(optimizer, parallel)
    if isinstance(loader, SphereLoader):
        return parallel, optimizer, loader
    wrapped = wrap(loader, parallel.spheres, process_group=process_group, shards=shards)
    return parallel, optimizer, wrapped
