"""How a batch is cut into shards: nested values, by rows."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from torch_spheres import _core
from torch_spheres.division import shard_bounds
from torch_spheres.nesting import flatten, unflatten
from torch_spheres.ranks import Ranks

__all__ = ["Split", "aligned"]

_ALIGNMENT = 64  # bytes; kernels choose their path by it, and so their bits


class Split:
    """Nested values cut by rows, as `torch.tensor_split` cuts.

    Args:
        value: anything nested that has tensors in it.
        shards: how many pieces to cut at most.
        ranks: with whom the batch is shared; `value` is this rank's part of it, and `share` has to
            be told how many rows there are in all.
        least: rows that a shard needs; fewer shards run where there are too few for all.

    Raises:
        ValueError: no tensor has rows, or not all have as many.
        TypeError: a tensor of a kind that cannot be cut by rows.
    """

    def __init__(self, value: Any, shards: int, ranks: Ranks | None = None, least: int = 1) -> None:
        self.flat, self.nesting = flatten(value)
        self.shards = shards
        self._ranks = ranks
        self.rows = self._count_rows()
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

    def _count_rows(self) -> int:
        rows = None
        for value in self.flat:
            if isinstance(value, PackedSequence):
                raise TypeError(
                    "SphereParallel cannot split a PackedSequence by rows; give it the padded "
                    "tensor and the lengths, and pack inside the module"
                )
            if not isinstance(value, Tensor) or value.dim() == 0:
                continue
            if value.is_nested or value.layout is not torch.strided:
                raise TypeError(
                    f"SphereParallel splits dense tensors by rows, but got one of layout "
                    f"{value.layout}{' (nested)' if value.is_nested else ''}; convert it inside "
                    "the module"
                )
            if rows is None:
                rows = value.shape[0]
            elif value.shape[0] != rows:
                raise ValueError(
                    "SphereParallel splits every tensor argument along its first dimension, but "
                    f"one has {rows} rows and another, of shape {tuple(value.shape)}, "
                    f"{value.shape[0]}; make a tensor that is not part of the batch an attribute "
                    "or a buffer of the module"
                )
        if rows is None:
            raise ValueError(
                "SphereParallel found no tensor with rows among the arguments to split over the "
                "spheres; call model.module(...) instead"
            )
        if rows == 0 and self._ranks is None:
            raise ValueError("SphereParallel got a batch of 0 rows")
        return rows

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

    def parts(self, shard: int) -> list[Any]:
        """The leaves of the values for one shard."""
        begin, end = self.bounds[shard]
        return [
            aligned(v.detach()[begin:end]) if isinstance(v, Tensor) and v.dim() > 0 else v
            for v in self.flat
        ]

    def build(self, leaves: list[Any]) -> Any:
        """The nested values with other leaves."""
        return unflatten(leaves, self.nesting)


def aligned(piece: Tensor) -> Tensor:
    """The same values at storage that starts where kernels like it."""
    return piece.clone() if piece.data_ptr() % _ALIGNMENT else piece
