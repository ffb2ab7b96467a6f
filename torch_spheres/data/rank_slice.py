"""A rank's rows of each batch that several processes share.

The iterators of a wrapped loader have a `RankSlice` and call `sync_epoch` when an epoch begins.
"""

from __future__ import annotations

import functools
import warnings
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch

from torch_spheres.data.data_digest import digest_of_dataset, digest_of_samples
from torch_spheres.data.empty_slice import EmptySlice, without_rows
from torch_spheres.data.loader_config import LoaderConfig, dataset_length
from torch_spheres.data.resume import LoaderState
from torch_spheres.data.worker_info import current_batch
from torch_spheres.distributed.group import Ranks, note_local_epoch
from torch_spheres.runtime.stack_level import users_level

__all__ = ["RankSlice", "sync_epoch"]


def sync_epoch(config: LoaderConfig, resumed: LoaderState | None) -> None:
    """Checks that all ranks begin the same epoch, and gives them rank 0's random state.

    (An evaluation on one rank alone may have drawn from it.)

    Raises:
        ValueError: the ranks' loaders differ, or are resumed from different states.
    """
    ranks, loader = config.ranks, config.loader
    if ranks is None:
        note_local_epoch()
        return
    resumed_crc = None
    if resumed is not None:
        at = resumed.tasks, resumed.yielded, resumed.digest, resumed.base_seed, resumed.begun
        resumed_crc = zlib.crc32(repr(at).encode())
    contents, lists = digest_of_dataset(loader.dataset)
    facts = {
        "batch_size": loader.batch_size,
        "drop_last": loader.drop_last,
        "the number of samples": dataset_length(loader.dataset),
        "the checksum of the dataset": contents,
        "the state that it is resumed from": resumed_crc,
    }
    # A model that shares its batches compares those handed out, but not every model does.
    mine = [-1 if fact is None else int(fact) for fact in facts.values()]
    *columns, listed, counts, digests = ranks.meet(
        "the beginning of an epoch", [*mine, lists, *ranks.batches.latest]
    ).T.tolist()
    for name, values in zip(facts, columns, strict=True):
        if len({*values}) > 1:
            _refuse_epoch(ranks, name, values)
    if len({*counts}) == 1 and len({*digests}) > 1:
        _refuse_epoch(ranks, "the checksum of the batches before it", digests)
    if len({*listed}) > 1 and not ranks.has_warned_of_lists:
        ranks.has_warned_of_lists = True
        warnings.warn(
            f"the lists on the ranks' {type(loader.dataset).__name__} are not the same, or not in "
            "the same order (such as files as os.listdir() gives them, or names from a set): each "
            "rank has its own samples under the numbers of the batch's; sort them",
            UserWarning,
            stacklevel=users_level(),
        )
    own = loader.generator
    states = [torch.get_rng_state(), *([] if own is None else [own.get_state()])]
    first = ranks.gather(torch.cat(states), "the beginning of an epoch")[0]
    ranks.drew_alone = False
    if ranks.rank > 0:
        torch.set_rng_state(first[: len(states[0])].clone())
        if own is not None:
            own.set_state(first[len(states[0]) :].clone())


def _refuse_epoch(ranks: Ranks, name: str, values: Sequence[Any]) -> NoReturn:
    ranks.batches.forget()
    by_rank = ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(values))
    raise ValueError(
        f"the ranks begin different epochs: {name} is {by_rank} (-1: none); all have to load the "
        "same data, in the same order, and the same states"
    )


class RankSlice:
    """Selects this rank's rows of each batch, and logs the batches for the ranks' comparison.

    A rank owns some of the `shards`, and thereby rows.
    """

    def __init__(self, ranks: Ranks, shards: int) -> None:
        self._ranks, self._shards = ranks, shards
        self._digests: dict[int, int] = {}  # of samples that all ranks have read, by batch number
        rank, division = ranks.rank, ranks.divide(shards)

        @functools.lru_cache(maxsize=4)  # batches are of one size, but for the last
        def own_rows(rows: int) -> list[int]:
            return [row for own in division.ranges(rank, rows) for row in own]

        self._own_rows = own_rows
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """Begins a new epoch in the ranks' batch log."""
        self._log = self._ranks.batches.begin_epoch()

    def select(self, batch: Sequence[Any]) -> tuple[list[Any], list[int]]:
        """The rank's part of a batch's indices or samples, and its row numbers in the batch."""
        rows = self._own_rows(len(batch))
        if not rows:
            return EmptySlice(batch[:1]), [0]
        return [batch[row] for row in rows], rows

    def collate(self, collate_fn: Callable[[Any], Any], samples: Sequence[Any]) -> Any:
        """Collates this rank's of an iterable dataset's samples, all of which every rank reads."""
        self._digests[current_batch()] = digest_of_samples(samples)
        own, _ = self.select(samples)
        batch = collate_fn([*own])
        return without_rows(batch) if type(own) is EmptySlice else batch

    def log_batch(self, number: int, digest: int | None) -> None:
        """Logs that the loop gets batch `number` of the epoch; `digest` is of the index lists.

        None: an iterable dataset has no index lists, so that its samples are compared.
        """
        self._ranks.note_batch(self._shards)
        if digest is None:
            digest = self._digests.pop(number, -1)
        self._ranks.batches.add_batch(self._log, number + 1, digest)
