"""How a batch is cut into shards: nested values, by rows."""

from __future__ import annotations

import enum
import itertools
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from torch_spheres.distributed.group import Ranks
from torch_spheres.reduction.partition import Division, shard_bounds, shard_leaves, tree_leaves
from torch_spheres.training.call_arguments import CallArguments
from torch_spheres.training.row_dims import RowDims
from torch_spheres.training.split_options import SplitOptions, argument_name

__all__ = ["Split", "SplitOptions", "aligned", "rows_to_tune_by", "without_dim"]

_ALIGNMENT = 64  # bytes; kernels choose their path by it, and so their bits


class Split:
    """Arguments cut by rows, as `torch.tensor_split` cuts.

    Args:
        arguments: of a call, or the targets of a loss.
        shards: how many pieces to cut at most.
        ranks: with whom the batch is shared; these are this rank's part of it, and `cut_as_rank`
            has to be told how many rows there are in all.
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
        arguments: CallArguments,
        shards: int,
        ranks: Ranks | None = None,
        options: SplitOptions | None = None,
        module: nn.Module | None = None,
        least: int = 1,
    ) -> None:
        self.shards = shards
        self._ranks, self._module = ranks, module
        arguments.caught.raise_if_any()
        options = SplitOptions() if options is None else options
        found = RowDims(arguments, options, module, may_be_empty=ranks is not None)
        self.arguments, self.rows, self.dims = found.arguments, found.rows, found.dims
        self.flat = [*found.arguments.leaves()]
        inside = itertools.chain(*(a.nesting.in_objects() for a in found.arguments.each))
        self._in_objects = [i for i, is_in in enumerate(inside) if is_in]
        self.total = self.rows  # of all ranks
        pieces = max(1, min(shards, self.rows // least))
        self.bounds = [(a, b) for a, b in shard_bounds(self.rows, pieces) if b > a]
        self.numbers = [*range(len(self.bounds))]  # of the shards that run

    def cut_as_rank(self, rows: list[int]) -> None:
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
        own = division.numbers(self._ranks.rank)
        sizes = [len(r) for r in division.ranges(self._ranks.rank, self.total)]
        cuts = [*itertools.accumulate(sizes, initial=0)]
        self.bounds = [(a, b) for a, b in itertools.pairwise(cuts) if b > a]
        self.numbers = [k for k, size in zip(own, sizes, strict=True) if size]

    def take_own(self, division: Division, rank: int) -> None:
        """Cuts anew, into the shards that a rank has of a batch that several share.

        Where each shard of the whole batch begins follows from the rows here.
        """
        sizes = division.sizes(rank, self.rows)
        cuts = [*itertools.accumulate(sizes, initial=0)]
        self.bounds = [(a, b) for a, b in itertools.pairwise(cuts) if b > a]
        numbers = zip(division.numbers(rank), sizes, strict=True)
        self.numbers = [k for k, size in numbers if size]

    # ---- what the shards get ----

    @property
    def sizes(self) -> list[int]:
        """Rows of each shard that runs."""
        return [end - begin for begin, end in self.bounds]

    @property
    def leaves(self) -> list[int]:
        """Of the tree: where each shard that runs is summed."""
        leaves = shard_leaves(self.shards)
        return [leaves[k] for k in self.numbers]

    @property
    def tree_size(self) -> int:
        """Leaves of the tree in which the shards are summed: 1, 12, 144 or 1728."""
        return tree_leaves(self.shards)

    @property
    def weights(self) -> list[float]:
        """Each shard's share of the rows."""
        return [size / self.total for size in self.sizes]

    def weighted(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Values of each shard times its share of the rows, whose sum is their mean."""
        return [v * w for v, w in zip(values, self.weights, strict=True)]

    def with_grad(self) -> list[int]:
        """The numbers of the leaves that require a gradient."""
        return [i for i, v in enumerate(self.flat) if isinstance(v, Tensor) and v.requires_grad]

    def by_leaf(self, values: Sequence[Tensor | None]) -> list[Tensor | None]:
        """One place for each leaf of the tree, of one value for each shard that runs."""
        places: list[Tensor | None] = [None] * self.tree_size
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

    @property
    def flags(self) -> tuple[Any, ...]:
        """Numbers and texts that are arguments, which may say what the module returns."""
        values = (argument.value for argument in self.arguments.each)
        return tuple(v for v in values if isinstance(v, (bool, int, float, str, enum.Enum)))

    def described(self) -> str:
        """For errors in a shard: how each argument was cut."""
        dims, texts = iter(self.dims), []
        for key, _, leaves, _ in self.arguments.each:
            kinds = Counter(_cut_text(leaf, next(dims)) for leaf in leaves)
            several = [f"{n} x {text}" if n > 1 else text for text, n in kinds.items() if text]
            if several:
                texts.append(f"{argument_name(self._module, key)}: {'; '.join(several[:4])}")
        return (
            f"SphereParallel cut the arguments into shards, {' | '.join(texts)} "
            "(batch_dim= and whole= of SphereParallel say otherwise; a sample alone needs a batch "
            "dimension, x[None])"
        )


def rows_to_tune_by(arguments: CallArguments, options: SplitOptions) -> int:
    """About how many rows a batch has: ways to run it are measured per row. Raises nothing."""
    for value in arguments.tensors():
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
