"""Divides rows over shards, and shards over the processes (ranks) of a group.

The leaves are put in the order of the fixed sum tree, siblings together, and rank *r* of *W* owns
the *r*-th of *W* equal blocks of leaves. If *W* divides twelve, a block is a number of whole
*symmetry groups* (the subtree under kissing sphere *g*: shards *g*, *g* + 12, ...). A block
consists of a few complete subtrees of the sum tree, its *parts*. So each rank's partial sums are
partial sums of one process too, and the total has the same bits for every *W*. A block has at most
two parts if *W* divides twelve or is 18, 24, 36, 48, 72 or 144; otherwise at most four (144 leaves)
or six (1728).

`distributed` exchanges the parts' sums, `training` and `data` cut batches.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import pairwise

__all__ = [
    "GROUPS",
    "Division",
    "Part",
    "children_of",
    "complete_subtrees",
    "divide",
    "possible_world_sizes",
    "shard_bounds",
    "tree_order",
    "way_out",
]

GROUPS = 12  # symmetry groups: the children of a sphere, the virtual ranks of a batch
_LEAVES = (1, GROUPS, GROUPS**2, GROUPS**3)  # of levels 1 to 4

# Runs of siblings that the tree of tree_sum.py adds before anything else: length, first siblings.
_RUNS = ((12, (0,)), (8, (0,)), (4, (0, 4, 8)), (2, (0, 2, 4, 6, 8, 10)), (1, range(GROUPS)))

Part = tuple[int, int]
"""A complete subtree: a half-open range of leaves in the tree's order."""


def shard_bounds(rows: int, shards: int) -> list[tuple[int, int]]:
    """Returns each shard's half-open range of rows, as ``torch.tensor_split`` cuts.

    The first ``rows % shards`` shards have one row more than the others.

    Raises:
        ValueError: `rows` is less than 0 or `shards` less than 1.
    """
    if rows < 0 or shards < 1:
        raise ValueError(f"need rows >= 0 and shards >= 1, but got rows={rows}, shards={shards}")
    size, extra = divmod(rows, shards)
    cuts = [k * size + min(k, extra) for k in range(shards + 1)]
    return list(pairwise(cuts))


@functools.cache
def tree_order(leaves: int) -> tuple[int, ...]:
    """The leaves from left to right in the sum tree, siblings together."""
    if leaves == 1:
        return (0,)
    step = leaves // GROUPS
    inner = tree_order(step)
    return tuple(node + step * child for node in inner for child in range(GROUPS))


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
    """The fewest complete subtrees that make up leaves `first` to ``last - 1`` in tree order."""
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


def possible_world_sizes(leaves: int) -> list[int]:
    """The numbers of processes that can share the leaves evenly."""
    return [world for world in range(1, leaves + 1) if leaves % world == 0]


def way_out(world: int, leaves: int) -> str:
    """The end of an error's message: what to use where `world` does not divide `leaves`."""
    text = f"use one of {possible_world_sizes(leaves)}"
    for levels, more in enumerate(_LEAVES, 1):
        if world > 0 and more % world == 0:
            return f"{text}, or levels={levels}"
    return text


class Division:
    """Which of the leaves each of `world` processes owns; made by `divide`.

    Attributes:
        leaves: 1, 12, 144 or 1728.
        parts: by rank, the complete subtrees of which its leaves consist.
        places: leaves of the smallest tree in which every part's sum can be one leaf.
    """

    def __init__(self, world: int, leaves: int) -> None:
        if leaves not in _LEAVES:
            raise ValueError(f"a hierarchy has 1, 12, 144 or 1728 leaves, got {leaves}")
        if leaves % world:
            raise ValueError(f"{world} processes cannot share {leaves} leaves evenly")
        self.leaves, self._order = leaves, tree_order(leaves)
        block = leaves // world
        self.parts = [complete_subtrees(r * block, (r + 1) * block) for r in range(world)]
        self.places = min(GROUPS, leaves)
        begins = [first for parts in self.parts for first, _ in parts]
        while any(first % (leaves // self.places) for first in begins):
            self.places *= GROUPS
        self._owned = [
            sorted(self._order[r * block : (r + 1) * block], key=lambda leaf: (leaf % GROUPS, leaf))
            for r in range(world)
        ]

    def owned(self, rank: int) -> list[int]:
        """A rank's shards, group by group, which is also the order of their rows on the rank."""
        return self._owned[rank]

    def in_part(self, part: Part) -> Sequence[int]:
        """The shards of a part, in tree order."""
        return self._order[part[0] : part[1]]

    @functools.lru_cache(maxsize=64)  # noqa: B019  # of a few divisions, which `divide` keeps
    def counts(self, rows: int) -> list[int]:
        """By rank, how many rows of a batch of `rows` it has."""
        sizes = [b - a for a, b in shard_bounds(rows, self.leaves)]
        return [sum(sizes[leaf] for leaf in own) for own in self._owned]

    def ranges(self, rank: int, rows: int) -> list[range]:
        """The rows of each shard that a rank owns, in the order of `owned`."""
        bounds = shard_bounds(rows, self.leaves)
        return [range(*bounds[leaf]) for leaf in self._owned[rank]]

    def place(self, part: Part) -> int:
        """The leaf, of a tree with `places` leaves, as which a part's sum is added.

        Absent leaves add nothing, so the part's sum stands for all its leaves.
        """
        return tree_order(self.places)[part[0] // (self.leaves // self.places)]


@functools.lru_cache(maxsize=64)
def divide(world: int, leaves: int) -> Division:
    """Divides 1, 12, 144 or 1728 leaves over `world` processes.

    Raises:
        ValueError: `world` does not divide `leaves`, or there is no hierarchy with `leaves` leaves.
    """
    return Division(world, leaves)
