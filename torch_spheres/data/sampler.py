"""Batches of indices, their split over the twelve symmetry groups, and where an epoch stands.

batches = ts.SphereBatchSampler(RandomSampler(dataset), 768, spheres=spheres)
loader = DataLoader(dataset, batch_sampler=batches)        # the plain BatchSampler's batches
parts = batches.map(lambda rows: [dataset[i] for i in rows], batch)         # or by hand
"""

from __future__ import annotations

import copy
import inspect
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Protocol, TypeVar

import torch
from torch.utils.data import BatchSampler, Sampler

from torch_spheres.distributed.group import find_ranks, this_rank
from torch_spheres.reduction.partition import GROUPS, divide, shard_bounds, way_out
from torch_spheres.runtime.arguments import as_index

T = TypeVar("T")


class _Spheres(Protocol):  # what the sampler needs of a KissingSpheres
    @property
    def leaves(self) -> int: ...
    def map(self, fn: Callable[[list[int]], Any], items: list[list[int]], /) -> list[Any]: ...
    def distribute_work(self, items: list[list[int]], fn: Callable[[list[int]], Any], /) -> Any: ...


class SphereBatchSampler(Sampler[list[int]]):
    """``BatchSampler(sampler, batch_size, drop_last)`` that knows the spheres.

    ``spheres``: the ``KissingSpheres`` to split over; None: ``levels=2``'s layout, no runtime.
    ``rank``, ``world_size``: yield this rank's block of ``12 / world_size`` groups, in order (with
    more levels there may be more ranks: each has a block of leaves, see reduction/partition.py);
    None: those of ``process_group`` (None: the default, if torch.distributed is initialised).

    - One process yields what BatchSampler yields and draws when it draws. Indices become plain
      ints (from numpy's, 0-d tensors, ``__index__``); bools, floats and the rest: TypeError.
    - Every rank yields as many batches and advances its sampler alike, and :meth:`state_dict`
      counts global batches: four ranks can save it and three resume from it.
    - A batch of fewer rows than leaves leaves the last of these empty, so a rank may yield ``[]``:
      DataLoader passes it on, and ``default_collate`` fails on it. Use ``drop_last=True`` with as
      many rows a batch as leaves, or a ``collate_fn`` that takes an empty list, or `wrap`.

    ValueError: what BatchSampler refuses; a ``world_size`` that does not divide the leaves (12;
    1, 144 or 1728 with other ``levels``); a ``rank`` outside it.
    """

    def __init__(
        self,
        sampler: Sampler[int] | Iterable[int],
        batch_size: int,
        drop_last: bool = False,
        spheres: _Spheres | None = None,
        *,
        rank: int | None = None,
        world_size: int | None = None,
        process_group: Any = None,
    ) -> None:
        BatchSampler(sampler, batch_size, drop_last)  # refuses what is none of these
        if spheres is not None and not _is_int(getattr(spheres, "leaves", None)):
            raise TypeError(f"spheres should be a KissingSpheres or None, but got {spheres!r}")
        self._leaves = GROUPS if spheres is None else spheres.leaves
        self.sampler = sampler
        self.batch_size = batch_size
        self.drop_last = drop_last
        by_group = False
        if rank is None and world_size is None:
            rank, world_size = this_rank(process_group)
            by_group = True
        world_size = 1 if world_size is None else world_size
        rank = 0 if rank is None and world_size == 1 else rank
        self.spheres = spheres
        self.epoch: int | None = None  # what set_epoch was told last
        self._newest: _Epoch | None = None  # of the iterator that began last, until its end
        self._pending: _Epoch | None = None  # loaded, for the iterator that begins next
        self._group_count = min(self._leaves, GROUPS)
        whole = _is_int(world_size) and world_size > 0
        if not whole or self._leaves % world_size:
            way = way_out(world_size if whole else 0, self._leaves)
            raise ValueError(f"{world_size=} does not divide the leaves ({self._leaves}): {way}")
        if not isinstance(rank, int) or not _is_int(rank) or not 0 <= rank < world_size:
            raise ValueError(f"rank should be from 0 to {world_size - 1}, but got {rank=}")
        self.rank, self.world_size = rank, world_size
        self._whole: list[int] | None = None  # the global batch that was cut last
        self._places: list[int] | None = None  # in it, of the rows that were yielded
        self._division = divide(world_size, self._leaves)
        self._owned = self._division.owned(rank)
        touched = [leaf % self._group_count for leaf in self._owned]
        self._own = slice(touched[0], touched[-1] + 1)  # this rank's groups, or its parts of them
        # To be compared between ranks: batches of this sampler, and how often it was iterated.
        self._ranks = find_ranks(process_group, self._leaves) if by_group else None
        self._number = 0 if self._ranks is None else next(self._ranks.samplers)
        self._begun = 0

    def __getstate__(self) -> dict[str, Any]:
        """Without the process group, which cannot be copied: what copies yield is not compared."""
        return {**vars(self), "_ranks": None}

    def __len__(self) -> int:
        """Batches in a whole epoch; TypeError where the sampler has no length."""
        return len(BatchSampler(self.sampler, self.batch_size, self.drop_last))

    def shards(self, batch: Sequence[int]) -> list[list[int]]:
        """A *global* batch's rows per leaf; the last are ``[]`` with fewer rows than leaves."""
        return [list(batch[a:b]) for a, b in shard_bounds(len(batch), self._leaves)]

    def groups(self, batch: Sequence[int]) -> list[list[int]]:
        """A *global* batch's rows per symmetry group: twelve lists, or one with ``levels=1``.
        Group *g* is shards *g*, *g* + 12, ...: its list's own ``shard_bounds`` over its leaves.
        """
        shards, count = self.shards(batch), self._group_count
        return [[*chain.from_iterable(shards[g::count])] for g in range(count)]

    def own_groups(self, batch: Sequence[int]) -> list[list[int]]:
        """A batch *as this rank yielded it*, split into a list for each group that it owns (or
        owns leaves of).
        """
        groups: list[list[int]] = [[] for _ in range(self._group_count)]
        for shard, rows in self.own_shards(batch).items():
            groups[shard % self._group_count] += rows
        return groups[self._own]

    def own_shards(self, batch: Sequence[int]) -> dict[int, list[int]]:
        """A batch *as this rank yielded it*: the rows of each shard that it owns, as
        `GradientHook.add` has them. With fewer rows than leaves some are ``[]``.
        """
        if self.world_size == 1:
            return dict(enumerate(self.shards(batch)))
        # Of the global split, the rows that are over went to the first leaves: here too.
        bounds = shard_bounds(len(batch), len(self._owned))
        size = {leaf: b - a for leaf, (a, b) in zip(sorted(self._owned), bounds, strict=True)}
        rows = iter(batch)
        return {leaf: [*islice(rows, size[leaf])] for leaf in self._owned}

    def map(self, fn: Callable[[list[int]], T], batch: Sequence[int]) -> list[T | None]:
        """``fn(rows)`` on the spheres for each of this rank's groups; results in group order.

        ``batch`` is one that this sampler yielded. Group *g*'s list is work item *g*, queued on
        kissing sphere *g*; a sibling may steal it. ``fn`` sees no empty list: an empty group's
        result is None. RuntimeError without spheres.
        """
        spheres, items, work = self._work(batch, fn)
        results = spheres.map(work, items) if items else []
        return [*results, *[None] * (self._group_count - len(results))][self._own]

    def distribute(self, batch: Sequence[int], fn: Callable[[list[int]], Any]) -> Any:
        """:meth:`map` without waiting for results: returns ``spheres.distribute_work``'s."""
        spheres, items, work = self._work(batch, fn)
        return spheres.distribute_work(items, work)

    def _work(self, batch: Sequence[int], fn: Callable[[list[int]], Any]) -> tuple[Any, ...]:
        """Item g is group g's list: lower ranks' are ``[]``, the empty ones at the end are cut."""
        if self.spheres is None:
            raise RuntimeError("no spheres to hand work to: give the sampler spheres=...")
        items = [*[[] for _ in range(self._own.start)], *self.own_groups(batch)]
        while items and not items[-1]:
            items.pop()
        if all(items):
            return self.spheres, items, fn
        return self.spheres, items, lambda rows: fn(rows) if rows else None

    def __iter__(self) -> Iterator[list[int]]:
        """Iterators yield independently, and draw nothing before their first ``next()``."""
        epoch, rows = self._begin()
        self._newest = epoch
        log = None
        if self._ranks is not None and not self._ranks.exists():
            raise RuntimeError(
                "the process group that this sampler divides batches over was destroyed; make the "
                "sampler anew, after init_process_group()"
            )
        if self._ranks is not None:  # (negative: other numbers than those of loaders)
            self._begun += 1
            log = self._ranks.batches.begin_epoch(-(self._number << 32) - self._begun)
        while chunk := [*islice(rows, self.batch_size)]:
            if self.drop_last and len(chunk) < self.batch_size:
                break
            batch = _as_ints(chunk)
            epoch.count(batch)
            if self._ranks is not None and log is not None:
                self._ranks.note_batch(self._leaves)
                self._ranks.batches.add_batch(log, epoch.position, epoch.digest)
            if self.world_size > 1:
                ranges = self._division.ranges(self.rank, len(batch))
                self._places = [*chain.from_iterable(ranges)]
                self._whole, batch = batch, [batch[place] for place in self._places]
            yield batch
        if self._newest is epoch:
            self._newest = None

    def set_epoch(self, epoch: int) -> None:
        """Forwarded to ``sampler.set_epoch`` if there is one, and remembered in the state. After a
        load in mid-epoch, another epoch than the loaded one gives up what was left of that.
        """
        epoch = as_index("epoch", epoch)
        pending, self.epoch = self._pending, epoch
        if pending is not None and pending.position == 0:
            pending.epoch = epoch
        elif pending is not None and pending.epoch != epoch:
            self._begin()  # a given generator is left as that epoch left it
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Where the iterator that began last is: plain values, tensors (for ``weights_only``).

        ``position`` counts *global batches handed out*: a DataLoader with workers prefetches, and
        is ahead of the loop. Between epochs (none begun, or all of it handed out and the iterator
        at its end) the state is that of the epoch to come, ``position`` 0. Draws are captured at
        the epoch's start and replayed: by the sampler's own ``state_dict`` (one that resumes in
        mid-epoch will do), else its ``generator``, else torch's global RNG; not Python's, numpy's.
        """
        epoch = self._pending or self._newest or self._new_epoch()
        if epoch is self._newest and epoch.kind == "sampler":
            epoch.now = source_of(self.sampler)[1]()
        own = {"batch_size": self.batch_size, "drop_last": self.drop_last}
        return copy.deepcopy(own | vars(epoch))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next iterator to begin yields the batches that were left, on any rank of any world
        size; later ones begin at the beginning. The global RNG stays as it is, and an epoch that
        had not begun draws from there: restore it as well. ValueError: another batch_size,
        drop_last or source of draws, or a key missing. RuntimeError at the first ``next()``: the
        sampler does not repeat the batches that were handed out.
        """
        kind, _, restore = source_of(self.sampler)
        here = {"batch_size": self.batch_size, "drop_last": self.drop_last, "kind": kind}
        epoch = loaded(_Epoch, state, "a SphereBatchSampler", here)
        self._newest = None
        self._pending = epoch if kind == "sampler" or epoch.position > 0 else None
        if kind != "global" and epoch.position == 0:  # others may draw from it before next()
            restore(epoch.start)
            with torch.random.fork_rng(devices=[]):
                if kind == "sampler" and [*islice(self.sampler, 1)]:
                    restore(epoch.start)  # it did not stand at the end of an old epoch
        if epoch.epoch is not None:
            self.set_epoch(epoch.epoch)

    def _new_epoch(self) -> _Epoch:
        (kind, capture, _), number = source_of(self.sampler), getattr(self.sampler, "epoch", None)
        if not hasattr(self.sampler, "set_epoch") or not _is_int(number):
            number = self.epoch  # else the sampler knows better: it was told directly, or counts
        return _Epoch(number, kind, capture())

    def _begin(self) -> tuple[_Epoch, Iterator[Any]]:
        """The epoch that an iterator begins or resumes, and its rows from there on."""
        saved, self._pending = self._pending, None
        if saved is None or saved.position == 0:
            return self._new_epoch(), iter(self.sampler)
        epoch, restore = _Epoch(saved.epoch, saved.kind, saved.start), source_of(self.sampler)[2]
        with torch.random.fork_rng(devices=[]):
            restore(saved.start)
            rows = iter(self.sampler)
            for _ in range(saved.position):
                epoch.count(_as_ints([*islice(rows, self.batch_size)]))
        if epoch.digest == saved.digest:
            return epoch, rows
        if saved.kind == "sampler":  # it counts its rows, and was behind when the epoch began
            restore(saved.now)
            return saved, iter(self.sampler)
        raise RuntimeError(
            f"the sampler does not repeat the {saved.position} batches of the saved epoch: resume "
            "with the same data and epoch; randomness of its own needs state_dict/load_state_dict"
        )


@dataclass
class _Epoch:  # what is saved of one pass over the sampler
    epoch: int | None
    kind: str  # what the sampler draws from, see source_of
    start: Any  # its state before the first draw
    position: int = 0  # global batches handed out
    digest: int = 0  # of all their indices: a replay must give the same
    now: Any = None  # the sampler's own state at the position, if it has one

    def count(self, batch: list[Any]) -> None:
        self.position += 1
        self.digest = digest(self.digest, batch)


def loaded(
    kind: Callable[..., T], state: Mapping[str, Any], owner: str, here: Mapping[str, Any]
) -> T:
    """A dataclass from what `owner` saved of one; ValueError unless all fields, and `here`, fit."""
    names = list(inspect.signature(kind).parameters)
    if missing := {*names, *here} - {*state}:
        raise ValueError(f"not a state of {owner}: no {sorted(missing)} in {sorted(state)}")
    if differ := [f"{k}={state[k]!r}, not {v!r}" for k, v in here.items() if state[k] != v]:
        raise ValueError(f"the state of {owner} was saved with {'; '.join(differ)}")
    return kind(**copy.deepcopy({name: state[name] for name in names}))


def digest(before: int, index: Any) -> int:
    """Of the index lists so far and one more (or one index): of all that is in them."""
    if hasattr(index, "tolist"):
        index = index.tolist()
    try:
        content = array("q", index if isinstance(index, (list, tuple)) else (index,)).tobytes()
    except (TypeError, OverflowError):  # no integers: keys, or indices in tuples
        content = repr(index).encode()
    return zlib.crc32(content, before)


def source_of(sampler: Any) -> tuple[str, Callable[[], Any], Callable[[Any], object]]:
    """What a sampler draws from: its kind, and how to capture and to restore that."""
    save, load = (getattr(sampler, name, None) for name in ("state_dict", "load_state_dict"))
    if callable(save) and callable(load):
        return "sampler", lambda: copy.deepcopy(save()), lambda saved: load(copy.deepcopy(saved))
    if isinstance(own := getattr(sampler, "generator", None), torch.Generator):
        return "generator", own.get_state, lambda saved: own.set_state(saved.cpu())
    return "global", torch.get_rng_state, lambda saved: torch.set_rng_state(saved.cpu())


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _as_ints(indices: list[Any]) -> list[int]:
    if {*map(type, indices)} <= {int}:
        return indices
    # (`operator.index` would take a tensor of one bool, or of one element in a row, as well.)
    plain = [i.tolist() if isinstance(i, torch.Tensor) else i for i in indices]
    return [as_index("an index", i) for i in plain]
