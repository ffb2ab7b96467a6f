"""`state_dict` and `load_state_dict`: on with the batches that were left, in a new process too."""

from __future__ import annotations

import os
import random
from pathlib import Path

import fork_server
import pytest
import torch
from loader_support import Numbers, Plain, flat, resumed
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    TensorDataset,
    get_worker_info,
)

import torch_spheres as ts

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


class Drawing(Dataset):
    """Draws from all of a worker's streams."""

    def __len__(self):
        return 41

    def __getitem__(self, index):
        info = get_worker_info()
        if info is None:
            return index, torch.rand(2)
        rng = info.rng
        return index, torch.rand(2), rng.random_generator.gauss(0, 1), rng.numpy_generator.rand()


TENSORS = TensorDataset(torch.arange(41.0), torch.randn(41, 2))


def resumption(make, spheres, stop_after, between=lambda loader: None):
    """What is left of three epochs after a stop, without and with one; and the end's states."""

    def go_on(loader, out):
        for _ in range(2):
            for batch in loader:
                out.append((batch, torch.rand(1)))
        out.append(torch.get_rng_state())
        if loader.generator is not None:
            out.append(loader.generator.get_state())
        return out

    torch.manual_seed(6)
    loader, out = ts.wrap(make(), spheres), []
    iterator = iter(loader)
    for _ in range(stop_after):
        next(iterator)
        torch.rand(1)
    between(loader)
    state, rng = loader.state_dict(), torch.get_rng_state()
    assert flat(loader.state_dict()) == flat(state)  # asking changes nothing
    for batch in iterator:
        out.append((batch, torch.rand(1)))
    whole = go_on(loader, out)

    torch.manual_seed(1234)
    again = ts.wrap(make(), spheres)
    torch.rand(3)
    torch.set_rng_state(rng)
    again.load_state_dict(state)
    resumed = []
    for batch in again:
        resumed.append((batch, torch.rand(1)))
    go_on(again, resumed)
    for k, (a, b) in enumerate(zip(resumed, whole, strict=True)):
        assert flat(a) == flat(b), f"item {k} after the resumption: {a} instead of {b}"


@pytest.mark.parametrize("stop_after", [0, 1, 3, 7, 8])
@pytest.mark.parametrize(
    ("workers", "persistent"), [(0, False), *((w, p) for w in (1, 2, 3) for p in (False, True))]
)
@pytest.mark.parametrize("own", [False, True])
def test_what_is_left_comes(spheres, stop_after, workers, own, persistent):
    for dataset in (Drawing(), TENSORS):

        def make(dataset=dataset):
            generator = torch.Generator().manual_seed(2) if own else None
            return DataLoader(
                dataset,
                5,
                shuffle=True,
                num_workers=workers,
                generator=generator,
                persistent_workers=persistent,
            )

        resumption(make, spheres, stop_after)


@pytest.mark.parametrize("workers", [0, 2])
def test_samplers_and_batch_samplers(spheres, workers):
    dataset = Drawing()
    for make_options in (
        lambda: {"sampler": RandomSampler(dataset, replacement=True, num_samples=60)},
        lambda: {"batch_sampler": BatchSampler(RandomSampler(dataset), 4, drop_last=True)},
        lambda: {"batch_sampler": ts.SphereBatchSampler(RandomSampler(dataset), 4)},
        lambda: {"batch_size": None, "shuffle": True},
        lambda: {"sampler": [*range(40, -1, -1)], "batch_size": 3},
    ):
        for stop_after in (0, 2, 5):
            resumption(
                lambda options=make_options: DataLoader(dataset, num_workers=workers, **options()),
                spheres,
                stop_after,
            )


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_chain_of_states(spheres, workers, own, shuffle):
    """Saved before an epoch began, or at its end; resumed; saved again; resumed again."""

    def make():
        generator = torch.Generator().manual_seed(2) if own else None
        return ts.wrap(
            DataLoader(Drawing(), 5, shuffle=shuffle, num_workers=workers, generator=generator),
            spheres,
        )

    torch.manual_seed(3)
    loader = make()
    for finished in (0, 1):
        if finished:
            assert len([*loader]) == 9
        state, rng = loader.state_dict(), torch.get_rng_state()
        expected = [*loader]
        torch.manual_seed(17)
        second = resumed(make, state, rng)
        iterator = iter(second)
        assert flat([next(iterator), next(iterator)]) == flat(expected[:2])
        state, rng = second.state_dict(), torch.get_rng_state()
        torch.manual_seed(18)
        third = resumed(make, state, rng)
        iterator = iter(third)
        assert flat([next(iterator)]) == flat(expected[2:3])
        state, rng = third.state_dict(), torch.get_rng_state()
        fourth = resumed(make, state, rng)
        assert flat([*fourth]) == flat(expected[3:])


@pytest.mark.parametrize("kind", ["map", "iterable"])
@pytest.mark.parametrize("first_epoch", [2, None])
@pytest.mark.parametrize("taken", [0, 1, 3])
def test_the_second_epoch_of_persistent_workers(spheres, kind, first_epoch, taken):
    """Also before all workers have handed out a batch; the first may have been broken out of."""

    def make():
        options = {"dataset": Plain()}
        if kind == "map":
            options = {"dataset": Drawing(), "shuffle": True}
        plain = DataLoader(batch_size=5, num_workers=2, persistent_workers=True, **options)
        return ts.wrap(plain, spheres)

    torch.manual_seed(3)
    loader = make()
    iterator = iter(loader)
    for _ in range(first_epoch or 100):
        if next(iterator, None) is None:
            break
    iterator = iter(loader)
    for _ in range(taken):
        next(iterator)
    state, rng = loader.state_dict(), torch.get_rng_state()
    left, third = [*iterator], [*loader]
    torch.manual_seed(99)
    again = resumed(make, state, rng)
    assert flat([*again]) == flat(left) and flat([*again]) == flat(third)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_generator_that_the_loop_draws_from_as_well(spheres, workers):
    def make():
        generator = torch.Generator().manual_seed(2)
        plain = DataLoader(Numbers(30), 4, shuffle=True, num_workers=workers, generator=generator)
        return ts.wrap(plain, spheres)

    def go_on(loader, iterator):
        out = []
        for _ in range(2):
            for batch in iterator:
                out.append((batch, torch.rand(1, generator=loader.generator)))
            iterator = loader
        return out

    loader = make()
    iterator = iter(loader)
    for _ in range(3):
        next(iterator)
        torch.rand(1, generator=loader.generator)
    state = loader.state_dict()
    left = go_on(loader, iterator)
    again = make()
    again.load_state_dict(state)
    assert flat(go_on(again, iter(again))) == flat(left)


def test_mistakes(spheres):
    loader = ts.wrap(DataLoader(Numbers(20), 4, shuffle=True), spheres)
    iterator = iter(loader)
    next(iterator)
    state = loader.state_dict()
    with pytest.raises(ValueError, match=r"not a state of a wrapped loader: no \['base_seed'"):
        loader.load_state_dict({"epoch": 3})
    other = ts.wrap(DataLoader(Numbers(20), 5, shuffle=True, num_workers=1), spheres)
    with pytest.raises(ValueError, match="batch_size=4, not 5; num_workers=0, not 1"):
        other.load_state_dict(state)
    shorter = ts.wrap(DataLoader(Numbers(11), 4, shuffle=True), spheres)
    shorter.load_state_dict(state)
    with pytest.raises(RuntimeError, match="the sampler does not repeat the 1 batches"):
        iter(shorter)
    free = ts.wrap(DataLoader(Numbers(20), 4, num_workers=2, in_order=False), spheres)
    iterator = iter(free)
    next(iterator)
    with pytest.raises(RuntimeError, match="in_order=False has no position"):
        free.state_dict()


def test_the_state_is_plain_and_can_be_saved(spheres, tmp_path):
    loader = ts.wrap(DataLoader(Drawing(), 4, shuffle=True, num_workers=2), spheres)
    iterator = iter(loader)
    for _ in range(3):
        next(iterator)
    torch.save(loader.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    left = [*iterator]
    again = ts.wrap(DataLoader(Drawing(), 4, shuffle=True, num_workers=2), spheres)
    again.load_state_dict(state)
    assert flat([*again]) == flat(left)


SCRIPT = """
import sys, torch
import torch_spheres as ts
from torch.utils.data import DataLoader
from test_loader_state import Numbers, batches_and_draws
for workers, (state, rng) in torch.load(sys.argv[1], weights_only=True).items():
    loader = ts.wrap(DataLoader(Numbers(50, ("torch",)), 4, shuffle=True, num_workers=workers))
    loader.load_state_dict(state)
    torch.set_rng_state(rng)
    print(batches_and_draws(iter(loader), loader))
"""


def batches_and_draws(iterator, loader):
    """What is left of an epoch, and the next."""
    out = []
    for left in (iterator, loader):
        for batch in left:
            out.append((batch[1].tolist(), batch[5].tolist(), float(torch.rand(()))))
    return out


def test_in_a_new_process(spheres, tmp_path):
    states, expected = {}, []
    for workers in (0, 2):
        plain = DataLoader(Numbers(50, ("torch",)), 4, shuffle=True, num_workers=workers)
        loader = ts.wrap(plain, spheres)
        iterator = iter(loader)
        for _ in range(5):
            next(iterator)
        states[workers] = loader.state_dict(), torch.get_rng_state()
        expected.append(batches_and_draws(iterator, loader))
        assert len(expected[-1]) == 8 + 13
    torch.save(states, tmp_path / "states.pt")
    ran = fork_server.run(
        SCRIPT,
        tmp_path / "states.pt",
        env={"PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[:2]))},
        warn=(("ignore",),),
    )
    assert ran.stdout.splitlines() == [*map(str, expected)], ran.stderr


def test_a_random_place(spheres):
    generator = random.Random(5)
    for _ in range(10):
        rows, size = generator.randint(5, 60), generator.randint(1, 9)
        workers = generator.randint(0, 3)
        stop = generator.randint(0, rows // size)

        def make(rows=rows, size=size, workers=workers):
            return DataLoader(Numbers(rows, ("torch",)), size, shuffle=True, num_workers=workers)

        resumption(make, spheres, stop)


def test_a_resumption_that_failed_can_be_tried_again(spheres):
    """With the right data this time."""
    loader = ts.wrap(DataLoader(Numbers(40), 4, shuffle=True, num_workers=2), spheres)
    torch.manual_seed(1)
    iterator = iter(loader)
    next(iterator)
    state, left = loader.state_dict(), [b[1].tolist() for b in iterator]
    dataset = loader.dataset
    loader.load_state_dict(state)
    dataset.rows = 30
    with pytest.raises(RuntimeError, match="does not repeat"):
        iter(loader)
    dataset.rows = 40
    assert [b[1].tolist() for b in loader] == left


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sampler_that_is_cut_for_ranks_resumes_on_others(spheres, workers):
    """Its lists differ from rank to rank; the batches that they are parts of do not."""

    def make(rank, world):
        torch.manual_seed(0)
        data = TensorDataset(torch.arange(300))
        batches = ts.SphereBatchSampler(RandomSampler(data), 48, rank=rank, world_size=world)
        return ts.wrap(DataLoader(data, batch_sampler=batches, num_workers=workers), spheres)

    loader = make(0, 3)
    iterator = iter(loader)
    next(iterator), next(iterator)
    state, random_state = loader.state_dict(), torch.get_rng_state()
    for rank, world in ((0, 3), (1, 3), (0, 1), (1, 2), (3, 4)):
        wanted = [rows.tolist() for (rows,) in make(rank, world)][2:]
        resumed = make(rank, world)
        resumed.load_state_dict(state)
        torch.set_rng_state(random_state)
        assert [rows.tolist() for (rows,) in resumed] == wanted, (rank, world)
