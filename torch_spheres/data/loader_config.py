"""`LoaderConfig`: what a wrapped loader gives to the iterators that it makes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from torch_spheres.data.loader_stats import Meter
from torch_spheres.distributed.group import Ranks
from torch_spheres.runtime.pool import SpherePool

__all__ = ["LoaderConfig", "dataset_length"]


@dataclass(frozen=True)
class LoaderConfig:
    """The options of one epoch. An iterator reads them when it begins, and does not keep them."""

    loader: DataLoader[Any]  # for torch's own options
    spheres: SpherePool
    ranks: Ranks | None  # those that share each batch; None: this process has the batches alone
    meter: Meter
    device: torch.device | None  # where batches go; None: they stay where they are
    shards: int  # into how many a batch is cut, of which each rank has some
    copy_dataset: bool  # each logical worker has a deep copy of the dataset


def dataset_length(dataset: Any) -> int | None:
    """The number of samples; None if the dataset does not say."""
    try:
        return len(dataset)
    except (TypeError, NotImplementedError):
        return None
