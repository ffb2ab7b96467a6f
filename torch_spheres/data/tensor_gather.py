"""Batches of datasets that are tensors in memory, gathered row by row in C++.

A `TensorDataset` (a `Subset`, `ConcatDataset` or `StackDataset` of such, arrays and tensors in a
`StackDataset`) with `default_collate` gives a batch whose rows are rows of the tensors: there is no
need to make a tensor for each of them first. Only what provably does nothing else is taken: exactly
these classes, with torch's own methods, dense CPU tensors, and no mode that would see the calls.
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

__all__ = ["gathers", "prepare"]

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
_ROWS = (Tensor, *_ARRAYS)  # in a StackDataset
_METHODS: dict[Any, Any] = {kind: _methods(kind) for kind in _KINDS}  # as torch has them


class _Slow(Exception):  # noqa: N818
    """The batch has to be loaded sample by sample."""


@dataclass(slots=True)
class _Column:
    """One tensor of the batch."""

    numbers: _Array  # of its rows in the table; their addresses, if there are several tables
    table: int  # its address
    stride: int  # bytes from one row of the table to the next
    row_bytes: int
    shape: torch.Size  # of a row
    dtype: torch.dtype
    owner: Any  # keeps the rows alive


class _Index(NamedTuple):
    """Row numbers as an array, made once for all tensors of a dataset."""

    array: _Array
    low: int
    high: int

    @staticmethod
    def of(indices: Any) -> _Index:
        """Of a list of plain ints; nothing else is understood."""
        numbers = _core.row_numbers(indices)
        if numbers is None:
            raise _Slow
        return _Index(*numbers)

    def within(self, rows: int) -> _Array:
        """Counted from the front."""
        if self.low < -rows or self.high >= rows:
            raise _Slow
        if self.low >= 0:
            return self.array
        return np.where(self.array < 0, self.array + rows, self.array)


def gathers(dataset: Any, collate_fn: Callable[[Any], Any]) -> bool:
    """Whether batches of the dataset may be gathered; a look at classes, not at tensors."""
    return collate_fn is default_collate and collates_plainly() and _is_known(dataset)


def _is_known(dataset: Any, stacked: bool = False) -> bool:
    kind: Any = type(dataset)
    if stacked and kind in _ROWS:
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


def prepare(dataset: Any, indices: Any) -> tuple[Any, _core.Gather] | None:
    """What ``default_collate([dataset[i] for i in indices])`` returns, and how to fill it.

    None: do that. Also where that would be an error, which is raised with its own message then.

    Args:
        dataset: what `gathers` has said yes to.
        indices: of a batch.
    """
    if (
        _compat.function_modes()
        or _compat.dispatch_modes()
        or _compat.functorch_level() is not None
    ):
        return None
    try:
        index = _Index.of(indices)  # as they are now: the list is the caller's
        tree = _resolve(dataset, index)
    except (_Slow, IndexError, OverflowError):
        return None
    columns: list[_Filled] = []
    batch = _allocate(tree, len(index.array), columns)
    return batch, _core.Gather(columns, (tree, batch))


_Filled = tuple[_Array, int, int, int, int]  # a column, and where it goes: of `_core.Gather`


def _allocate(tree: Any, rows: int, columns: list[_Filled]) -> Any:
    if type(tree) is list:
        return [_allocate(part, rows, columns) for part in tree]
    if type(tree) is dict:
        return {k: _allocate(part, rows, columns) for k, part in tree.items()}
    out = torch.empty((rows, *tree.shape), dtype=tree.dtype, device="cpu")
    columns.append((tree.numbers, tree.table, tree.stride, tree.row_bytes, out.data_ptr()))
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
    # One-dimensional arrays give scalars, which are collated in another way.
    if array.ndim < 2 or not array.flags.c_contiguous or not array.flags.writeable:
        raise _Slow
    try:
        return torch.from_numpy(array)
    except (TypeError, ValueError):
        raise _Slow from None


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
        or ((data := tensor.data_ptr()) == 0 and tensor.numel() > 0)  # autograd's unstored zeros
        or fwAD.unpack_dual(tensor).tangent is not None
    ):
        raise _Slow
    # Not the tensor: `.data` may give it other memory while rows are copied from this.
    storage = tensor.untyped_storage()
    # (Storage can be resized under a tensor, which torch's own kernels look at as well.)
    if (tensor.storage_offset() + tensor.numel()) * tensor.itemsize > storage.nbytes():
        raise _Slow
    shape = tensor.shape
    row_bytes = tensor.numel() // shape[0] * tensor.itemsize if shape[0] else 0
    numbers = index.within(shape[0])
    return _Column(numbers, data, row_bytes, row_bytes, shape[1:], tensor.dtype, storage)


def _concatenated(dataset: Any, index: _Index) -> Any:
    ends = np.array(dataset.cumulative_sizes, dtype=np.int64)
    rows = index.within(int(ends[-1]))
    part_of = np.searchsorted(ends, rows, side="right")
    trees, places = [], []
    for k in np.unique(part_of).tolist():
        where = np.flatnonzero(part_of == k)
        begin = int(ends[k - 1]) if k else 0
        trees.append(_resolve(dataset.datasets[k], _Index.of((rows[where] - begin).tolist())))
        places.append(where)
    parts, nestings = zip(*map(_compat.pytree.tree_flatten, trees), strict=True)
    if any(nesting != nestings[0] for nesting in nestings):
        raise _Slow
    columns = [_merged(column, places, len(rows)) for column in zip(*parts, strict=True)]
    return _compat.pytree.tree_unflatten(columns, nestings[0])


def _merged(parts: tuple[_Column, ...], places: list[npt.NDArray[np.intp]], rows: int) -> _Column:
    first = parts[0]
    if any((part.shape, part.dtype) != (first.shape, first.dtype) for part in parts):
        raise _Slow
    addresses = np.empty(rows, dtype=np.int64)
    for part, where in zip(parts, places, strict=True):
        addresses[where] = part.numbers * part.stride + part.table
    owners = [part.owner for part in parts]
    return _Column(addresses, 0, 1, first.row_bytes, first.shape, first.dtype, owners)
