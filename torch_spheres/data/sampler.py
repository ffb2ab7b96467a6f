"""`SphereBatchSampler`: a batch sampler that splits batches over leaves, groups and ranks.

::

    batches = ts.SphereBatchSampler(RandomSampler(dataset), 768, spheres=spheres)
    loader = DataLoader(dataset, batch_sampler=batches)  # the plain BatchSampler's batches
    parts = batches.map(lambda rows: [dataset[i] for i in rows], batch)  # or by hand
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any

import torch
from torch.utils.data import BatchSampler, Sampler

from torch_spheres.data.batch_shards import BatchShards, Spheres, is_int
from torch_spheres.data.sampler_state import SamplerEpoch, draw_source, from_state
from torch_spheres.distributed.group import find_ranks, this_rank
from torch_spheres.reduction.partition import GROUPS, checked_shards
from torch_spheres.runtime.arguments import as_index

__all__ = ["RankBatch", "SphereBatchSampler"]


class RankBatch(list[int]):
    """A rank's indices of a global batch, as the sampler yields them.

    Attributes:
        whole: the global batch's indices.
        rows: positions in it of the rank's.
    """

    def __init__(self, whole: list[int], rows: list[int]) -> None:
        super().__init__(whole[row] for row in rows)
        self.whole, self.rows = whole, rows


class SphereBatchSampler(BatchShards, Sampler[list[int]]):
    """``BatchSampler(sampler, batch_size, drop_last)`` that knows the spheres.

    One process yields what BatchSampler yields and draws when it draws. Of several ranks, each
    yields its own rows, equally many batches, and advances its sampler alike.

    A batch of fewer rows than leaves leaves the last leaves empty, so a rank may yield ``[]``:
    DataLoader passes it on, and ``default_collate`` fails on it. Use ``drop_last=True`` with at
    least as many rows a batch as leaves, a ``collate_fn`` that takes an empty list, or `wrap`.

    Args:
        sampler: its indices become plain ints (from numpy's, 0-d tensors, ``__index__``).
        batch_size: rows of a global batch.
        drop_last: whether a last batch of fewer rows is left out.
        spheres: the `KissingSpheres` to split over. None: the layout of ``levels=2``, no runtime.
        rank: whose block of ``12 / world_size`` groups is yielded, in order. (With more levels
            there may be more ranks: each has a block of leaves, see reduction/partition.py.)
        world_size: number of ranks. Both None: those of `process_group`.
        process_group: None: torch's default group, if torch.distributed is initialised.
        shards: into how many a batch is cut, as of `SphereParallel`. None: one for each leaf.

    Attributes:
        sampler: as given.
        batch_size: as given.
        drop_last: as given.
        spheres: as given.
        rank: of this process, 0 to ``world_size - 1``.
        world_size: number of ranks; 1 for a process alone.
        epoch: the last argument of `set_epoch`; None before.

    Raises:
        TypeError: `spheres` is something else. While iterating: an index is a bool, a float or
            anything else that is no integer.
        ValueError: what BatchSampler refuses; a `world_size` that does not divide the leaves (12;
            1, 144 or 1728 with other ``levels``); a `rank` outside it.
    """

    def __init__(
        self,
        sampler: Sampler[int] | Iterable[int],
        batch_size: int,
        drop_last: bool = False,
        spheres: Spheres | None = None,
        *,
        rank: int | None = None,
        world_size: int | None = None,
        process_group: Any = None,
        shards: int | None = None,
    ) -> None:
        BatchSampler(sampler, batch_size, drop_last)  # for its errors
        if spheres is not None and not is_int(getattr(spheres, "leaves", None)):
            raise TypeError(f"spheres should be a KissingSpheres or None, but got {spheres!r}")
        number = checked_shards(shards, GROUPS if spheres is None else spheres.leaves)
        from_group = rank is None and world_size is None
        if from_group:
            rank, world_size = this_rank(process_group)
        super().__init__(number, spheres, rank, world_size)
        self.sampler = sampler
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.epoch: int | None = None  # the last argument of set_epoch
        self._current: SamplerEpoch | None = None  # of the newest iterator, until its end
        self._resumed: SamplerEpoch | None = None  # loaded, for the next iterator
        # The ranks' batch log compares batches by the sampler's number and its epoch's.
        self._ranks = find_ranks(process_group, self._shards) if from_group else None
        self._log_number = 0 if self._ranks is None else next(self._ranks.samplers)
        self._epochs_begun = 0

    def __getstate__(self) -> dict[str, Any]:
        """Without the process group, which cannot be copied: a copy's batches are not compared."""
        return {**vars(self), "_ranks": None}

    def __len__(self) -> int:
        """Batches in a whole epoch; TypeError where the sampler has no length."""
        return len(BatchSampler(self.sampler, self.batch_size, self.drop_last))

    def __iter__(self) -> Iterator[list[int]]:
        """Iterators yield independently, and draw nothing before their first ``next()``."""
        epoch, rows = self._begin()
        self._current = epoch
        ranks, log = self._ranks, None
        if ranks is not None:
            if not ranks.exists():
                raise RuntimeError(
                    "the process group that this sampler divides batches over was destroyed; make "
                    "the sampler anew, after init_process_group()"
                )
            self._epochs_begun += 1  # (negative: loaders' epochs have positive numbers)
            log = ranks.batches.begin_epoch(-(self._log_number << 32) - self._epochs_begun)
        while chunk := [*islice(rows, self.batch_size)]:
            if self.drop_last and len(chunk) < self.batch_size:
                break
            batch = _as_ints(chunk)
            epoch.count(batch)
            if ranks is not None and log is not None:
                ranks.note_batch(self._shards)
                ranks.batches.add_batch(log, epoch.position, epoch.digest)
            if self.world_size > 1:
                ranges = self._division.ranges(self.rank, len(batch))
                batch = RankBatch(batch, [*chain.from_iterable(ranges)])
            yield batch
        if self._current is epoch:
            self._current = None

    def set_epoch(self, epoch: int) -> None:
        """Calls ``sampler.set_epoch`` if there is one, and keeps the number for `state_dict`.

        After a load in mid-epoch, another epoch than the loaded one gives up what was left of it.

        Args:
            epoch: number of the epoch to come.

        Raises:
            TypeError: `epoch` is not an integer.
        """
        epoch = as_index("epoch", epoch)
        resumed, self.epoch = self._resumed, epoch
        if resumed is not None and resumed.position == 0:
            resumed.epoch = epoch
        elif resumed is not None and resumed.epoch != epoch:
            self._begin()  # a given generator is left as that epoch left it
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Saves where the newest iterator is.

        ``position`` counts *global batches handed out*: a DataLoader with workers prefetches, and
        is ahead of the loop. Between epochs (none begun, or the iterator is at its end) the state
        is that of the epoch to come, ``position`` 0. Any number of ranks may save it, and any other
        number resume from it.

        Draws are captured at the epoch's start and replayed: by the sampler's own ``state_dict``
        (one that resumes in mid-epoch will do), else its ``generator``, else torch's global RNG;
        not Python's, numpy's.

        Returns:
            Plain values and tensors, for ``torch.load(weights_only=True)``.
        """
        epoch = self._resumed or self._current or self._new_epoch()
        if epoch is self._current and epoch.kind == "sampler":
            epoch.now = draw_source(self.sampler).capture()
        own = {"batch_size": self.batch_size, "drop_last": self.drop_last}
        return copy.deepcopy(own | vars(epoch))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Has the next iterator yield the batches that were left; later ones begin anew.

        The global RNG stays as it is, and an epoch that had not begun draws from there: restore it
        as well.

        Args:
            state: from `state_dict`, on any rank of any world size.

        Raises:
            ValueError: another batch_size, drop_last or source of draws, or a key is missing.
            RuntimeError: at the first ``next()``: the sampler does not repeat the batches that
                were handed out.
        """
        source = draw_source(self.sampler)
        own = {"batch_size": self.batch_size, "drop_last": self.drop_last, "kind": source.kind}
        epoch = from_state(SamplerEpoch, state, "a SphereBatchSampler", own)
        self._current = None
        self._resumed = epoch if source.kind == "sampler" or epoch.position > 0 else None
        if source.kind != "global" and epoch.position == 0:  # others may draw before next()
            source.restore(epoch.start)
            with torch.random.fork_rng(devices=[]):
                if source.kind == "sampler" and [*islice(self.sampler, 1)]:
                    source.restore(epoch.start)  # it did not stand at the end of an old epoch
        if epoch.epoch is not None:
            self.set_epoch(epoch.epoch)

    def _new_epoch(self) -> SamplerEpoch:
        source, number = draw_source(self.sampler), getattr(self.sampler, "epoch", None)
        if not hasattr(self.sampler, "set_epoch") or not is_int(number):
            number = self.epoch  # else the sampler knows better: it was told directly, or counts
        return SamplerEpoch(number, source.kind, source.capture())

    def _begin(self) -> tuple[SamplerEpoch, Iterator[Any]]:
        """The epoch that an iterator begins or resumes, and its rows from there on."""
        saved, self._resumed = self._resumed, None
        if saved is None or saved.position == 0:
            return self._new_epoch(), iter(self.sampler)
        return _replayed(saved, self.sampler, self.batch_size)


def _replayed(
    saved: SamplerEpoch, sampler: Any, batch_size: int
) -> tuple[SamplerEpoch, Iterator[Any]]:
    """Draws the batches of a saved epoch again; returns the epoch and the rows that were left."""
    epoch = SamplerEpoch(saved.epoch, saved.kind, saved.start)
    source = draw_source(sampler)
    with torch.random.fork_rng(devices=[]):
        source.restore(saved.start)
        rows = iter(sampler)
        for _ in range(saved.position):
            epoch.count(_as_ints([*islice(rows, batch_size)]))
    if epoch.digest == saved.digest:
        return epoch, rows
    if saved.kind == "sampler":  # it counts its rows, and was behind when the epoch began
        source.restore(saved.now)
        return saved, iter(sampler)
    raise RuntimeError(
        f"the sampler does not repeat the {saved.position} batches of the saved epoch: resume "
        "with the same data and epoch; randomness of its own needs state_dict/load_state_dict"
    )


def _as_ints(indices: list[Any]) -> list[int]:
    if {*map(type, indices)} <= {int}:
        return indices
    # (`operator.index` would also take a tensor of one bool, or of one element in a row.)
    plain = [i.tolist() if isinstance(i, torch.Tensor) else i for i in indices]
    return [as_index("an index", i) for i in plain]
