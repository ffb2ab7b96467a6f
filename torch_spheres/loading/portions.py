"""A rank's portion of each batch that several processes share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_spheres import _compat
from torch_spheres.ranks import Ranks

__all__ = ["NoRows", "Portions", "collate_own", "same_random_state", "without_rows"]


class NoRows(list[Any]):
    """The index list of a rank without rows: of one sample, to see what a batch looks like."""


def without_rows(batch: Any) -> Any:
    """A collated batch with none of its rows: no tensor's, and no list's of texts."""

    def none_of(value: Any) -> Any:
        is_column = _is_texts(value) or (isinstance(value, Tensor) and value.dim() > 0)
        return value[:0] if is_column else value

    return _compat.pytree.tree_map(none_of, batch, is_leaf=_is_texts)


def _is_texts(value: Any) -> bool:
    """What `default_collate` makes of the samples' texts."""
    is_list = isinstance(value, (list, tuple)) and bool(value)
    return is_list and all(isinstance(v, (str, bytes)) for v in value)


def same_random_state(ranks: Ranks, own: torch.Generator | None) -> None:
    """Rank 0's, for what an epoch draws: an evaluation on one rank alone may have drawn as well."""
    states = [torch.get_rng_state(), *([] if own is None else [own.get_state()])]
    first = ranks.gather(torch.cat(states), "the beginning of an epoch")[0]
    if ranks.rank > 0:
        torch.set_rng_state(first[: len(states[0])].clone())
        if own is not None:
            own.set_state(first[len(states[0]) :].clone())


class Portions:
    """Which rows of a batch are this rank's.

    Args:
        ranks: who shares the batches.
        leaves: of the hierarchy, which are divided.
    """

    def __init__(self, ranks: Ranks, leaves: int) -> None:
        self._rank, self._division = ranks.rank, ranks.divide(leaves)

    @functools.lru_cache(maxsize=4)  # noqa: B019  # batches are of one size, but for the last
    def places(self, rows: int) -> list[int]:
        """In a batch of so many rows, in the order in which this rank has them."""
        return [place for own in self._division.ranges(self._rank, rows) for place in own]

    def of(self, index: Sequence[Any]) -> tuple[list[Any], list[int]]:
        """The part of an index list that is this rank's, and its places in it."""
        places = self.places(len(index))
        if not places:
            return NoRows(index[:1]), [0]
        return [index[place] for place in places], places


def collate_own(
    collate_fn: Callable[[Any], Any], portions: Portions, samples: Sequence[Any]
) -> Any:
    """Collates this rank's of an iterable dataset's samples, which every rank has to read."""
    mine, _ = portions.of(samples)
    batch = collate_fn([*mine])
    return without_rows(batch) if type(mine) is NoRows else batch
