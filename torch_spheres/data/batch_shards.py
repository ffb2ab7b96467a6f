"""`BatchShards`: divides the rows of a batch over shards, symmetry groups and ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, Protocol, TypeVar

from torch_spheres.reduction.partition import (
    GROUPS,
    divide,
    shard_bounds,
    shard_leaves,
    tree_leaves,
    way_out,
)

__all__ = ["BatchShards", "Spheres", "is_int"]

T = TypeVar("T")


class Spheres(Protocol):
    """What `BatchShards` needs of a KissingSpheres."""

    @property
    def leaves(self) -> int:
        """As `KissingSpheres.leaves`."""

    def map(self, fn: Callable[[list[int]], Any], items: list[list[int]], /) -> list[Any]:
        """As `KissingSpheres.map`."""

    def distribute_work(self, items: list[list[int]], fn: Callable[[list[int]], Any], /) -> Any:
        """As `KissingSpheres.distribute_work`."""


class BatchShards:
    """The part of `SphereBatchSampler` that cuts batches; arguments and errors are those.

    Args:
        shards: into how many a batch is cut, checked.
        spheres: as of `SphereBatchSampler`.
        rank: as of `SphereBatchSampler`.
        world_size: as of `SphereBatchSampler`.
    """

    def __init__(
        self, shards: int, spheres: Spheres | None, rank: int | None, world_size: int | None
    ) -> None:
        world_size = 1 if world_size is None else world_size
        rank = 0 if rank is None and world_size == 1 else rank
        self.spheres = spheres
        self._shards = shards
        self._group_count = min(shards, GROUPS)
        rank = _checked_rank(rank, world_size, shards)
        self.rank, self.world_size = rank, world_size
        self._division = divide(world_size, shards)
        self._own_leaves = self._division.owned(rank)
        self._group_of = _groups(shards)
        touched = [self._group_of[leaf] for leaf in self._own_leaves]
        self._group_slice = slice(touched[0], touched[-1] + 1)  # groups that the rank has leaves of

    def shards(self, batch: Sequence[int]) -> list[list[int]]:
        """Cuts a *global* batch into shards.

        Args:
            batch: the indices of its rows.

        Returns:
            The indices of each shard; the last are ``[]`` with fewer rows than shards.
        """
        return [list(batch[a:b]) for a, b in shard_bounds(len(batch), self._shards)]

    def groups(self, batch: Sequence[int]) -> list[list[int]]:
        """Cuts a *global* batch into the rows of each symmetry group.

        Group *g* is shards *g*, *g* + 12, ...: its list's own ``shard_bounds`` over its leaves.

        Args:
            batch: the indices of its rows.

        Returns:
            The indices of each group: at most twelve lists.
        """
        groups: list[list[int]] = [[] for _ in range(self._group_count)]
        for group, rows in zip(self._group_of.values(), self.shards(batch), strict=True):
            groups[group] += rows
        return groups

    def own_groups(self, batch: Sequence[int]) -> list[list[int]]:
        """Cuts this rank's batch into the rows of each of its groups.

        Args:
            batch: indices *as this rank yielded them*.

        Returns:
            A list for each group that this rank owns leaves of.
        """
        groups: list[list[int]] = [[] for _ in range(self._group_count)]
        for leaf, rows in self.own_shards(batch).items():
            groups[self._group_of[leaf]] += rows
        return groups[self._group_slice]

    def own_shards(self, batch: Sequence[int]) -> dict[int, list[int]]:
        """Cuts this rank's batch into the rows of each of its shards.

        Args:
            batch: indices *as this rank yielded them*.

        Returns:
            The indices of each shard that this rank owns; with fewer rows than shards some are
            ``[]``. The keys are leaves, as `GradientHook.add` takes them: the first of each block
            where there are fewer shards than leaves.
        """
        if self.world_size == 1:
            return dict(zip(shard_leaves(self._shards), self.shards(batch), strict=True))
        rows = iter(batch)
        sizes = self._division.sizes(self.rank, len(batch))
        return {k: [*islice(rows, n)] for k, n in zip(self._own_leaves, sizes, strict=True)}

    def map(self, fn: Callable[[list[int]], T], batch: Sequence[int]) -> list[T | None]:
        """Runs ``fn(rows)`` on the spheres for each of this rank's groups.

        Group *g*'s list is work item *g*, queued on kissing sphere *g*; a sibling may steal it.

        Args:
            fn: called with a group's indices; not with an empty list.
            batch: one that this sampler yielded.

        Returns:
            Results in group order; None for an empty group.

        Raises:
            RuntimeError: the sampler has no spheres.
            Exception: any that `KissingSpheres.map` raises.
        """
        spheres, items, work = self._work(batch, fn)
        results = spheres.map(work, items) if items else []
        return [*results, *[None] * (self._group_count - len(results))][self._group_slice]

    def distribute(self, batch: Sequence[int], fn: Callable[[list[int]], Any]) -> Any:
        """Does what `map` does, without waiting for results.

        Args:
            batch: one that this sampler yielded.
            fn: called with a group's indices; not with an empty list.

        Returns:
            The `Work` of ``spheres.distribute_work``.

        Raises:
            RuntimeError: the sampler has no spheres.
            Exception: any that `KissingSpheres.distribute_work` raises.
        """
        spheres, items, work = self._work(batch, fn)
        return spheres.distribute_work(items, work)

    def _work(self, batch: Sequence[int], fn: Callable[[list[int]], Any]) -> tuple[Any, ...]:
        """Item g is group g's list: lower ranks' are ``[]``, empty ones at the end are cut off."""
        if self.spheres is None:
            raise RuntimeError("no spheres to hand work to: give the sampler spheres=...")
        items = [*[[] for _ in range(self._group_slice.start)], *self.own_groups(batch)]
        while items and not items[-1]:
            items.pop()
        if all(items):
            return self.spheres, items, fn
        return self.spheres, items, lambda rows: fn(rows) if rows else None


def is_int(value: Any) -> bool:
    """Whether it is an integer of Python's, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def _groups(shards: int) -> dict[int, int]:
    """The group of each shard's leaf; where there are at most twelve, each shard is one."""
    few = shards <= GROUPS
    return {leaf: k if few else leaf % GROUPS for k, leaf in enumerate(shard_leaves(shards))}


def _checked_rank(rank: int | None, world_size: int, shards: int) -> int:
    whole = is_int(world_size) and world_size > 0
    if not whole or shards % world_size:
        way = way_out(world_size if whole else 0, shards)
        what = "leaves" if tree_leaves(shards) == shards else "shards"
        raise ValueError(f"{world_size=} does not divide the {what} ({shards}): {way}")
    if not isinstance(rank, int) or not is_int(rank) or not 0 <= rank < world_size:
        raise ValueError(f"rank should be from 0 to {world_size - 1}, but got {rank=}")
    return rank
