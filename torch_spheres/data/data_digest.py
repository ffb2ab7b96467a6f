"""Checksums of what datasets hold and give, to find out whether ranks have the same data.

They are quick rather than sure: of tensors both ends are looked at, of long lists some elements.
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
_SOME = 256  # elements of a list
_SIMPLE = (bool, int, float, complex, str, bytes)


def digest_of_samples(samples: Sequence[Any]) -> int:
    """Tells samples apart by their plain values and by both ends of their tensors."""
    crc = 0
    for leaf in _compat.pytree.tree_leaves(list(samples)):
        crc = _leaf(leaf, crc)
    return crc


def digest_of_dataset(dataset: Any) -> tuple[int, int]:
    """Of the tensors and index lists of torch's own datasets; of other lists on attributes.

    The two apart: what is in the first is in every batch, what a list on a class of the user's is
    for nobody knows.
    """
    return _known(dataset, 0), _lists(dataset, 0)


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
    if isinstance(value, (*_SIMPLE, np.generic)):
        return zlib.crc32(repr(value).encode(), crc)
    return crc


def _known(dataset: Any, crc: int) -> int:
    kind = type(dataset)
    if kind is TensorDataset:
        return digest_of_samples(dataset.tensors)
    if kind is Subset:
        return _list(dataset.indices, _known(dataset.dataset, crc))
    if kind in (ConcatDataset, StackDataset):
        parts = dataset.datasets
        for part in parts.values() if isinstance(parts, dict) else parts:
            crc = zlib.crc32(str(_known(part, crc)).encode(), crc)
        return crc
    if isinstance(dataset, (Tensor, np.ndarray)):
        return _leaf(dataset, crc)
    return _list(dataset, crc) if isinstance(dataset, (list, tuple, range)) else crc


def _lists(dataset: Any, crc: int) -> int:
    """Of lists of texts and numbers that a dataset of the user's has."""
    if type(dataset) is Subset:
        return _lists(dataset.dataset, crc)
    if not isinstance(dataset, Dataset) or type(dataset).__module__.startswith("torch."):
        return crc
    for name, value in sorted(vars(dataset).items()):
        if isinstance(value, (list, tuple)) and value:
            crc = _list(value, zlib.crc32(name.encode(), crc))
    return crc


def _list(values: Sequence[Any], crc: int) -> int:
    """Of its length and of some elements; of paths, only the names of the files."""
    crc = zlib.crc32(str(len(values)).encode(), crc)
    places = (
        {round(k * (len(values) - 1) / (_SOME - 1)) for k in range(_SOME)} if len(values) else ()
    )
    for place in sorted(places):
        value = values[place]
        for part in value if isinstance(value, (list, tuple)) else (value,):
            plain = part.item() if isinstance(part, Tensor) and part.dim() == 0 else part
            plain = plain.item() if isinstance(plain, np.generic) else plain
            if isinstance(plain, (str, os.PathLike)):
                plain = Path(plain).name
            if isinstance(plain, _SIMPLE):
                crc = zlib.crc32(repr(plain).encode(), crc)
    return crc
