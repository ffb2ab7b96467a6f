"""A rank's portion of each batch that several processes share."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from torch_spheres import _compat
from torch_spheres.loading.info import current_batch
from torch_spheres.ranks import Ranks, draw_alone

if TYPE_CHECKING:
    from torch_spheres.loader import SphereLoader
    from torch_spheres.loading.progress import Progress

__all__ = ["NoRows", "Portions", "collate_own", "same_epoch", "without_rows"]


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


_BATCHES = "the checksum of the batches before it"


def same_epoch(loader: SphereLoader[Any], resumed: Progress | None) -> None:
    """Has all ranks begin the same epoch: of the same loader, with rank 0's random state.

    (An evaluation on one rank alone may have drawn as well.)

    Raises:
        ValueError: the ranks' loaders differ, or are resumed from different states.
    """
    ranks, own = loader._membership.ranks, loader.generator
    if ranks is None:
        draw_alone()
        return
    place = None
    if resumed is not None:
        place = resumed.tasks, resumed.yielded, resumed.digest, resumed.base_seed, resumed.begun
    facts = {
        "batch_size": loader.batch_size,
        "drop_last": loader.drop_last,
        "the number of samples": _length_of(loader),
        "the state that it is resumed from": None
        if place is None
        else zlib.crc32(repr(place).encode()),
        # (Calls of a model that shares its batches compare them too; not all models do.)
        _BATCHES: ranks.batches.latest,
    }
    mine = [-1 if fact is None else int(fact) for fact in facts.values()]
    table = ranks.meet("the beginning of an epoch", mine).T.tolist()
    for name, values in zip(facts, table, strict=True):
        known = {*values} - ({-1} if name == _BATCHES else set())
        if len(known) > 1:
            ranks.batches.forget()
            raise ValueError(
                f"the ranks begin different epochs: {name} is {_by_rank(values)} (-1: none); all "
                "have to load the same data, and the same states"
            )
    states = [torch.get_rng_state(), *([] if own is None else [own.get_state()])]
    first = ranks.gather(torch.cat(states), "the beginning of an epoch")[0]
    ranks.draws_alone = False
    if ranks.rank > 0:
        torch.set_rng_state(first[: len(states[0])].clone())
        if own is not None:
            own.set_state(first[len(states[0]) :].clone())


def _length_of(loader: SphereLoader[Any]) -> int | None:
    try:
        return len(loader.dataset)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None


def _by_rank(values: Sequence[Any]) -> str:
    return ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(values))


class Portions:
    """Which rows of a batch are this rank's.

    Args:
        ranks: who shares the batches.
        leaves: of the hierarchy, which are divided.
    """

    def __init__(self, ranks: Ranks, leaves: int) -> None:
        self._rank, self._division = ranks.rank, ranks.divide(leaves)
        self._digests: dict[int, int] = {}  # of samples that all ranks have read, by batch

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

    def read(self, batch: int, samples: Sequence[Any]) -> None:
        """All ranks have read these samples of an iterable dataset, for a batch of that number."""
        self._digests[batch] = _digest(samples)

    def digest_of_samples(self, batch: int) -> int:
        """Of what was read for a batch; once."""
        return self._digests.pop(batch, -1)


_LOOKED_AT = 64  # elements at either end of a tensor


def _digest(samples: Sequence[Any]) -> int:
    """Tells samples apart by their plain values and by both ends of their tensors."""
    crc = 0
    for leaf in _compat.pytree.tree_leaves(list(samples)):
        if isinstance(leaf, Tensor) and leaf.layout is torch.strided and leaf.is_cpu:
            raw = leaf.detach().resolve_conj().resolve_neg().reshape(-1)
            ends = torch.cat([raw[:_LOOKED_AT], raw[-_LOOKED_AT:]]).contiguous()
            crc = zlib.crc32(ends.view(torch.uint8).numpy().tobytes(), crc)
        elif isinstance(leaf, np.ndarray) and leaf.dtype != object:
            flat = leaf.reshape(-1)
            crc = zlib.crc32(np.concatenate([flat[:_LOOKED_AT], flat[-_LOOKED_AT:]]).tobytes(), crc)
        elif isinstance(leaf, (bool, int, float, complex, str, bytes)):
            crc = zlib.crc32(repr(leaf).encode(), crc)
    return crc


def collate_own(
    collate_fn: Callable[[Any], Any], portions: Portions, samples: Sequence[Any]
) -> Any:
    """Collates this rank's of an iterable dataset's samples, which every rank has to read."""
    portions.read(current_batch(), samples)
    mine, _ = portions.of(samples)
    batch = collate_fn([*mine])
    return without_rows(batch) if type(mine) is NoRows else batch
