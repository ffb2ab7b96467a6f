"""How a batch is cut into shards: nested values, by rows."""

from __future__ import annotations

import enum
import functools
import itertools
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from torch_spheres import _compat, _core
from torch_spheres.distributed.group import Ranks
from torch_spheres.reduction.partition import shard_bounds
from torch_spheres.runtime.object_graph import is_sequence, row_sequences, tensor_inside
from torch_spheres.training.pytree import Nesting, flatten, unflatten
from torch_spheres.training.split_options import SplitOptions, argument_name

__all__ = ["Split", "SplitOptions", "aligned", "rows_to_tune_by", "without_dim"]

_NOTHING_INSIDE = (Tensor, type(None), bool, int, float, str)
_ALIGNMENT = 64  # bytes; kernels choose their path by it, and so their bits


class Split:
    """Arguments cut by rows, as `torch.tensor_split` cuts.

    Args:
        arguments: anything nested that has tensors in it; each with its number or name.
        shards: how many pieces to cut at most.
        ranks: with whom the batch is shared; these are this rank's part of it, and `share` has to
            be told how many rows there are in all.
        options: which arguments are cut, and along which dimension.
        module: whose arguments they are; None: they are what a loss compares outputs with, all of
            which has rows.
        least: rows that a shard needs; fewer shards run where there are too few for all.

    Raises:
        ValueError: no tensor has rows, not all have as many, or it is not clear what has rows.
        TypeError: a tensor of a kind that cannot be cut by rows.
    """

    def __init__(
        self,
        arguments: Sequence[tuple[int | str, Any]],
        shards: int,
        ranks: Ranks | None = None,
        options: SplitOptions | None = None,
        module: nn.Module | None = None,
        least: int = 1,
    ) -> None:
        self.options = SplitOptions() if options is None else options
        self.shards = shards
        self._ranks, self._module = ranks, module
        self._rows: int | None = None
        self._counted_by: int | str = 0  # the argument that has shown how many there are
        self.flat: list[Any] = []
        self.dims: list[int | None] = []  # along which each leaf is cut
        self._spans: list[tuple[int | str, int, Nesting]] = []  # arguments, and where they end
        self._arguments = arguments
        self._values = [value for _, value in arguments]
        for key, value in arguments:
            self._add(key, value)
        self.rows = self._counted()
        if not all(isinstance(v, Tensor) for v in self.flat):
            self._look_at_the_rest(arguments)
        inside = itertools.chain(*(nesting.in_objects() for _, _, nesting in self._spans))
        self._in_objects = [i for i, is_in in enumerate(inside) if is_in]
        self.total = self.rows  # of all ranks
        pieces = max(1, min(shards, self.rows // least))
        self.bounds = [(a, b) for a, b in shard_bounds(self.rows, pieces) if b > a]
        self.leaves = [*range(len(self.bounds))]  # of the tree, of each shard that runs

    def share(self, rows: list[int]) -> None:
        """Cuts anew, as this rank's part of a batch of which each rank has so many rows.

        Raises:
            ValueError: they do not have what their groups have.
        """
        assert self._ranks is not None
        self.total = sum(rows)
        division = self._ranks.divide(self.shards)
        due = division.counts(self.total)
        if rows != due:
            raise ValueError(
                f"the ranks have {rows} rows, of a batch of {self.total} they should have {due}: "
                "give every rank its groups' part of one batch, as wrap(loader) and "
                "SphereBatchSampler do (the loader's batch_size is that of all ranks together, "
                "and a DistributedSampler is not needed)"
            )
        if self.total == 0:
            raise ValueError("SphereParallel got a batch of 0 rows")
        own = division.owned(self._ranks.rank)
        sizes = [len(r) for r in division.ranges(self._ranks.rank, self.total)]
        cuts = [*itertools.accumulate(sizes, initial=0)]
        self.bounds = [(a, b) for a, b in itertools.pairwise(cuts) if b > a]
        self.leaves = [leaf for leaf, size in zip(own, sizes, strict=True) if size]

    def take_leaves(self, owned: Sequence[int]) -> None:
        """Cuts anew, into the shards that this process has of a batch that several share.

        Where each shard of the whole batch begins follows from the rows here: what they are more
        than a multiple of the shards went to the first leaves (`SphereBatchSampler.own_shards`).
        """
        bounds = shard_bounds(self.rows, len(owned))
        size = {leaf: b - a for leaf, (a, b) in zip(sorted(owned), bounds, strict=True)}
        cuts = [*itertools.accumulate((size[leaf] for leaf in owned), initial=0)]
        self.bounds = [(a, b) for a, b in itertools.pairwise(cuts) if b > a]
        self.leaves = [leaf for leaf in owned if size[leaf]]

    # ---- what has rows ----

    def _name(self, key: int | str) -> str:
        return argument_name(self._module, key)

    def _rule(self, key: int | str) -> tuple[int | None, bool]:
        """An argument's batch dimension, and whether the user has said so."""
        if self._module is None:
            return self.options.default_dim, True
        if self.options.names_arguments:
            return self.options.dim_of(self._name(key))
        return self.options.default_dim, False

    def _add(self, key: int | str, value: Any) -> None:
        leaves, nesting = flatten(value)
        dim, said = self._rule(key)
        for i, leaf in enumerate(leaves):
            cut = None if dim is None else self._dim_of(key, i, leaf, dim, said)
            self.dims.append(cut)
        self.flat += leaves
        self._spans.append((key, len(self.flat), nesting))

    def _dim_of(self, key: int | str, i: int, value: Any, dim: int, said: bool) -> int | None:
        """Along which dimension a leaf is cut; None if not at all."""
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
            dim = min(dim, value.dim() - 1)  # (targets can be labels, which have one dimension)
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
        elif value.dim() == 2 and not said:
            self._refuse_square(key, i, value)
        return dim

    def _path_of(self, key: int | str, i: int) -> str:
        """Where a leaf is in its argument, for errors; nothing if it is the argument."""
        (value,) = (v for k, v in self._arguments if k == key)
        paths = _compat.pytree.tree_flatten_with_path(value)[0]
        return _compat.pytree.keystr(paths[i][0]) if i < len(paths) else ""

    def _refuse_square(self, key: int | str, i: int, value: Tensor) -> None:
        """A matrix that may be of the batch's rows, or a mask for all of them."""
        settled = self.options.learned.settled
        place = key, i
        if value.shape[0] != value.shape[1]:
            settled.add(place)  # a mask would not have had the batch's rows
        elif value.shape[0] > 1 and place not in settled:
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
        if self._rows == 0 and self._ranks is None:
            raise ValueError("SphereParallel got a batch of 0 rows")
        return self._rows

    def _look_at_the_rest(self, arguments: Sequence[tuple[int | str, Any]]) -> None:
        """Sequences with an element for each row, and objects that hold tensors with rows."""
        flat, dims, spans = self.flat, self.dims, self._spans
        self.flat, self.dims, self._spans = [], [], []
        begin = 0
        for (key, value), (_, end, nesting) in zip(arguments, spans, strict=True):
            dim, said = self._rule(key)
            leaves, cuts = flat[begin:end], dims[begin:end]
            begin = end
            if dim is not None and not isinstance(value, _NOTHING_INSIDE):
                self._refuse_objects(key, leaves, dim)
                if self._has_row_sequence(key, value, dim, said):
                    leaves, nesting = flatten(value, functools.partial(self._is_cut, dim=dim))
                    cuts = [
                        dim if self._is_cut(v, dim) else
                        self._dim_of(key, i, v, dim, said) for i, v in enumerate(leaves)
                    ]  # fmt: skip
            self.flat += leaves
            self.dims += cuts
            self._spans.append((key, len(self.flat), nesting))

    def _is_cut(self, value: Any, dim: int) -> bool:
        return (
            is_sequence(value) and _length(value, dim) == self.rows and tensor_inside(value) is None
        )

    def _has_row_sequence(self, key: int | str, value: Any, dim: int, said: bool) -> bool:
        found = False
        settled = self.options.learned.settled
        for path, sequence in row_sequences(value):
            length = _length(sequence, dim)
            if length != self.rows:
                settled.add((key, path))
                if said and not path and self._module is not None:
                    raise ValueError(
                        f"batch_dim= says that argument {self._name(key)!r} has the batch's rows, "
                        f"but there are {self.rows} rows and {length} elements"
                    )
            elif said:
                found = True
            elif self.rows > 1 and (key, path) not in settled:
                name = self._name(key)
                raise ValueError(
                    f"argument {name + path!r} is a {type(sequence).__name__} of {length} "
                    f"elements, as many as the batch has rows: say whether it is to be cut, "
                    f"SphereParallel(..., batch_dim={{{name!r}: 0}}), or every shard needs all of "
                    f"it: whole=({name!r},)"
                )
        return found

    def _refuse_objects(self, key: int | str, leaves: list[Any], dim: int) -> None:
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

    # ---- what the shards get ----

    @property
    def sizes(self) -> list[int]:
        """Rows of each shard that runs."""
        return [end - begin for begin, end in self.bounds]

    @property
    def places(self) -> int:
        """Leaves of the tree in which the shards are summed: 1, 12, 144 or 1728."""
        places = 1
        while places < self.shards:
            places *= _core.KISSING
        return places

    @property
    def weights(self) -> list[float]:
        """Each shard's share of the rows."""
        return [size / self.total for size in self.sizes]

    def by_leaf(self, values: Sequence[Tensor | None]) -> list[Tensor | None]:
        """One place for each leaf of the tree, of one value for each shard that runs."""
        places: list[Tensor | None] = [None] * self.places
        for leaf, value in zip(self.leaves, values, strict=True):
            places[leaf] = value
        return places

    def outside_objects(self, leaves: list[Any]) -> list[Any]:
        """Those that are no part of a distribution or a key-value cache."""
        inside = {*self._in_objects}
        return [v for i, v in enumerate(leaves) if i not in inside] if inside else leaves

    def parts(self, shard: int) -> list[Any]:
        """The leaves of the values for one shard."""
        return self.cut(*self.bounds[shard])

    def cut(self, begin: int, end: int) -> list[Any]:
        """The leaves of the values for some of the rows."""
        values = [
            v if d is None else _rows_of(v, d, begin, end)
            for v, d in zip(self.flat, self.dims, strict=True)
        ]
        for i in self._in_objects:
            if self.dims[i] is None and isinstance(values[i], Tensor):
                values[i] = values[i].clone()  # an object's method may write to it (a cache's does)
        return values

    def build(self, leaves: list[Any]) -> list[Any]:
        """The arguments with other leaves."""
        begin, values = 0, []
        for _, end, nesting in self._spans:
            values.append(unflatten(leaves[begin:end], nesting))
            begin = end
        return values

    @property
    def flags(self) -> tuple[Any, ...]:
        """Numbers and texts that are arguments, which may say what the module returns."""
        return tuple(v for v in self._values if isinstance(v, (bool, int, float, str, enum.Enum)))

    def described(self) -> str:
        """For errors in a shard: how each argument was cut."""
        begin, texts = 0, []
        for key, end, _ in self._spans:
            kinds: dict[str, int] = {}
            for value, dim in zip(self.flat[begin:end], self.dims[begin:end], strict=True):
                text = _cut_text(value, dim)
                kinds[text] = kinds.get(text, 0) + 1
            begin = end
            several = [f"{n} x {text}" if n > 1 else text for text, n in kinds.items() if text]
            if several:
                texts.append(f"{self._name(key)}: {'; '.join(several[:4])}")
        return (
            f"SphereParallel cut the arguments into shards, {' | '.join(texts)} "
            "(batch_dim= and whole= of SphereParallel say otherwise)"
        )


def rows_to_tune_by(tensors: Sequence[Tensor], options: SplitOptions) -> int:
    """About how many rows a batch has: ways to run it are measured per row. Raises nothing."""
    for value in tensors:
        if not value.is_nested and value.dim() > 0:
            return max(1, value.shape[min(options.default_dim, value.dim() - 1)])
    return 1


def _cut_text(value: Any, dim: int | None) -> str:
    if isinstance(value, Tensor):
        shape = f"{tuple(value.shape)}"
        return f"{shape} whole" if dim is None else f"{shape} along dimension {dim}"
    if dim is not None:
        return f"a {type(value).__name__} of {len(value)}, by elements"
    return ""


def _length(value: Any, dim: int) -> int:
    if isinstance(value, np.ndarray):
        return int(value.shape[dim]) if dim < value.ndim else -1
    return len(value)


def _rows_of(value: Any, dim: int, begin: int, end: int) -> Any:
    if isinstance(value, Tensor):
        if dim == 0:
            return aligned(value.detach()[begin:end])
        return aligned(value.detach().narrow(dim, begin, end - begin).contiguous())
    if isinstance(value, np.ndarray):
        return value[(slice(None),) * dim + (slice(begin, end),)]
    if isinstance(value, deque):
        return deque(itertools.islice(value, begin, end))
    return value[begin:end]


def without_dim(sizes: Sequence[int], dim: int | None) -> tuple[int, ...]:
    """A shape beside its rows."""
    return tuple(sizes) if dim is None else (*sizes[:dim], *sizes[dim + 1 :])


def aligned(piece: Tensor) -> Tensor:
    """The same values at storage that starts where kernels like it."""
    return piece.clone() if piece.data_ptr() % _ALIGNMENT else piece
