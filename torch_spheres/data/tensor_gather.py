"""Batches of datasets that are tensors in memory, gathered row by row in C++.

A `TensorDataset` (a `Subset`, `ConcatDataset` or `StackDataset` of such, arrays and tensors in a
`StackDataset`) with `default_collate` gives a batch whose rows are rows of the tensors: there is no
need to make a tensor for each of them first. Only what provably does nothing else is gathered:
exactly these classes, with torch's own methods, dense CPU tensors, and no mode that would see the
calls. The iterators of wrapped loaders use this.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch.utils.data import ConcatDataset, StackDataset, Subset, TensorDataset, default_collate

from torch_spheres import _compat, _core
from torch_spheres.data.worker_info import collates_plainly

__all__ = ["can_gather", "prepare_gather"]

_Array = npt.NDArray[np.int64]


def _methods(kind: type) -> tuple[Any, ...]:
    names = ("__getitem__", "__getitems__", "__len__")
    return tuple(getattr(kind, name, None) for name in names)


_DTYPES = {
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.uint16, torch.uint32, torch.uint64, torch.float16, torch.bfloat16, torch.float32,
    torch.float64, torch.complex32, torch.complex64, torch.complex128,
}  # fmt: skip

_KINDS = (TensorDataset, Subset, ConcatDataset, StackDataset)
_ARRAYS = (np.ndarray, np.memmap)
_STACKABLE = (Tensor, *_ARRAYS)  # in a StackDataset
_METHODS: dict[Any, Any] = {kind: _methods(kind) for kind in _KINDS}  # before users patch them


class _CannotGather(Exception):  # noqa: N818
    """The batch has to be loaded sample by sample."""


@dataclass(slots=True)
class _Column:
    """The rows of one tensor of the batch: row *k* is at ``base + numbers[k] * stride``."""

    numbers: _Array
    base: int  # an address; 0 where `numbers` are the addresses of rows of several tensors
    stride: int  # in bytes
    row_bytes: int
    shape: torch.Size  # of a row
    dtype: torch.dtype
    owner: Any  # keeps the rows alive


class _Index(NamedTuple):
    """Row numbers as an array, with their minimum and maximum."""

    array: _Array
    low: int
    high: int

    @staticmethod
    def of(indices: Any) -> _Index:
        """Converts a list of plain ints; anything else cannot be gathered."""
        numbers = _core.row_numbers(indices)
        if numbers is None:
            raise _CannotGather
        return _Index(*numbers)

    def within(self, rows: int) -> _Array:
        """The row numbers of a table of so many rows, counted from the front."""
        if self.low < -rows or self.high >= rows:
            raise _CannotGather
        if self.low >= 0:
            return self.array
        return np.where(self.array < 0, self.array + rows, self.array)


def can_gather(dataset: Any, collate_fn: Callable[[Any], Any]) -> bool:
    """Whether the classes of a dataset and its parts allow batches to be gathered."""
    return collate_fn is default_collate and collates_plainly() and _is_known(dataset)


def _is_known(dataset: Any, stacked: bool = False) -> bool:
    kind: Any = type(dataset)
    if stacked and kind in _STACKABLE:
        return True
    if kind not in _METHODS or _METHODS[kind] != _methods(kind):
        return False
    if "__getitems__" in vars(dataset):
        return False
    if kind is TensorDataset:
        return True
    if kind is Subset:
        return _is_known(dataset.dataset)
    parts = dataset.datasets
    if kind is ConcatDataset:
        return all(map(_is_known, parts))
    values = parts.values() if isinstance(parts, dict) else parts
    return all(_is_known(part, stacked=True) for part in values)


def prepare_gather(dataset: Any, indices: Any) -> tuple[Any, _core.Gather] | None:
    """Allocates what ``default_collate([dataset[i] for i in indices])`` returns.

    Args:
        dataset: one that `can_gather`.
        indices: of a batch.

    Returns:
        The batch, and the work that fills it. None: load the batch sample by sample; that also
        raises the errors of wrong indices.
    """
    if (
        _compat.function_modes()
        or _compat.dispatch_modes()
        or _compat.functorch_level() is not None
    ):
        return None
    try:
        index = _Index.of(indices)  # a copy: the list is the caller's
        tree = _resolve(dataset, index)
    except (_CannotGather, IndexError, OverflowError):
        return None
    columns: list[_GatherColumn] = []
    batch = _allocate(tree, len(index.array), columns)
    return batch, _core.Gather(columns, (tree, batch))


_GatherColumn = tuple[_Array, int, int, int, int]  # an argument of `_core.Gather`


def _allocate(tree: Any, rows: int, columns: list[_GatherColumn]) -> Any:
    """A tensor for each `_Column` of a tree; where its rows come from is added to `columns`."""
    if type(tree) is list:
        return [_allocate(part, rows, columns) for part in tree]
    if type(tree) is dict:
        return {k: _allocate(part, rows, columns) for k, part in tree.items()}
    out = torch.empty((rows, *tree.shape), dtype=tree.dtype, device="cpu")
    columns.append((tree.numbers, tree.base, tree.stride, tree.row_bytes, out.data_ptr()))
    return out


def _resolve(dataset: Any, index: _Index) -> Any:
    """Lists and dicts of columns, nested as `default_collate` would nest the batch."""
    kind: Any = type(dataset)
    if kind is TensorDataset:
        return [_rows(tensor, index) for tensor in dataset.tensors]
    if kind is Tensor:
        return _rows(dataset, index)
    if kind in _ARRAYS:
        return _rows(_as_tensor(dataset), index)
    if kind is Subset:
        chosen = [dataset.indices[i] for i in index.array.tolist()]
        return _resolve(dataset.dataset, _Index.of(chosen))
    if kind is StackDataset:
        if isinstance(dataset.datasets, dict):
            return {k: _resolve(part, index) for k, part in dataset.datasets.items()}
        return [_resolve(part, index) for part in dataset.datasets]
    return _concatenated(dataset, index)


def _as_tensor(array: npt.NDArray[Any]) -> Tensor:
    # One-dimensional arrays give scalars, which `default_collate` treats in another way.
    if array.ndim < 2 or not array.flags.c_contiguous or not array.flags.writeable:
        raise _CannotGather
    try:
        return torch.from_numpy(array)
    except (TypeError, ValueError):
        raise _CannotGather from None


def _rows(tensor: Tensor, index: _Index) -> _Column:
    if (
        type(tensor) is not Tensor
        or not tensor.is_cpu
        or tensor.layout is not torch.strided
        or tensor.dim() == 0
        or not tensor.is_contiguous()
        or tensor.requires_grad
        or tensor.dtype not in _DTYPES
        or tensor.is_conj()
        or tensor.is_neg()
        or tensor.is_inference()
        or _compat.is_functorch_wrapped(tensor)
        or ((data := tensor.data_ptr()) == 0 and tensor.numel() > 0)  # zeros without storage
        or fwAD.unpack_dual(tensor).tangent is not None
    ):
        raise _CannotGather
    # The column owns the storage, as the tensor may be given another one while rows are copied.
    storage = tensor.untyped_storage()
    # (The storage may have been resized under the tensor, which torch's own kernels check, too.)
    if (tensor.storage_offset() + tensor.numel()) * tensor.itemsize > storage.nbytes():
        raise _CannotGather
    shape = tensor.shape
    row_bytes = tensor.numel() // shape[0] * tensor.itemsize if shape[0] else 0
    numbers = index.within(shape[0])
    return _Column(numbers, data, row_bytes, row_bytes, shape[1:], tensor.dtype, storage)


def _concatenated(dataset: Any, index: _Index) -> Any:
    """Resolves the rows of each part of a `ConcatDataset`, and puts their columns together."""
    ends = np.array(dataset.cumulative_sizes, dtype=np.int64)
    rows = index.within(int(ends[-1]))
    part_of = np.searchsorted(ends, rows, side="right")
    trees, positions = [], []
    for k in np.unique(part_of).tolist():
        where = np.flatnonzero(part_of == k)
        begin = int(ends[k - 1]) if k else 0
        trees.append(_resolve(dataset.datasets[k], _Index.of((rows[where] - begin).tolist())))
        positions.append(where)
    parts, nestings = zip(*map(_compat.pytree.tree_flatten, trees), strict=True)
    if any(nesting != nestings[0] for nesting in nestings):
        raise _CannotGather
    columns = [_merged(column, positions, len(rows)) for column in zip(*parts, strict=True)]
    return _compat.pytree.tree_unflatten(columns, nestings[0])


def _merged(
    parts: tuple[_Column, ...], positions: list[npt.NDArray[np.intp]], rows: int
) -> _Column:
    """One column of several tables' rows; `positions`: where each part's rows are in it."""
    first = parts[0]
    if any((part.shape, part.dtype) != (first.shape, first.dtype) for part in parts):
        raise _CannotGather
    addresses = np.empty(rows, dtype=np.int64)
    for part, where in zip(parts, positions, strict=True):
        addresses[where] = part.numbers * part.stride + part.base
    owners = [part.owner for part in parts]
    return _Column(addresses, 0, 1, first.row_bytes, first.shape, first.dtype, owners)
