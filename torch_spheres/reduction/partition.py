"""Divides rows over shards, and shards over the processes (ranks) of a group.

The leaves are put in the order of the fixed sum tree, siblings together, and rank *r* of *W* owns
the *r*-th of *W* equal blocks of leaves. If *W* divides twelve, a block is a number of whole
*symmetry groups* (the subtree under kissing sphere *g*: shards *g*, *g* + 12, ...). A block
consists of a few complete subtrees of the sum tree, its *parts*. So each rank's partial sums are
partial sums of one process too, and the total has the same bits for every *W*. A block has at most
two parts if *W* divides twelve or is 18, 24, 36, 48, 72 or 144; otherwise at most four (144 leaves)
or six (1728).

A batch may be cut into fewer *shards* than there are leaves: shard *j* of *S* then stands for the
*j*-th of *S* equal blocks of the leaves in the tree's order. Its gradient goes into the tree at the
first leaf of the block, whose other leaves are absent. Numbers of shards are the divisors of 12,
and with more levels of 144 and 1728; the tree is the smallest one that they divide.

`distributed` exchanges the parts' sums, `training` and `data` cut batches.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import pairwise

from torch_spheres.runtime.arguments import as_index

__all__ = [
    "GROUPS",
    "Division",
    "Part",
    "checked_shards",
    "children_of",
    "complete_subtrees",
    "divide",
    "possible_world_sizes",
    "shard_bounds",
    "shard_leaves",
    "tree_leaves",
    "tree_order",
    "way_out",
]

GROUPS = 12  # symmetry groups: the children of a sphere, the virtual ranks of a batch
_LEAVES = (1, GROUPS, GROUPS**2, GROUPS**3)  # of levels 1 to 4

# Complete subtrees among the twelve children of one sphere: how many, and at which of them they
# may begin. See `torch_spheres.reduction.tree_sum`.
_RUNS = ((12, (0,)), (8, (0,)), (4, (0, 4, 8)), (2, (0, 2, 4, 6, 8, 10)), (1, range(GROUPS)))

Part = tuple[int, int]  # of leaves in the tree's order, a half-open range


def shard_bounds(rows: int, shards: int) -> list[tuple[int, int]]:
    """Cuts rows into shards as ``torch.tensor_split`` does.

    Args:
        rows: of the batch, at least 0.
        shards: at least 1.

    Returns:
        For each shard the half-open range of its rows. The first ``rows % shards`` shards have one
        row more than the others.

    Raises:
        ValueError: `rows` or `shards` is less than that.
    """
    if rows < 0 or shards < 1:
        raise ValueError(f"need rows >= 0 and shards >= 1, but got rows={rows}, shards={shards}")
    size, extra = divmod(rows, shards)
    cuts = [k * size + min(k, extra) for k in range(shards + 1)]
    return list(pairwise(cuts))


@functools.cache
def tree_order(leaves: int) -> tuple[int, ...]:
    """The leaves from left to right in the tree: all twelve of a last inner node together."""
    if leaves == 1:
        return (0,)
    inner = tree_order(leaves // GROUPS)
    step = leaves // GROUPS
    return tuple(node + step * child for node in inner for child in range(GROUPS))


def tree_leaves(shards: int) -> int:
    """The leaves of the tree in which so many shards are summed: 1, 12, 144 or 1728.

    The smallest number that `shards` divides; for numbers that divide none, which only ways to run
    a batch have that need not be reproducible, the smallest that has room.
    """
    fits = [leaves for leaves in _LEAVES if leaves % shards == 0]
    return min(fits or [leaves for leaves in _LEAVES if leaves >= shards])


@functools.cache
def shard_leaves(shards: int) -> tuple[int, ...]:
    """The leaf at which each shard's gradient goes into the tree: the first one of its block."""
    leaves = tree_leaves(shards)
    if leaves == shards or leaves % shards:
        return tuple(range(shards))
    return tree_order(leaves)[:: leaves // shards]


def checked_shards(shards: int | None, leaves: int) -> int:
    """The number of shards that a user has given, or one for each of a hierarchy's leaves.

    Raises:
        TypeError: it is no integer.
        ValueError: it does not divide the leaves.
    """
    if shards is None:
        return leaves
    shards = as_index("shards", shards)
    if shards < 1 or leaves % shards:
        more = "" if leaves == _LEAVES[-1] else "; there are more leaves with more levels"
        raise ValueError(
            f"shards must divide the {leaves} leaves of the spheres, got {shards}: use one of "
            f"{possible_world_sizes(leaves)}{more}"
        )
    return shards


def children_of(part: Part) -> tuple[int, int, int]:
    """A part as children of one sphere, the lowest possible: all twelve rather than one.

    Returns:
        The half-open range of the children, 0 to 12, and how many leaves each of them has.
    """
    first, last = part
    each = 1
    while each * GROUPS < last - first:
        each *= GROUPS
    begin = first // each % GROUPS
    return begin, begin + (last - first) // each, each


def complete_subtrees(first: int, last: int) -> list[Part]:
    """The fewest complete subtrees that make up leaves `first` to `last` - 1, in tree order."""
    parts = []
    while first < last:
        size = max(
            run * each
            for each in (1, GROUPS, GROUPS**2)
            for run, begins in _RUNS
            if first % each == 0 and first // each % GROUPS in begins and first + run * each <= last
        )
        parts.append((first, first + size))
        first += size
    return parts


def possible_world_sizes(shards: int) -> list[int]:
    """The numbers of processes that can share so many shards evenly."""
    return [world for world in range(1, shards + 1) if shards % world == 0]


def way_out(world: int, shards: int) -> str:
    """For errors: what to use where so many processes cannot share so many shards evenly."""
    text = f"use one of {possible_world_sizes(shards)}"
    if shards not in _LEAVES and world > 0 and tree_leaves(shards) % world == 0:
        return f"{text}, or another number of shards="
    for levels, more in enumerate(_LEAVES, 1):
        if world > 0 and more % world == 0:
            return f"{text}, or levels={levels}"
    return text


class Division:
    """Who of `world` processes owns which of the shards. Made by `divide`.

    Attributes:
        shards: into which a batch is cut.
        leaves: of the tree.
        parts: of each rank, the complete subtrees that its leaves make up.
        places: 12, 144 or 1728: of the tree's leaves, those at which a part may begin; the fewest.
    """

    def __init__(self, world: int, shards: int) -> None:
        if shards < 1 or _LEAVES[-1] % shards:
            raise ValueError(
                "a batch is cut into as many shards as there are leaves, 1, 12, 144 or 1728, or "
                f"a divisor of that, got {shards}"
            )
        if shards % world:
            what = "leaves" if shards in _LEAVES else "shards"
            raise ValueError(f"{world} processes cannot share {shards} {what} evenly")
        self.shards, self.leaves = shards, tree_leaves(shards)
        self._order = tree_order(self.leaves)
        block = self.leaves // world
        self.parts = [complete_subtrees(r * block, (r + 1) * block) for r in range(world)]
        self.places = min(GROUPS, self.leaves)
        begins = [first for parts in self.parts for first, _ in parts]
        while any(first % (self.leaves // self.places) for first in begins):
            self.places *= GROUPS
        number = {leaf: k for k, leaf in enumerate(shard_leaves(shards))}
        mine = [self._order[r * block : (r + 1) * block] for r in range(world)]
        # Of all leaves by group, the order in which a rank has their rows; fewer shards have theirs
        # in the order of the tree, in which their numbers are.
        by_group = [sorted(own, key=lambda leaf: (leaf % GROUPS, leaf)) for own in mine]
        if shards != self.leaves:
            by_group = [[leaf for leaf in own if leaf in number] for own in mine]
        self._owned = by_group
        self._numbers = [[number[leaf] for leaf in own] for own in by_group]

    def owned(self, rank: int) -> list[int]:
        """The leaves of a rank's shards, in the order in which it has their rows."""
        return self._owned[rank]

    def numbers(self, rank: int) -> list[int]:
        """The numbers of a rank's shards, in the order in which it has their rows."""
        return self._numbers[rank]

    def in_part(self, part: Part) -> Sequence[int]:
        """The leaves of a part."""
        return self._order[part[0] : part[1]]

    @functools.lru_cache(maxsize=64)  # noqa: B019  # of a few divisions, which `divide` keeps
    def counts(self, rows: int) -> list[int]:
        """How many of a batch's rows each rank has."""
        sizes = [b - a for a, b in shard_bounds(rows, self.shards)]
        return [sum(sizes[k] for k in own) for own in self._numbers]

    def ranges(self, rank: int, rows: int) -> list[range]:
        """Of a batch's rows, those that a rank has: of each of its shards, in its order."""
        bounds = shard_bounds(rows, self.shards)
        return [range(*bounds[k]) for k in self._numbers[rank]]

    def sizes(self, rank: int, own_rows: int) -> list[int]:
        """How many rows each of a rank's shards has, in its order, of so many rows of the rank.

        What they are more than a multiple of its shards has gone to the first ones by number.
        """
        numbers = self._numbers[rank]
        bounds = shard_bounds(own_rows, len(numbers))
        size = {k: b - a for k, (a, b) in zip(sorted(numbers), bounds, strict=True)}
        return [size[k] for k in numbers]

    def place(self, part: Part) -> int:
        """Where a part's sum stands among `places` ones, for the tree over all of them.

        The sum stands for all of the part's leaves. The others are absent and add nothing, so the
        tree over all places gives what the tree over all leaves would.
        """
        return tree_order(self.places)[part[0] // (self.leaves // self.places)]


@functools.lru_cache(maxsize=64)
def divide(world: int, shards: int) -> Division:
    """The division of so many shards over so many processes.

    Args:
        world: processes.
        shards: 1, 12, 144 or 1728, as many as the hierarchy has leaves, or a divisor of that.

    Raises:
        ValueError: they do not share them evenly.
    """
    return Division(world, shards)
