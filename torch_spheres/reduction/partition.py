"""How the shards of a batch are divided over processes.

The leaves of the hierarchy stand in the order of the fixed sum tree, siblings together, and rank
*r* of *W* owns the *r*-th of *W* equal blocks. Where *W* divides twelve these are whole *symmetry
groups* (the subtree under kissing sphere *g*: shards *g*, *g* + 12, ...), the *virtual ranks*;
with more levels there are leaves for more ranks. A block is made up of a few complete subtrees of
the tree (*parts*), so a rank's sums are those that one process would have on its way to the total,
whatever *W* is. There are at most two where *W* divides twelve, or is 18, 24, 36, 48, 72 or 144;
and at most four for any *W* with 144 leaves, six with 1728.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import pairwise

__all__ = [
    "GROUPS",
    "Division",
    "Part",
    "divide",
    "fitting",
    "parts_of",
    "run_of",
    "shard_bounds",
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
    """Half-open row ranges of the shards, as ``torch.tensor_split`` cuts: the first
    ``rows % shards`` have one row more. ValueError for ``rows`` < 0 or ``shards`` < 1.
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


def run_of(part: Part) -> tuple[int, int, int]:
    """A part as children of one sphere: which of the twelve, from and to, of how many leaves each.

    The sphere is the lowest one of which that is true: all twelve children rather than one.
    """
    first, last = part
    each = 1
    while each * GROUPS < last - first:
        each *= GROUPS
    begin = first // each % GROUPS
    return begin, begin + (last - first) // each, each


def parts_of(first: int, last: int) -> list[Part]:
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


def fitting(leaves: int) -> list[int]:
    """The numbers of processes that can share so many leaves evenly."""
    return [world for world in range(1, leaves + 1) if leaves % world == 0]


def way_out(world: int, leaves: int) -> str:
    """For errors: what to use where so many processes cannot share so many leaves evenly."""
    text = f"use one of {fitting(leaves)}"
    for levels, more in enumerate(_LEAVES, 1):
        if world > 0 and more % world == 0:
            return f"{text}, or levels={levels}"
    return text


class Division:
    """Who of `world` processes owns which of the leaves. Made by `divide`.

    Attributes:
        parts: of each rank, the complete subtrees that its leaves make up.
        places: 12, 144 or 1728: of the tree's leaves, those at which a part may begin; the fewest.
    """

    def __init__(self, world: int, leaves: int) -> None:
        if leaves not in _LEAVES:
            raise ValueError(f"a hierarchy has 1, 12, 144 or 1728 leaves, got {leaves}")
        if leaves % world:
            raise ValueError(f"{world} processes cannot share {leaves} leaves evenly")
        self.leaves, self._order = leaves, tree_order(leaves)
        block = leaves // world
        self.parts = [parts_of(r * block, (r + 1) * block) for r in range(world)]
        self.places = min(GROUPS, leaves)
        begins = [first for parts in self.parts for first, _ in parts]
        while any(first % (leaves // self.places) for first in begins):
            self.places *= GROUPS
        self._owned = [
            sorted(self._order[r * block : (r + 1) * block], key=lambda leaf: (leaf % GROUPS, leaf))
            for r in range(world)
        ]

    def owned(self, rank: int) -> list[int]:
        """A rank's shards, by group: in the order in which it has their rows."""
        return self._owned[rank]

    def in_part(self, part: Part) -> Sequence[int]:
        """The shards of a part."""
        return self._order[part[0] : part[1]]

    @functools.lru_cache(maxsize=64)  # noqa: B019  # of a few divisions, which `divide` keeps
    def counts(self, rows: int) -> list[int]:
        """How many of a batch's rows each rank has."""
        sizes = [b - a for a, b in shard_bounds(rows, self.leaves)]
        return [sum(sizes[leaf] for leaf in own) for own in self._owned]

    def ranges(self, rank: int, rows: int) -> list[range]:
        """Of a batch's rows, those that a rank has: of each of its shards, in its order."""
        bounds = shard_bounds(rows, self.leaves)
        return [range(*bounds[leaf]) for leaf in self._owned[rank]]

    def place(self, part: Part) -> int:
        """Where a part's sum stands among `places` ones, for the tree over all of them.

        It stands for all of the part's leaves, of which the others are absent: what is absent is
        left out of the tree, and so what is added is the tree over all leaves.
        """
        return tree_order(self.places)[part[0] // (self.leaves // self.places)]


@functools.lru_cache(maxsize=64)
def divide(world: int, leaves: int) -> Division:
    """The division of so many leaves (1, 12, 144 or 1728) over so many processes.

    Raises:
        ValueError: they do not share them evenly.
    """
    return Division(world, leaves)
