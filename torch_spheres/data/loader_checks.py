"""Checks of the arguments of `wrap` and `SphereLoader`, before anything is made."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader, DistributedSampler

from torch_spheres import _compat
from torch_spheres.data.data_pipes import DATA_PIPES
from torch_spheres.data.sampler import SphereBatchSampler
from torch_spheres.distributed.group import Ranks
from torch_spheres.runtime.pool import SpherePool

__all__ = ["check_loader", "check_options", "ranks_for"]

_WORKERS = ("sphere", "process")


def check_loader(loader: Any, num_workers: int | None, workers: Any) -> None:
    """Raises a TypeError or a ValueError for a loader that `wrap` cannot take."""
    _compat.require(_compat.LOADER)
    if not isinstance(loader, DataLoader):
        raise TypeError(
            f"loader must be a torch.utils.data.DataLoader, got {type(loader).__name__}; for a "
            "dataset, also one that makes batches itself, as webdataset's do: "
            "wrap(DataLoader(dataset, batch_size=..., num_workers=...))"
        )
    if hasattr(loader, "_sphere_workers"):
        raise ValueError("loader is wrapped already; wrap the DataLoader that it was made of")
    name = type(loader).__name__
    if isinstance(inner := vars(loader).get("base_dataloader"), DataLoader):
        raise ValueError(
            f"{name} is Accelerate's, around a {type(inner).__name__}: put the spheres inside, "
            "loader.base_dataloader = wrap(loader.base_dataloader)"
        )
    if type(loader)._get_iterator is not DataLoader._get_iterator:
        raise ValueError(
            f"{name} makes its iterators itself (it overrides _get_iterator), and would not use "
            "the spheres; make a torch.utils.data.DataLoader of the same arguments, and wrap that: "
            "what wrap() returns has state_dict() and load_state_dict()"
        )
    if num_workers is not None and workers == "process":
        raise ValueError(
            'num_workers= is for workers="sphere"; give the DataLoader that many itself'
        )


def check_options(loader: Any, spheres: Any, copy_dataset: Any, workers: Any) -> None:
    """Raises a TypeError or a ValueError for options that a wrapped loader cannot have."""
    if spheres is not None and not isinstance(spheres, SpherePool):
        raise TypeError(f"spheres must be a KissingSpheres, got {type(spheres).__name__}")
    if not isinstance(copy_dataset, bool):
        raise TypeError(f"copy_dataset must be True or False, got {copy_dataset!r}")
    if workers not in _WORKERS:
        raise ValueError(f"workers must be one of {_WORKERS}, got {workers!r}")
    if workers == "process" and copy_dataset:
        raise ValueError('copy_dataset=True is for threads; with workers="process" all have copies')
    if workers == "process" and loader.num_workers == 0:
        raise ValueError(
            'workers="process" needs a DataLoader with num_workers > 0, got num_workers=0'
        )


def ranks_for(loader: DataLoader[Any], ranks: Ranks | None, workers: str) -> Ranks | None:
    """The ranks that the loader's batches have to be divided over; None: they are not divided.

    Raises:
        ValueError: the loader's batches cannot be divided.
    """
    if ranks is None:
        return None
    batches = loader.batch_sampler
    if isinstance(batches, SphereBatchSampler) and batches.world_size > 1:
        return None  # that sampler divides them
    inner = getattr(batches, "batch_sampler", None) or getattr(batches, "sampler", None)
    if isinstance(inner, SphereBatchSampler) and inner.world_size > 1:
        raise ValueError(
            "the loader's batch_sampler is around a SphereBatchSampler, which divides batches over "
            "the processes already; give that one rank=0, world_size=1, or wrap(loader, "
            "process_group=False)"
        )
    if isinstance(loader.dataset, DATA_PIPES):
        raise ValueError(
            "loader has a DataPipe, which torch's own loaders divide over the processes by "
            "themselves; use wrap(loader, process_group=False)"
        )
    if isinstance(loader.sampler, DistributedSampler):
        raise ValueError(
            "loader has a DistributedSampler, but wrap() divides each batch over the processes "
            "itself: use the plain sampler (shuffle=True), the same seed on all, and the "
            "batch_size of all processes together; or wrap(loader, process_group=False)"
        )
    if loader.batch_size is None and batches is None:
        raise ValueError(
            "a loader with batch_size=None has no batches whose rows could be divided over the "
            "processes; give it a batch_size, or use wrap(loader, process_group=False)"
        )
    if not loader.in_order and loader.num_workers > 0:
        raise ValueError(
            "a loader with in_order=False gives each process its batches in an order of its own, "
            "so that parts of different batches would meet; use in_order=True, or wrap(loader, "
            "process_group=False)"
        )
    if workers == "process":
        raise ValueError(
            'workers="process" cannot load a part of each batch: give the loader a '
            "SphereBatchSampler, which yields each rank's rows, or use process_group=False"
        )
    return ranks
