"""SphereBatchSampler: saving, resuming, copying, and inside a DataLoader."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from itertools import chain, islice
from typing import Any

import numpy as np
import pytest
import torch
from effort import rounds
from hypothesis import given, settings
from hypothesis import strategies as st
from sampler_support import SAMPLERS, WORLDS, draws, every_sampler, given_generator, saved
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from torch_spheres.data.sampler import SphereBatchSampler

# ---- resumption ----------------------------------------------------------------------------


def run_epochs(batches: SphereBatchSampler, epochs: range) -> list[list[list[int]]]:
    seen = []
    for epoch in epochs:
        batches.set_epoch(epoch)
        seen.append(list(batches))
    return seen


@settings(max_examples=rounds(100))
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

    if position == 0 and state["kind"] == "global":
        again = True  # it begins with the caller's random state
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
    rng = torch.get_rng_state()
    following = run_epochs(batches, range(2, 4))
    torch.manual_seed(2)
    fresh = SphereBatchSampler(SAMPLERS[name](20), 3)
    fresh.load_state_dict(state)
    if state["kind"] == "global":
        torch.set_rng_state(rng)
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
    with pytest.raises(TypeError, match=r"epoch must be an integer, got 1\.5"):
        batches.set_epoch(1.5)  # type: ignore[arg-type]


def test_a_state_saved_between_loading_and_beginning() -> None:
    batches, again = (SphereBatchSampler(SAMPLERS["tracking"](10), 2) for _ in range(2))
    batches.load_state_dict(batches.state_dict())
    batches.set_epoch(3)
    state = batches.state_dict()
    assert (state["epoch"], state["position"]) == (3, 0)
    again.load_state_dict(state)
    assert list(again) == list(batches)

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
    with pytest.raises(ValueError, match="was saved with kind='global', not 'generator'"):
        SphereBatchSampler(SAMPLERS["subset, generator"](9), 2).load_state_dict(state)
    del state["position"]
    with pytest.raises(ValueError, match=r"no \['position'\] in"):
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
@pytest.mark.parametrize(("begun", "restored"), [(True, False), (True, True), (False, True)])
def test_dataloader_resumes(workers: int, shared: bool, begun: bool, restored: bool) -> None:
    def make() -> tuple[SphereBatchSampler, DataLoader[Any]]:
        generator = given_generator() if shared else None
        batches = SphereBatchSampler(RandomSampler(range(40), generator=generator), 4)
        return batches, loader(batches, workers, generator=generator)

    torch.manual_seed(0)
    batches, data = make()
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
