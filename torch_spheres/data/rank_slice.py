"""A rank's portion of each batch that several processes share."""

from __future__ import annotations

import functools
import warnings
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from torch_spheres import _compat
from torch_spheres.data.data_digest import digest_of_dataset, digest_of_samples
from torch_spheres.data.worker_info import current_batch
from torch_spheres.distributed.group import Ranks, note_local_epoch
from torch_spheres.runtime.stack_level import users_level

if TYPE_CHECKING:
    from torch_spheres.data.loader import SphereLoader
    from torch_spheres.data.resume import Progress

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


def same_epoch(loader: SphereLoader[Any], resumed: Progress | None) -> None:
    """Has all ranks begin the same epoch: of the same loader, with rank 0's random state.

    (An evaluation on one rank alone may have drawn as well.)

    Raises:
        ValueError: the ranks' loaders differ, or are resumed from different states.
    """
    ranks, own = loader._membership.ranks, loader.generator
    if ranks is None:
        note_local_epoch()
        return
    place = None
    if resumed is not None:
        place = resumed.tasks, resumed.yielded, resumed.digest, resumed.base_seed, resumed.begun
    contents, lists = digest_of_dataset(loader.dataset)
    facts = {
        "batch_size": loader.batch_size,
        "drop_last": loader.drop_last,
        "the number of samples": _length_of(loader),
        "the checksum of the dataset": contents,
        "the state that it is resumed from": (
            None if place is None else zlib.crc32(repr(place).encode())
        ),
    }
    # (Calls of a model that shares its batches compare batches too; not all models do.)
    mine = [-1 if fact is None else int(fact) for fact in facts.values()]
    *columns, listed, counts, digests = ranks.meet(
        "the beginning of an epoch", [*mine, lists, *ranks.batches.latest]
    ).T.tolist()
    for name, values in zip(facts, columns, strict=True):
        if len({*values}) > 1:
            _refuse_epoch(ranks, f"{name} is {_by_rank(values)}")
    if len({*counts}) == 1 and len({*digests}) > 1:
        _refuse_epoch(ranks, f"the checksum of the batches before it is {_by_rank(digests)}")
    if len({*listed}) > 1 and not ranks.has_warned_of_lists:
        ranks.has_warned_of_lists = True
        warnings.warn(
            f"the lists on the ranks' {type(loader.dataset).__name__} are not the same, or not in "
            "the same order (such as files as os.listdir() gives them, or names from a set): each "
            "rank has its own samples under the numbers of the batch's; sort them",
            UserWarning,
            stacklevel=users_level(),
        )
    states = [torch.get_rng_state(), *([] if own is None else [own.get_state()])]
    first = ranks.gather(torch.cat(states), "the beginning of an epoch")[0]
    ranks.drew_alone = False
    if ranks.rank > 0:
        torch.set_rng_state(first[: len(states[0])].clone())
        if own is not None:
            own.set_state(first[len(states[0]) :].clone())


def _refuse_epoch(ranks: Ranks, what: str) -> NoReturn:
    ranks.batches.forget()
    raise ValueError(
        f"the ranks begin different epochs: {what} (-1: none); all have to load the same data, in "
        "the same order, and the same states"
    )


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
        self._digests[batch] = digest_of_samples(samples)

    def digest_of_samples(self, batch: int) -> int:
        """Of what was read for a batch; once."""
        return self._digests.pop(batch, -1)


def collate_own(
    collate_fn: Callable[[Any], Any], portions: Portions, samples: Sequence[Any]
) -> Any:
    """Collates this rank's of an iterable dataset's samples, which every rank has to read."""
    portions.read(current_batch(), samples)
    mine, _ = portions.of(samples)
    batch = collate_fn([*mine])
    return without_rows(batch) if type(mine) is NoRows else batch
