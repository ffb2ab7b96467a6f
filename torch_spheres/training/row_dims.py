"""`RowDims`: which leaves of a call's arguments are cut by rows, and along which dimension.

Used by `Split`, for the arguments of a call and for the targets of `forward_backward`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from torch_spheres import _compat
from torch_spheres.runtime.object_graph import is_sequence, row_sequences, tensor_inside
from torch_spheres.training.call_arguments import Argument, CallArguments
from torch_spheres.training.split_options import SplitOptions, argument_name

__all__ = ["RowDims"]

_SIMPLE = (Tensor, type(None), bool, int, float, str)


class RowDims:
    """The flat leaves of arguments, with the dimension along which each is cut.

    Args:
        arguments: of the call.
        options: of the user.
        module: whose arguments they are; None for the targets of a loss, all of which have rows.
        may_be_empty: whether the batch may have 0 rows, as a rank's part may.

    Attributes:
        arguments: those given, in which sequences with an element for each row are leaves.
        dims: for each of their leaves, the dimension along which it is cut; None if it is not.
        rows: number of rows.

    Raises:
        ValueError: no tensor has rows, not all have as many, or it is not clear what has rows.
        TypeError: a tensor of a kind that cannot be cut by rows.
    """

    def __init__(
        self,
        arguments: CallArguments,
        options: SplitOptions,
        module: nn.Module | None,
        *,
        may_be_empty: bool,
    ) -> None:
        self.options, self._module, self._may_be_empty = options, module, may_be_empty
        self.arguments = arguments
        self._rows: int | None = None
        self._counted_by: int | str = 0  # key of the argument that `_rows` is from
        dims = [self._dims_of(argument) for argument in arguments.each]
        self.rows = self._counted()
        if not all(isinstance(leaf, Tensor) for leaf in arguments.leaves()):
            self._cut_sequences(dims)
        self.dims = [*itertools.chain(*dims)]

    def _name(self, key: int | str) -> str:
        return argument_name(self._module, key)

    def _rule(self, key: int | str) -> tuple[int | None, bool]:
        """An argument's batch dimension, and whether that is explicit, not a default."""
        if self._module is None:
            return self.options.default_dim, True
        if self.options.names_arguments:
            return self.options.dim_of(self._name(key))
        return self.options.default_dim, False

    def _dims_of(self, argument: Argument) -> list[int | None]:
        """For each leaf of an argument, the dimension along which it is cut."""
        dim, is_explicit = self._rule(argument.key)
        if dim is None:
            return [None] * len(argument.leaves)
        return [
            self._dim_of(argument.key, i, leaf, dim, is_explicit)
            for i, leaf in enumerate(argument.leaves)
        ]

    def _dim_of(
        self, key: int | str, i: int, value: Any, dim: int, is_explicit: bool
    ) -> int | None:
        """The dimension along which a leaf is cut; None if it is not."""
        if isinstance(value, PackedSequence):
            raise TypeError(
                "SphereParallel cannot split a PackedSequence by rows; give it the padded "
                "tensor and the lengths, and pack inside the module"
            )
        if not isinstance(value, Tensor):
            return None
        if value.is_nested or value.layout is not torch.strided:
            raise TypeError(
                f"SphereParallel splits dense tensors by rows, but argument {self._name(key)!r} "
                f"has one of layout {value.layout}{' (nested)' if value.is_nested else ''}; "
                "convert it inside the module"
            )
        if value.dim() == 0:
            return None
        if self._module is None:
            dim = min(dim, value.dim() - 1)  # targets may be labels, which have one dimension
        rows = value.shape[dim] if dim < value.dim() else None
        if self._rows is None:
            if rows is None:
                raise ValueError(
                    f"argument {self._name(key)!r} has shape {tuple(value.shape)} and no dimension "
                    f"{dim}, which is the batch's; {self._way_out(key)}"
                )
            self._rows, self._counted_by = rows, key
        elif rows != self._rows:
            found, first = "none" if rows is None else rows, self._name(self._counted_by)
            path = self._path_of(key, i)
            inside = path and (
                f" (At {path}: a list or dict is one argument. What in it has no rows has to be an "
                "argument of its own; a tensor for each row has to be stacked, or padded.)"
            )
            raise ValueError(
                f"SphereParallel cuts every tensor among the arguments by rows. There are "
                f"{self._rows} rows, of argument {first!r}, but argument {self._name(key)!r} has "
                f"a tensor of shape {tuple(value.shape)}, {found} along dimension {dim}; "
                f"{self._way_out(key)}; or is {first!r} the one that has no rows?{inside}"
            )
        elif value.dim() == 2 and not is_explicit:
            self._refuse_square(key, i, value)
        return dim

    def _path_of(self, key: int | str, i: int) -> str:
        """The path of a leaf in its argument, for errors; empty if it is the argument."""
        (value,) = (a.value for a in self.arguments.each if a.key == key)
        paths = _compat.pytree.tree_flatten_with_path(value)[0]
        return _compat.pytree.keystr(paths[i][0]) if i < len(paths) else ""

    def _refuse_square(self, key: int | str, i: int, value: Tensor) -> None:
        """Raises a ValueError for a matrix that may be a mask over positions, or have the rows."""
        unambiguous = self.options.findings.unambiguous
        place = key, i
        if value.shape[0] != value.shape[1]:
            unambiguous.add(place)  # a mask would not have had the batch's rows
        elif value.shape[0] > 1 and place not in unambiguous:
            name = self._name(key)
            raise ValueError(
                f"argument {name!r} has shape {tuple(value.shape)}, with the batch's rows in both "
                f"dimensions: say whether it is to be cut, SphereParallel(..., "
                f"batch_dim={{{name!r}: 0}}), or every shard needs all of it, as of a mask over "
                f"positions: whole=({name!r},)"
            )

    def _way_out(self, key: int | str) -> str:
        if self._module is None:
            return "targets have the batch's rows in their first dimension, or in batch_dim"
        name = self._name(key)
        return (
            f"SphereParallel(..., whole=({name!r},)) gives it to every shard as it is, "
            f"batch_dim={{{name!r}: d}} says that its rows are along dimension d"
        )

    def _counted(self) -> int:
        if self._rows is None:
            raise ValueError(
                "SphereParallel found no tensor with rows among the arguments to split over the "
                "spheres; call model.module(...) instead"
            )
        if self._rows == 0 and not self._may_be_empty:
            raise ValueError("SphereParallel got a batch of 0 rows")
        return self._rows

    def _cut_sequences(self, dims: list[list[int | None]]) -> None:
        """Cuts sequences with an element per row; refuses objects that hold tensors with rows."""
        has_rows: dict[int | str, Callable[[Any], bool]] = {}
        for key, value, leaves, _ in self.arguments.each:
            dim, is_explicit = self._rule(key)
            if dim is not None and not isinstance(value, _SIMPLE):
                self._refuse_objects(key, leaves, dim)
                if self._has_row_sequence(key, value, dim, is_explicit):
                    has_rows[key] = functools.partial(self._has_element_per_row, dim=dim)
        if not has_rows:
            return
        self.arguments = self.arguments.flattened_by(has_rows)
        for n, argument in enumerate(self.arguments.each):
            if argument.key in has_rows:
                dim, _ = self._rule(argument.key)
                cuts, is_cut = self._dims_of(argument), map(has_rows[argument.key], argument.leaves)
                dims[n] = [dim if cut else d for cut, d in zip(is_cut, cuts, strict=True)]

    def _has_element_per_row(self, value: Any, dim: int) -> bool:
        return (
            is_sequence(value) and _length(value, dim) == self.rows and tensor_inside(value) is None
        )

    def _has_row_sequence(self, key: int | str, value: Any, dim: int, is_explicit: bool) -> bool:
        """Whether an argument has a sequence that is cut; raises if that is not clear."""
        found = False
        unambiguous = self.options.findings.unambiguous
        for path, sequence in row_sequences(value):
            length = _length(sequence, dim)
            if length != self.rows:
                unambiguous.add((key, path))
                if is_explicit and not path and self._module is not None:
                    raise ValueError(
                        f"batch_dim= says that argument {self._name(key)!r} has the batch's rows, "
                        f"but there are {self.rows} rows and {length} elements"
                    )
            elif is_explicit:
                found = True
            elif self.rows > 1 and (key, path) not in unambiguous:
                name = self._name(key)
                raise ValueError(
                    f"argument {name + path!r} is a {type(sequence).__name__} of {length} "
                    f"elements, as many as the batch has rows: say whether it is to be cut, "
                    f"SphereParallel(..., batch_dim={{{name!r}: 0}}), or every shard needs all of "
                    f"it: whole=({name!r},)"
                )
        return found

    def _refuse_objects(self, key: int | str, leaves: list[Any], dim: int) -> None:
        """Raises a TypeError for objects that hold tensors with the batch's rows."""
        for leaf in leaves:
            if isinstance(leaf, (Tensor, nn.Module, torch.Size)) or leaf is None or callable(leaf):
                continue
            held = tensor_inside(leaf)
            if held is not None and held[1].dim() > dim and held[1].shape[dim] == self.rows:
                name = self._name(key)
                raise TypeError(
                    f"argument {name!r} has a {type(leaf).__name__} in it, whose {held[0]} is a "
                    f"tensor with the batch's rows that SphereParallel cannot cut; pass the "
                    "tensors themselves, or register the class with torch.utils._pytree; "
                    f"whole=({name!r},) gives it to every shard as it is"
                )


def _length(value: Any, dim: int) -> int:
    if isinstance(value, np.ndarray):
        return int(value.shape[dim]) if dim < value.ndim else -1
    return len(value)
