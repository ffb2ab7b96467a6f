"""Checksums of datasets and samples, by which ranks find out whether they have the same data.

They are fast rather than thorough: only both ends of tensors and some elements of long lists count.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, StackDataset, Subset, TensorDataset

from torch_spheres import _compat

__all__ = ["digest_of_dataset", "digest_of_samples"]

_ENDS = 64  # elements at either end of a tensor
_ELEMENTS = 256  # of a list
_PLAIN = (bool, int, float, complex, str, bytes)


def digest_of_samples(samples: Sequence[Any]) -> int:
    """A checksum of the samples' plain values and of both ends of their tensors."""
    crc = 0
    for leaf in _compat.pytree.tree_leaves(list(samples)):
        crc = _leaf(leaf, crc)
    return crc


def digest_of_dataset(dataset: Any) -> tuple[int, int]:
    """Two checksums: of what torch's own datasets hold, and of lists on a user's dataset.

    They are apart because a difference in the first is an error, while a list on a user's dataset
    need not be data.
    """
    return _contents(dataset, 0), _lists(dataset, 0)


# Each of these extends the checksum `crc`.


def _leaf(value: Any, crc: int) -> int:
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or not value.is_cpu or value.is_quantized:
            return crc
        flat = value.detach().resolve_conj().resolve_neg().reshape(-1)
        ends = torch.cat([flat[:_ENDS], flat[-_ENDS:]]).contiguous().view(torch.uint8).numpy()
        return zlib.crc32(ends.tobytes(), zlib.crc32(repr(tuple(value.shape)).encode(), crc))
    if isinstance(value, np.ndarray) and value.dtype != object:
        row = value.reshape(-1)
        both = np.concatenate([row[:_ENDS], row[-_ENDS:]]).tobytes()
        return zlib.crc32(both, zlib.crc32(repr(value.shape).encode(), crc))
    if isinstance(value, (*_PLAIN, np.generic)):
        return zlib.crc32(repr(value).encode(), crc)
    return crc


def _contents(dataset: Any, crc: int) -> int:
    """Of what torch's own datasets, tensors, arrays and sequences hold."""
    kind = type(dataset)
    if kind is TensorDataset:
        return digest_of_samples(dataset.tensors)
    if kind is Subset:
        return _list(dataset.indices, _contents(dataset.dataset, crc))
    if kind in (ConcatDataset, StackDataset):
        parts = dataset.datasets
        for part in parts.values() if isinstance(parts, dict) else parts:
            crc = zlib.crc32(str(_contents(part, crc)).encode(), crc)
        return crc
    if isinstance(dataset, (Tensor, np.ndarray)):
        return _leaf(dataset, crc)
    return _list(dataset, crc) if isinstance(dataset, (list, tuple, range)) else crc


def _lists(dataset: Any, crc: int) -> int:
    """Of lists of strings and numbers on the attributes of a user's dataset."""
    if type(dataset) is Subset:
        return _lists(dataset.dataset, crc)
    if not isinstance(dataset, Dataset) or type(dataset).__module__.startswith("torch."):
        return crc
    for name, value in sorted(vars(dataset).items()):
        if isinstance(value, (list, tuple)) and value:
            crc = _list(value, zlib.crc32(name.encode(), crc))
    return crc


def _list(values: Sequence[Any], crc: int) -> int:
    """Of a list's length and of some elements; of paths, only the names of the files."""
    crc = zlib.crc32(str(len(values)).encode(), crc)
    last = len(values) - 1
    chosen = {round(k * last / (_ELEMENTS - 1)) for k in range(_ELEMENTS)} if last >= 0 else ()
    for place in sorted(chosen):
        value = values[place]
        for part in value if isinstance(value, (list, tuple)) else (value,):
            plain = part.item() if isinstance(part, Tensor) and part.dim() == 0 else part
            plain = plain.item() if isinstance(plain, np.generic) else plain
            if isinstance(plain, (str, os.PathLike)):
                plain = Path(plain).name
            if isinstance(plain, _PLAIN):
                crc = zlib.crc32(repr(plain).encode(), crc)
    return crc
