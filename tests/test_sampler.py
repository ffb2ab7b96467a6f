"""SphereBatchSampler: BatchSampler's batches, the split over groups and ranks, resumption."""

from __future__ import annotations

import copy
import io
import pickle
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import torch_spheres as ts
from torch_spheres.sampler import SphereBatchSampler, shard_bounds

WORLDS = (1, 2, 3, 4, 6, 12)
thorough = settings(deadline=None, max_examples=60)


class FakeSpheres:
    """The part of KissingSpheres that the sampler uses, in the calling thread."""

    def __init__(self, levels: int) -> None:
        self.levels = levels
        self.leaves = 12 ** (levels - 1)
        self.items: list[list[int]] = []  # of the latest call

    def map(self, fn: Callable[[list[int]], Any], items: list[list[int]]) -> list[Any]:
        self.items = items
        return [fn(item) for item in items]

    def distribute_work(self, items: list[list[int]], fn: Callable[[list[int]], Any]) -> str:
        self.map(fn, items)
        return "handle"


# ---- samplers of every kind ----------------------------------------------------------------


class TrackingSampler(Sampler[int]):
    """Its state is its position in the epoch, as torchdata's StatefulDistributedSampler's is."""

    def __init__(self, n: int) -> None:
        self.n, self.epoch, self.yielded, self.next_yielded = n, 0, 0, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.yielded, self.next_yielded = self.next_yielded, 0
        order = random.Random(self.epoch).sample(range(self.n), self.n)
        for index in order[self.yielded :]:
            self.yielded += 1
            yield index

    def __len__(self) -> int:
        return self.n

    def state_dict(self) -> dict[str, int]:
        return {"yielded": self.yielded}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next_yielded = state["yielded"]


class OwnRandomSampler(Sampler[int]):
    """Its state is that of its random numbers, and knows no position."""

    def __init__(self, n: int) -> None:
        self.n, self.random = n, random.Random(5)

    def __iter__(self) -> Iterator[int]:
        return iter(self.random.sample(range(self.n), self.n))

    def __len__(self) -> int:
        return self.n

    def state_dict(self) -> dict[str, Any]:
        return {"random": self.random.getstate()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        version, numbers, gauss = state["random"]
        self.random.setstate((version, tuple(numbers), gauss))


class CountingSampler(Sampler[int]):
    """Seeds its generator from an epoch that it counts itself, as accelerate's does."""

    def __init__(self, n: int) -> None:
        self.n, self.epoch = n, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        yield from random.Random(self.epoch).sample(range(self.n), self.n)
        self.epoch += 1

    def __len__(self) -> int:
        return self.n


def given_generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


SAMPLERS: dict[str, Callable[[int], Any]] = {
    "list": lambda n: list(range(n, 0, -1)),
    "sequential": lambda n: SequentialSampler(range(n)),
    "random": lambda n: RandomSampler(range(n)),
    "random, generator": lambda n: RandomSampler(range(n), generator=given_generator()),
    "random, replacement": lambda n: RandomSampler(range(n), replacement=True, num_samples=3 * n),
    "random, replacement, generator": lambda n: RandomSampler(
        range(n), replacement=True, num_samples=3 * n, generator=given_generator()
    ),
    "random, two rounds": lambda n: RandomSampler(
        range(n), num_samples=2 * n + n // 2, generator=given_generator()
    ),
    "subset": lambda n: SubsetRandomSampler(range(n)),
    "subset, generator": lambda n: SubsetRandomSampler(range(n), given_generator()),
    "weighted, generator": lambda n: WeightedRandomSampler(
        [1.0 + i for i in range(n)], n, generator=given_generator()
    ),
    "distributed": lambda n: DistributedSampler(range(n), num_replicas=1, rank=0, seed=4),  # type: ignore[arg-type]
    "tracking": TrackingSampler,
    "own random": OwnRandomSampler,
    "counting": CountingSampler,
}
every_sampler = st.sampled_from(sorted(SAMPLERS))


def saved(state: Any) -> Any:
    """The state as it comes back from a file."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def draws(sampler: Any) -> torch.Tensor:
    """The state of what a sampler from SAMPLERS draws from."""
    generator = getattr(sampler, "generator", None)
    return torch.get_rng_state() if generator is None else generator.get_state()


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


@pytest.mark.parametrize("size", [0, -3, 2.5, True, "4", None])
def test_bad_batch_size(size: Any) -> None:
    with pytest.raises(ValueError, match="batch_size=" + repr(size)):
        SphereBatchSampler(range(4), size)


@pytest.mark.parametrize("drop", [1, None, "no"])
def test_bad_drop_last(drop: Any) -> None:
    with pytest.raises(ValueError, match="drop_last=" + repr(drop)):
        SphereBatchSampler(range(4), 2, drop)


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
    with pytest.raises(TypeError) as error:
        next(batches)
    assert f"{index!r} ({type(index).__name__})" in str(error.value)


# ---- the split -----------------------------------------------------------------------------


@given(rows=st.integers(0, 4000), shards=st.sampled_from([1, 5, 12, 144, 1728]))
@settings(deadline=None)
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
@settings(deadline=None)
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
    with pytest.raises(ValueError, match=r"world_size=2 .* 1 group.*use one of \[1\]"):
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
@settings(deadline=None)
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


# ---- resumption ----------------------------------------------------------------------------


def run_epochs(batches: SphereBatchSampler, epochs: range) -> list[list[list[int]]]:
    seen = []
    for epoch in epochs:
        batches.set_epoch(epoch)
        seen.append(list(batches))
    return seen


@settings(deadline=None, max_examples=200)
@given(
    name=every_sampler,
    n=st.integers(1, 60),
    size=st.integers(1, 20),
    drop=st.booleans(),
    before=st.integers(0, 2),
    worlds=st.tuples(st.sampled_from(WORLDS), st.sampled_from(WORLDS)),
    again=st.booleans(),
    data=st.data(),
)
def test_resumed_epochs_are_the_uninterrupted_ones(
    name: str,
    n: int,
    size: int,
    drop: bool,
    before: int,
    worlds: tuple[int, int],
    again: bool,
    data: st.DataObject,
) -> None:
    def make(world: int, rank: int) -> SphereBatchSampler:
        return SphereBatchSampler(SAMPLERS[name](n), size, drop, rank=rank, world_size=world)

    torch.manual_seed(1)
    whole = make(1, 0)
    position = data.draw(st.integers(0, len(whole)), label="position")
    run_epochs(whole, range(before))
    whole.set_epoch(before)
    iterator = iter(whole)
    [*islice(iterator, position)]
    rng = torch.get_rng_state()
    left = list(iterator)
    after = draws(whole.sampler)
    then = run_epochs(whole, range(before + 1, before + 3))

    torch.manual_seed(1)
    saver = make(worlds[0], data.draw(st.integers(0, worlds[0] - 1), label="saver"))
    run_epochs(saver, range(before))
    saver.set_epoch(before)
    iterator = iter(saver)
    [*islice(iterator, position)]
    state = saved(saver.state_dict())
    assert state["position"] == position
    assert state["epoch"] == before

    same_draws = again or state["kind"] != "global"
    resumed: list[list[list[list[int]]]] = []
    for rank in range(worlds[1]):
        torch.manual_seed(99)
        batches = make(worlds[1], rank)
        [*islice(batches, data.draw(st.integers(0, 2), label="used"))]  # not a fresh object
        torch.manual_seed(7)
        if again:
            torch.set_rng_state(rng)
        callers = torch.get_rng_state()
        batches.load_state_dict(state)
        assert str(batches.state_dict()) == str(state)
        batches.set_epoch(before)
        resumed.append([list(batches)])
        moved = again or state["kind"] == "generator"
        assert torch.equal(draws(batches.sampler), after if moved else callers)
        if same_draws:
            resumed[-1] += run_epochs(batches, range(before + 1, before + 3))
    for epoch, parts in zip([left, *then], zip(*resumed, strict=True), strict=False):
        assert [[*chain(*ranks)] for ranks in zip(*parts, strict=True)] == epoch


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_state_of_a_finished_epoch_is_that_of_the_next(name: str) -> None:
    torch.manual_seed(1)
    batches = SphereBatchSampler(SAMPLERS[name](20), 3)
    run_epochs(batches, range(2))
    state = saved(batches.state_dict())
    assert state["position"] == 0
    following = run_epochs(batches, range(2, 4))
    torch.manual_seed(2)
    fresh = SphereBatchSampler(SAMPLERS[name](20), 3)
    fresh.load_state_dict(state)
    if state["kind"] == "global":
        assert run_epochs(fresh, range(2, 3)) == following[:1]
    else:
        assert run_epochs(fresh, range(2, 4)) == following


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_state_of_a_resumed_iterator_is_that_of_the_first(name: str) -> None:
    torch.manual_seed(1)
    batches = SphereBatchSampler(SAMPLERS[name](20), 3)
    run_epochs(batches, range(1))
    batches.set_epoch(1)
    iterator = iter(batches)
    for _ in range(3):
        next(iterator)
        state = saved(batches.state_dict())
        resumed = SphereBatchSampler(SAMPLERS[name](20), 3)
        resumed.load_state_dict(state)
        other = iter(resumed)
        assert next(other) == next(iterator)
        first, second = batches.state_dict(), resumed.state_dict()
        assert (first["position"], first["digest"]) == (second["position"], second["digest"])
        resumed = SphereBatchSampler(SAMPLERS[name](20), 3)
        resumed.load_state_dict(saved(second))
        assert list(resumed) == list(other)


def test_resumes_in_a_new_process() -> None:
    torch.manual_seed(0)
    batches = SphereBatchSampler(RandomSampler(range(50)), 4)
    iterator = iter(batches)
    [*islice(iterator, 5)]
    file = io.BytesIO()
    torch.save(batches.state_dict(), file)
    program = (
        "import io, sys, torch; from torch.utils.data import RandomSampler\n"
        "from torch_spheres.sampler import SphereBatchSampler\n"
        "batches = SphereBatchSampler(RandomSampler(range(50)), 4)\n"
        "batches.load_state_dict(torch.load(io.BytesIO(sys.stdin.buffer.read())))\n"
        "print(list(batches))\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        input=file.getvalue(),
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().strip() == str(list(iterator))


def test_loading_waits_for_the_iterator_that_begins_next() -> None:
    batches = SphereBatchSampler(range(10), 2)
    old = iter(batches)
    assert next(old) == [0, 1]
    state = batches.state_dict()
    batches.load_state_dict(state)
    iter(batches)  # never begun, as a DataLoader with workers does
    assert next(old) == [2, 3]  # goes on as it was
    assert batches.state_dict()["position"] == 1
    assert list(batches) == [[2, 3], [4, 5], [6, 7], [8, 9]]
    assert next(iter(batches)) == [0, 1]


def test_the_state_is_of_the_iterator_that_began_last() -> None:
    batches = SphereBatchSampler(range(10), 2)
    first, second = iter(batches), iter(batches)
    next(second)
    [next(first), next(first)]
    assert batches.state_dict()["position"] == 2
    assert next(second) == [2, 3]
    assert batches.state_dict()["position"] == 2
    list(second)
    assert batches.state_dict()["position"] == 2
    list(first)
    assert batches.state_dict()["position"] == 0


def test_another_epoch_gives_up_what_was_left() -> None:
    def make() -> SphereBatchSampler:
        return SphereBatchSampler(RandomSampler(range(10), generator=given_generator()), 2)

    batches = make()
    batches.set_epoch(0)
    next(iter(batches))
    state = batches.state_dict()
    batches.set_epoch(1)
    resumed = make()
    resumed.load_state_dict(state)
    resumed.set_epoch(1)
    assert resumed.state_dict()["position"] == 0
    assert list(resumed) == list(batches)


def test_set_epoch_is_forwarded_and_restored() -> None:
    sampler: Any = SAMPLERS["distributed"](10)
    batches = SphereBatchSampler(sampler, 3)
    batches.set_epoch(np.int64(4))  # type: ignore[arg-type]
    assert sampler.epoch == batches.epoch == 4
    sampler.set_epoch(6)  # told directly
    iterator = iter(batches)
    next(iterator)
    resumed = SphereBatchSampler(SAMPLERS["distributed"](10), 3)
    resumed.load_state_dict(batches.state_dict())
    assert resumed.epoch == 6
    assert list(resumed) == list(iterator)
    with pytest.raises(TypeError, match=r"1\.5 \(float\)"):
        batches.set_epoch(1.5)  # type: ignore[arg-type]


def test_a_state_saved_between_loading_and_beginning() -> None:
    state = SphereBatchSampler(RandomSampler(range(10)), 2).state_dict()
    batches = SphereBatchSampler(RandomSampler(range(10)), 2)
    batches.load_state_dict(state)
    batches.set_epoch(3)
    assert batches.state_dict()["epoch"] == 3
    torch.manual_seed(8)  # not what the loaded state draws from
    next(iter(batches))
    assert batches.state_dict()["epoch"] == 3
    assert torch.equal(batches.state_dict()["start"], state["start"])

    sampler = RandomSampler(range(10), generator=given_generator())
    batches = SphereBatchSampler(sampler, 2)
    batches.load_state_dict(batches.state_dict())
    torch.rand(1, generator=sampler.generator)  # as a DataLoader that shares it does
    state = batches.state_dict()
    expected = list(batches)
    batches.load_state_dict(state)
    assert list(batches) == expected


def test_states_that_do_not_fit() -> None:
    state = SphereBatchSampler(range(10), 2).state_dict()
    with pytest.raises(
        ValueError, match="saved with batch_size=2, not 3; drop_last=False, not True"
    ):
        SphereBatchSampler(range(10), 3, True).load_state_dict(state)
    with pytest.raises(ValueError, match="saved with kind='global', not 'generator'"):
        SphereBatchSampler(SAMPLERS["subset, generator"](9), 2).load_state_dict(state)
    del state["position"]
    with pytest.raises(ValueError, match=r"no \{'position'\} in"):
        SphereBatchSampler(range(10), 2).load_state_dict(state)


def test_a_sampler_that_does_not_repeat_is_found() -> None:
    batches = SphereBatchSampler(RandomSampler(range(50)), 2)
    [*islice(batches, 3)]
    other = SphereBatchSampler(RandomSampler(range(49)), 2)
    other.load_state_dict(batches.state_dict())
    with pytest.raises(RuntimeError, match="does not repeat the 3 batches"):
        next(iter(other))
    [*islice(batches := SphereBatchSampler(range(50), 2), 9)]
    short = SphereBatchSampler(range(10), 2)
    short.load_state_dict(batches.state_dict())
    with pytest.raises(RuntimeError, match="does not repeat the 9 batches"):
        next(iter(short))


def test_a_state_is_a_value() -> None:
    batches = SphereBatchSampler(RandomSampler(range(20)), 2)
    iterator = iter(batches)
    next(iterator).clear()  # the batch is the caller's
    state = batches.state_dict()
    kept = copy.deepcopy(state)
    next(iterator)
    assert str(state) == str(kept)
    resumed = SphereBatchSampler(RandomSampler(range(20)), 2)
    resumed.load_state_dict(state)
    state["start"].zero_()
    resumed.state_dict()["start"].zero_()
    assert list(islice(resumed, 1, None)) == list(iterator)


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))]
)
@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_copies_and_pickles(name: str, duplicate: Callable[[Any], Any]) -> None:
    torch.manual_seed(0)
    batches = SphereBatchSampler(SAMPLERS[name](30), 4, rank=1, world_size=2)
    next(iter(batches))
    other = duplicate(batches)
    assert str(other.state_dict()) == str(batches.state_dict())
    if duplicate is not copy.copy:
        torch.manual_seed(1)
        expected = list(batches)
        torch.manual_seed(1)
        assert list(other) == expected


# ---- in a DataLoader -----------------------------------------------------------------------


def loader(batches: Any, workers: int, **kwargs: Any) -> DataLoader[Any]:
    return DataLoader(
        TensorDataset(torch.arange(40)), batch_sampler=batches, num_workers=workers, **kwargs
    )


def rows(data: Any) -> list[list[int]]:
    return [batch.tolist() for (batch,) in data]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shared", [False, True])
def test_dataloader_sees_no_difference(workers: int, shared: bool) -> None:
    def trace(kind: Any) -> list[Any]:
        torch.manual_seed(0)
        generator = given_generator() if shared else None
        batches = kind(RandomSampler(range(40), generator=generator), 6, False)
        data = loader(batches, workers, generator=generator)
        return [rows(data), rows(data), len(data), torch.get_rng_state().tolist()]

    assert trace(SphereBatchSampler) == trace(BatchSampler)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("epochs", [0, 1])
@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("restored", [False, True])
def test_dataloader_resumes(
    workers: int, shared: bool, epochs: int, begun: bool, restored: bool
) -> None:
    def make() -> tuple[SphereBatchSampler, DataLoader[Any]]:
        generator = given_generator() if shared else None
        batches = SphereBatchSampler(RandomSampler(range(40), generator=generator), 4)
        return batches, loader(batches, workers, generator=generator)

    torch.manual_seed(0)
    batches, data = make()
    for _ in range(epochs):
        rows(data)
    if begun:
        iterator = iter(data)
        next(iterator)
        state, rng = saved(batches.state_dict()), torch.get_rng_state()
        ahead = 0 if workers == 0 else 2 * workers  # prefetched: two a worker
        assert state["position"] == 1 + ahead
        left = rows(iterator)[ahead:]
    else:
        state, rng = saved(batches.state_dict()), torch.get_rng_state()
        left = rows(data)
    torch.manual_seed(5)
    batches, data = make()
    batches.load_state_dict(state)
    if restored:
        torch.set_rng_state(rng)
    assert rows(data) == left
