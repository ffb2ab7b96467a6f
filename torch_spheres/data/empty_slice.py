"""Batches without rows: what a rank gets of a batch with fewer rows than leaves."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torch_spheres import _compat

__all__ = ["EmptySlice", "without_rows"]


class EmptySlice(list[Any]):
    """The index list of a rank without rows.

    It has one of the batch's indices: `without_rows` makes the rank's batch of that sample's.
    """


def without_rows(batch: Any) -> Any:
    """A collated batch with none of its rows: tensors and lists of strings become empty."""

    def emptied(value: Any) -> Any:
        is_column = _is_strings(value) or (isinstance(value, Tensor) and value.dim() > 0)
        return value[:0] if is_column else value

    return _compat.pytree.tree_map(emptied, batch, is_leaf=_is_strings)


def _is_strings(value: Any) -> bool:
    """Whether it is what `default_collate` makes of the samples' strings."""
    is_list = isinstance(value, (list, tuple)) and bool(value)
    return is_list and all(isinstance(v, (str, bytes)) for v in value)
