"""SphereBatchSampler: the batches, their split over groups and ranks, and handing them over."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sampler_support import SAMPLERS, WORLDS, FakeSpheres, draws, every_sampler, thorough
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import torch_spheres as ts
from torch_spheres.data.sampler import SphereBatchSampler
from torch_spheres.reduction.partition import shard_bounds

# ---- as BatchSampler -----------------------------------------------------------------------


@thorough
@given(name=every_sampler, n=st.integers(1, 80), size=st.integers(1, 30), drop=st.booleans())
def test_yields_and_draws_as_batch_sampler(name: str, n: int, size: int, drop: bool) -> None:
    def trace(make: Callable[[Any], Any]) -> tuple[Any, ...]:
        torch.manual_seed(n)
        sampler = SAMPLERS[name](n)
        batches = make(sampler)
        seen = []
        for _ in range(2):
            for batch in batches:
                seen.append((batch, draws(sampler).tolist()))
            seen.append((None, draws(sampler).tolist()))
        return len(batches), seen

    ours = trace(lambda sampler: SphereBatchSampler(sampler, size, drop))
    assert ours == trace(lambda sampler: BatchSampler(sampler, size, drop))


def test_nothing_is_drawn_before_the_first_batch() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batches = iter(SphereBatchSampler(RandomSampler(range(9)), 2))
    assert torch.equal(torch.get_rng_state(), before)
    next(batches)
    assert not torch.equal(torch.get_rng_state(), before)


def test_attributes_and_missing_length() -> None:
    sampler = iter(range(5))
    batches = SphereBatchSampler(sampler, 2, True)
    assert (batches.sampler, batches.batch_size, batches.drop_last) == (sampler, 2, True)
    with pytest.raises(TypeError):
        len(batches)
    assert list(batches) == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    ("size", "drop"),
    [*((size, False) for size in (0, -3, 2.5, True, "4", None)), (2, 1), (2, None), (2, "no")],
)
def test_what_batch_sampler_refuses(size: Any, drop: Any) -> None:
    with pytest.raises(ValueError) as plain:
        BatchSampler(range(4), size, drop)
    with pytest.raises(ValueError, match=f"^{re.escape(str(plain.value))}$"):
        SphereBatchSampler(range(4), size, drop)


def test_bad_spheres() -> None:
    with pytest.raises(TypeError, match="KissingSpheres or None, but got 12"):
        SphereBatchSampler(range(4), 2, spheres=12)  # type: ignore[arg-type]


def test_integers_of_other_types_become_ints() -> None:
    rows: list[Any] = [0, np.int64(1), torch.tensor(2), np.array(3), torch.tensor(4).short()]
    (batch,) = SphereBatchSampler(rows, 5)
    assert batch == [0, 1, 2, 3, 4]
    assert {type(index) for index in batch} == {int}


@pytest.mark.parametrize(
    "index",
    [
        *(1.5, "a", None, True, (1, 2), np.bool_(True), np.float32(2), np.array([1])),
        *(torch.tensor(True), torch.tensor(2.5), torch.tensor([1])),
    ],
    ids=repr,
)
def test_indices_that_are_not_integers(index: Any) -> None:
    batches = iter(SphereBatchSampler([0, 1, 2, index], 2))
    assert next(batches) == [0, 1]
    with pytest.raises(TypeError, match="an index must be an integer, got "):
        next(batches)


# ---- the split -----------------------------------------------------------------------------


@given(rows=st.integers(0, 4000), shards=st.sampled_from([1, 5, 12, 144, 1728]))
def test_shard_bounds_cut_as_tensor_split(rows: int, shards: int) -> None:
    expected = [part.tolist() for part in torch.tensor_split(torch.arange(rows), shards)]
    assert [list(range(a, b)) for a, b in shard_bounds(rows, shards)] == expected


@pytest.mark.parametrize(("rows", "shards"), [(-1, 12), (5, 0)])
def test_bad_shard_bounds(rows: int, shards: int) -> None:
    with pytest.raises(ValueError, match=f"rows={rows}, shards={shards}"):
        shard_bounds(rows, shards)


def path(item: int, levels: int) -> list[int]:
    """The leaf of a work item: the digits of its number in base 12, the least first."""
    return [item // 12**level % 12 for level in range(levels - 1)]


@given(levels=st.sampled_from([1, 2, 3, 4]), rows=st.integers(0, 3000))
def test_groups_are_the_shards_below_a_kissing_sphere(levels: int, rows: int) -> None:
    batches = SphereBatchSampler(range(1), 1, spheres=FakeSpheres(levels))
    batch = [7 * row for row in range(rows)]
    shards = [part.tolist() for part in torch.tensor_split(torch.tensor(batch), 12 ** (levels - 1))]
    assert batches.shards(batch) == shards
    if levels == 1:
        assert batches.groups(batch) == [batch]
        return
    expected: list[list[int]] = [[] for _ in range(12)]
    for item, shard in enumerate(shards):
        expected[path(item, levels)[0]] += shard
    groups = batches.groups(batch)
    assert groups == expected
    for g, group in enumerate(groups):  # and the group's list alone gives its shards back
        bounds = shard_bounds(len(group), len(shards) // 12)
        assert [group[a:b] for a, b in bounds] == shards[g::12]


def test_the_default_layout_is_two_levels() -> None:
    batches = SphereBatchSampler(range(1), 1)
    assert batches.groups(range(26)) == SphereBatchSampler(
        range(1), 1, spheres=FakeSpheres(2)
    ).groups(range(26))
    assert [len(group) for group in batches.groups(range(26))] == [3, 3] + [2] * 10


# ---- ranks ---------------------------------------------------------------------------------


@thorough
@given(
    world=st.sampled_from(WORLDS),
    levels=st.sampled_from([2, 3, 4]),
    n=st.integers(1, 400),
    size=st.integers(1, 200),
    drop=st.booleans(),
)
def test_ranks_share_every_batch(world: int, levels: int, n: int, size: int, drop: bool) -> None:
    def run(**kwargs: Any) -> tuple[SphereBatchSampler, list[list[int]], torch.Tensor]:
        torch.manual_seed(0)
        batches = SphereBatchSampler(
            RandomSampler(range(n)), size, drop, FakeSpheres(levels), **kwargs
        )
        return batches, list(batches), torch.get_rng_state()

    whole, expected, rng = run()
    ranks = [run(rank=rank, world_size=world) for rank in range(world)]
    for _, _, rank_rng in ranks:
        assert torch.equal(rank_rng, rng)
    assert [len(rows) for _, rows, _ in ranks] == [len(expected)] * world
    for number, batch in enumerate(expected):
        groups = whole.groups(batch)
        own = [batches.own_groups(rows[number]) for batches, rows, _ in ranks]
        assert [*chain(*own)] == groups
        sequence = [*chain(*(rows[number] for _, rows, _ in ranks))]
        assert sequence == (batch if world == 1 or levels == 2 else [*chain(*groups)])
        assert sorted(sequence) == sorted(batch)


@pytest.mark.parametrize("world", [0, -1, 5, 7, 24, 2.0, True, "2"])
def test_bad_world_size(world: Any) -> None:
    with pytest.raises(
        ValueError, match=r"world_size=.* use one of \[1, 2, 3, 4, 6, 12\]"
    ) as error:
        SphereBatchSampler(range(4), 2, world_size=world)
    assert repr(world) in str(error.value)


def test_one_leaf_is_not_divided() -> None:
    with pytest.raises(
        ValueError, match=r"world_size=2 .*leaves \(1\): use one of \[1\], or levels=2"
    ):
        SphereBatchSampler(range(4), 2, spheres=FakeSpheres(1), world_size=2)


@pytest.mark.parametrize("rank", [-1, 3, 1.0, None])
def test_bad_rank(rank: Any) -> None:
    with pytest.raises(ValueError, match=f"from 0 to 2, but got rank={rank!r}"):
        SphereBatchSampler(range(4), 2, rank=rank, world_size=3)


def test_small_batches_leave_ranks_with_empty_lists() -> None:
    batches = SphereBatchSampler(range(15), 13, rank=3, world_size=4)
    assert list(batches) == [[10, 11, 12], []]
    dataset = TensorDataset(torch.arange(15))
    loader = DataLoader(dataset, batch_sampler=batches, collate_fn=len)
    assert list(loader) == [3, 0]
    with pytest.raises(IndexError):
        list(DataLoader(dataset, batch_sampler=batches))


# ---- handing over --------------------------------------------------------------------------


@given(
    levels=st.sampled_from([1, 2, 3]),
    world=st.sampled_from(WORLDS),
    rows=st.integers(1, 60),
    data=st.data(),
)
def test_item_g_is_group_g(levels: int, world: int, rows: int, data: st.DataObject) -> None:
    world = 1 if levels == 1 else world
    rank = data.draw(st.integers(0, world - 1))
    spheres = FakeSpheres(levels)
    batches = SphereBatchSampler(range(rows), rows, False, spheres, rank=rank, world_size=world)
    (batch,) = batches
    groups = batches.groups(range(rows))
    block = len(groups) // world
    own = range(rank * block, (rank + 1) * block)

    def fn(indices: list[int]) -> int:
        assert indices
        return sum(indices)

    assert batches.map(fn, batch) == [sum(groups[g]) if groups[g] else None for g in own]
    if batch:
        handed = spheres.items
        assert [handed[g] for g in own if groups[g]] == [groups[g] for g in own if groups[g]]
        assert not any(item for g, item in enumerate(handed) if g not in own)
    seen: list[int] = []
    assert batches.distribute(batch, seen.extend) == "handle"
    assert seen == (batch if world > 1 else [*chain(*groups)])


def test_handing_over_needs_spheres() -> None:
    batches = SphereBatchSampler(range(4), 2)
    with pytest.raises(RuntimeError, match="no spheres to hand work to: give the sampler spheres="):
        batches.map(len, [1])
    with pytest.raises(RuntimeError, match="no spheres"):
        batches.distribute([1], len)


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_real_spheres(levels: int) -> None:
    with ts.KissingSpheres(levels=levels) as spheres:
        batches = SphereBatchSampler(RandomSampler(range(100)), 30, spheres=spheres)
        for batch in batches:
            groups = batches.groups(batch)
            assert batches.map(lambda rows: rows, batch) == [rows or None for rows in groups]
            seen: list[int] = []
            batches.distribute(batch, seen.extend)
            spheres.wait()
            assert sorted(seen) == sorted(batch)
        assert batches.map(len, [5, 6])[:3] == ([2] if levels == 1 else [1, 1, None])
        assert batches.map(len, []) == [None] * len(groups)


def test_a_rank_on_real_spheres() -> None:
    with ts.KissingSpheres(levels=2) as spheres:
        batches = SphereBatchSampler(range(26), 26, spheres=spheres, rank=1, world_size=3)
        (batch,) = batches
        assert batches.map(sum, batch) == [10 + 11, 12 + 13, 14 + 15, 16 + 17]


def test_a_ranks_batch_knows_the_whole_one_whoever_else_iterates() -> None:
    batches = ts.SphereBatchSampler(range(48), 24, rank=1, world_size=2)
    first, other = iter(batches), iter(batches)
    batch = next(first)
    assert [*other][-1].whole == [*range(24, 48)]
    assert batch.whole == [*range(24)] and batch == [batch.whole[row] for row in batch.rows]
    again = pickle.loads(pickle.dumps(batch))
    assert (again, again.whole, again.rows) == (batch, batch.whole, batch.rows)
    assert type(next(iter(ts.SphereBatchSampler(range(48), 24)))) is list
