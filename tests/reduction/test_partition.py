"""Who owns which leaves, for any number of ranks that divides them; and the bits of their sums."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import reference
import torch
from effort import rounds
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_spheres.data.sampler import SphereBatchSampler
from torch_spheres.reduction.partition import (
    children_of,
    complete_subtrees,
    divide,
    possible_world_sizes,
    tree_order,
    way_out,
)
from torch_spheres.reduction.streaming_sum import StreamingSum
from torch_spheres.reduction.tree_sum import tree_sum


def subtrees(first, leaves):
    """All complete subtrees of the tree over leaves `first`, ..., as ranges: as DESIGN has it."""
    if leaves == 1:
        return {(first, first + 1)}
    child = leaves // 12
    runs = [
        (0, 12),
        (0, 8),
        *((i, i + 4) for i in (0, 4, 8)),
        *((i, i + 2) for i in range(0, 12, 2)),
    ]
    found = {(first + a * child, first + b * child) for a, b in runs}
    return found.union(*(subtrees(first + c * child, child) for c in range(12)))


EVERY = [(world, leaves) for leaves in (12, 144) for world in possible_world_sizes(leaves)]
MORE = [(world, 1728) for world in (1, 6, 8, 27, 64, 144, 216, 1728)]


@pytest.mark.parametrize(("world", "leaves"), EVERY + MORE)
def test_a_rank_s_block_is_a_few_complete_subtrees(world, leaves):
    complete, division, block = subtrees(0, leaves), divide(world, leaves), leaves // world
    places = [division.place(part) for parts in division.parts for part in parts]
    assert len({*places}) == len(places) and max(places) < division.places
    for r, parts in enumerate(division.parts):
        assert {*parts} <= complete
        assert [i for a, b in parts for i in range(a, b)] == [*range(r * block, (r + 1) * block)]
        # No two that stand side by side are one: there are not fewer.
        assert not any((a, d) in complete for (a, b), (c, d) in pairwise(parts))
        assert {*division.owned(r)} == {*tree_order(leaves)[r * block : (r + 1) * block]}
    if 12 % world == 0 or world in (12, 24, 36, 48, 72, 144):
        assert max(map(len, division.parts)) <= 2
    if 12 % world == 0:  # whole symmetry groups
        for r in range(world):
            own = [leaf for leaf in range(leaves) if leaf % 12 * world // 12 == r]
            assert division.owned(r) == sorted(own, key=lambda leaf: (leaf % 12, leaf))


def test_a_part_is_a_run_of_children_of_its_lowest_sphere():
    assert children_of((0, 12)) == (0, 12, 1)
    assert children_of((24, 36)) == (0, 12, 1)  # all of sphere 1.2's, rather than one of the root's
    assert children_of((96, 144)) == (8, 12, 12)
    assert children_of((18, 20)) == (6, 8, 1)
    assert children_of((143, 144)) == (11, 12, 1)
    assert complete_subtrees(18, 36) == [(18, 20), (20, 24), (24, 36)]
    assert complete_subtrees(0, 12) == [(0, 12)]
    assert [complete_subtrees(r * 6, r * 6 + 6) for r in range(2)] == [
        [(0, 4), (4, 6)],
        [(6, 8), (8, 12)],
    ]
    assert [complete_subtrees(r * 4, r * 4 + 4) for r in range(3)] == [
        [(0, 4)],
        [(4, 8)],
        [(8, 12)],
    ]


@settings(max_examples=rounds(60))
@given(
    case=st.sampled_from(EVERY + MORE[:4]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    density=st.floats(0.02, 1),
    concurrency=st.integers(1, 6),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_ranks_sums_make_up_the_tree(case, dtype, density, concurrency, seed):
    """Each rank folds its shards, which finish in any order; the sums are put in their places."""
    (world, leaves), rng = case, random.Random(seed)
    division = divide(world, leaves)
    generator = torch.Generator().manual_seed(seed)
    values = [
        (torch.randn(3, generator=generator) * 10.0 ** (k % 5 - 2)).to(dtype)
        if rng.random() < density
        else None
        for k in range(leaves)
    ]
    absent = {k for k, value in enumerate(values) if value is None}
    column = [None] * division.places
    for rank, parts in enumerate(division.parts):
        shards = [k for k in division.owned(rank) if values[k] is not None]
        sums = {}

        def emit(part, twelve, sums=sums, parts=parts):
            assert part not in sums
            first, last = parts[part]
            if last - first > 1 and not absent.intersection(division.in_part((first, last))):
                # The last additions are those of whoever gets it, who makes them into a message.
                assert sum(v is not None for v in twelve) > 1
            sums[part] = tree_sum([None if v is None else v[0] for v in twelve])

        fold = StreamingSum(leaves, shards, concurrency, parts, emit)
        running = []
        for _ in shards:
            while running and (
                len(running) == concurrency or fold._alive == fold.limit or rng.random() < 0.5
            ):
                k = running.pop(rng.randrange(len(running)))
                fold.add(k, [values[k].clone()])
            assert fold._alive < fold.limit, "begin() would wait for ever"
            running.append(fold.begin())
        for k in rng.sample(running, len(running)):
            fold.add(k, [values[k].clone()])
        present = {p for p, part in enumerate(parts) if {*division.in_part(part)} - absent}
        assert {*sums} == present
        assert fold._alive == 0
        for part, total in sums.items():
            column[division.place(parts[part])] = total
    wanted = reference.tree(values)
    total = tree_sum(column)
    if wanted is None:
        assert total is None
    else:
        assert torch.equal(total.to(dtype), wanted)


class FakeSpheres:
    def __init__(self, leaves):
        self.leaves = leaves

    def map(self, fn, items):
        return [fn(item) for item in items]

    def distribute_work(self, items, fn):
        raise AssertionError


@pytest.mark.parametrize(("world", "leaves"), EVERY + MORE[:4])
@pytest.mark.parametrize("rows", [0, 1, 7, 12, 13, 100, 143, 150, 1000])
def test_ranks_yield_their_parts_of_the_groups(world, leaves, rows):
    spheres, found = FakeSpheres(leaves), [[] for _ in range(12)]
    whole = [*range(5000, 5000 + rows)]
    groups = SphereBatchSampler(whole, max(rows, 1), spheres=spheres).groups(whole)
    for rank in range(world):
        batches = SphereBatchSampler(
            whole, max(rows, 1), spheres=spheres, rank=rank, world_size=world
        )
        mine = next(iter(batches), [])
        shards = batches.own_shards(mine)
        assert shards == {k: part for k, part in enumerate(batches.shards(whole)) if k in shards}
        assert [*shards] == divide(world, leaves).owned(rank) or world == 1
        assert len(mine) == divide(world, leaves).counts(rows)[rank]
        own = batches.own_groups(mine)
        if world > 1:
            assert [row for rows in own for row in rows] == mine
        first = min(leaf % 12 for leaf in divide(world, leaves).owned(rank))
        for g, part in enumerate(own, first):
            found[g] += part
        assert batches.map(sum, mine) == [sum(part) if part else None for part in own]
    # (With fewer ranks than groups their rows are in the group's order: it is never cut.)
    assert [sorted(part) for part in found] == groups
    assert 12 % world or found == groups


def test_the_way_out_names_levels_that_fit():
    assert way_out(24, 12) == "use one of [1, 2, 3, 4, 6, 12], or levels=3"
    assert way_out(27, 144).endswith("144], or levels=4")
    assert way_out(5, 12) == way_out(-1, 12) == "use one of [1, 2, 3, 4, 6, 12]"
    assert way_out(2, 1) == "use one of [1], or levels=2"
    with pytest.raises(ValueError, match="24 processes cannot share 12 leaves evenly"):
        divide(24, 12)
    with pytest.raises(ValueError, match="1, 12, 144 or 1728, or a divisor of that, got 7"):
        divide(1, 7)
