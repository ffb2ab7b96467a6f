"""A wrapped loader gives what the plain one gives, and draws what it draws."""

from __future__ import annotations

import functools
import warnings

import numpy as np
import pytest
import torch
from effort import rounds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loader_support import Batches, Numbers, Stream, epochs, same
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    StackDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)
from torch.utils.data.distributed import DistributedSampler

import torch_spheres as ts

# The plain loaders' own, about process workers and the number of cores.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


def compare(make, spheres, seed=0, count=2, take=None):
    """`make()` returns a new plain loader each time, over the same dataset."""
    torch.manual_seed(seed)
    plain = epochs(make(), count, take)
    torch.manual_seed(seed)
    same(epochs(ts.wrap(make(), spheres), count, take), plain)


class Drawing(Sampler):
    """Draws for each index: whoever asks too early shifts the training's random numbers."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        for _ in range(self.rows):
            yield int(torch.randint(self.rows, ()))

    def __len__(self):
        return self.rows


TENSORS = TensorDataset(torch.randn(30, 3), torch.arange(30), torch.rand(30) > 0.5)
DATASETS = {
    "plain": lambda: Numbers(30),
    "draws": lambda: Numbers(30, draws=("torch", "seed")),
    "errors": lambda: Numbers(30, bad=(3, 17)),
    "batches": lambda: Batches(30, draws=("torch",)),
    "tensors": lambda: TENSORS,
    "subset": lambda: Subset(TENSORS, [*range(20, -10, -1)]),
    "concat": lambda: ConcatDataset([TENSORS, Subset(TENSORS, range(7))]),
    "stack": lambda: StackDataset(a=TENSORS, b=torch.arange(60.0).view(30, 2)),
    "one": lambda: TensorDataset(torch.zeros(1, 2)),
}
SAMPLERS = {
    "none": lambda rows, g: {},
    "shuffle": lambda rows, g: {"shuffle": True},
    "replacement": lambda rows, g: {
        "sampler": RandomSampler(range(rows), replacement=True, num_samples=45, generator=g)
    },
    "more": lambda rows, g: {"sampler": RandomSampler(range(rows), num_samples=70, generator=g)},
    "weighted": lambda rows, g: {
        "sampler": WeightedRandomSampler(torch.ones(rows), 33, generator=g)
    },
    "subset": lambda rows, g: {"sampler": SubsetRandomSampler(range(rows), generator=g)},
    "distributed": lambda rows, g: {
        "sampler": DistributedSampler(range(rows), num_replicas=2, rank=1)
    },
    "drawing": lambda rows, g: {"sampler": Drawing(rows)},
    "list": lambda rows, g: {"sampler": [*range(rows - 1, -1, -1)]},
}


@settings(max_examples=rounds(60), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_configuration_without_workers(spheres, data):
    configure(spheres, data, st.just(0))


@settings(max_examples=rounds(15), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_configuration_with_two_workers(spheres, data):
    configure(spheres, data, st.just(2))


def configure(spheres, data, workers):
    draw = data.draw
    dataset = DATASETS[draw(st.sampled_from(sorted(DATASETS)), "dataset")]()
    own = draw(st.booleans(), "own generator")
    sampler = draw(st.sampled_from(sorted(SAMPLERS)), "sampler")
    num_workers = draw(workers, "num_workers")
    options = {"num_workers": num_workers}
    batching = draw(st.sampled_from(["size", "none", "sampler"]), "batching")
    size, drop = draw(st.integers(1, 13), "batch_size"), draw(st.booleans(), "drop_last")
    if num_workers:
        options["prefetch_factor"] = draw(st.sampled_from([None, 1, 3]), "prefetch_factor")
        options["persistent_workers"] = draw(st.booleans(), "persistent_workers")
    if draw(st.booleans(), "custom collate"):
        options["collate_fn"] = functools.partial(tagged, batching == "none")
    seed = draw(st.integers(0, 3), "seed")
    count = draw(st.integers(1, 3), "epochs")
    take = draw(st.sampled_from([None, None, 3]), "take")

    def make():
        generator = torch.Generator().manual_seed(seed) if own else None
        chosen = SAMPLERS[sampler](len(dataset), generator)
        if batching == "size":
            chosen.update(batch_size=size, drop_last=drop)
        elif batching == "none":
            chosen.update(batch_size=None)
        else:
            inner = chosen.get("sampler") or SequentialSampler(dataset)
            chosen = {"batch_sampler": BatchSampler(inner, size, drop)}
        return DataLoader(dataset, generator=generator, **chosen, **options)

    compare(make, spheres, seed, count, take)


def tagged(alone, samples):
    return ["mine", samples if alone else default_collate(samples)]


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("uneven", [0, 3])
@pytest.mark.parametrize("drop_last", [False, True])
def test_iterable_datasets(spheres, workers, uneven, drop_last):
    dataset = Stream(25, draws=("torch",), uneven=uneven)
    for options in (
        {"batch_size": 4, "drop_last": drop_last},
        {"batch_size": None},
        {"batch_size": 3, "persistent_workers": workers > 0},
    ):
        compare(
            lambda options=options: DataLoader(dataset, num_workers=workers, **options), spheres
        )


@pytest.mark.parametrize("workers", [0, 2])
def test_a_longer_iterable_dataset_than_its_len_warns_the_same(spheres, workers):
    class Longer(Stream):
        def __len__(self):
            return 5

        def __repr__(self):
            return "Longer"

    def make():
        loader = DataLoader(Longer(20), batch_size=2, num_workers=workers)
        assert len(loader) == 3
        return loader

    compare(make, spheres, count=1)


@pytest.mark.parametrize("persistent", [False, True])
def test_epochs_that_are_broken_out_of(spheres, persistent):
    def make():
        return DataLoader(
            Numbers(40, draws=("torch",)),
            batch_size=3,
            shuffle=True,
            num_workers=2,
            persistent_workers=persistent,
        )

    compare(make, spheres, count=3, take=7)


@pytest.mark.parametrize("workers", [0, 2])
def test_two_iterators_at_once(spheres, workers):
    def interleaved(loader):
        torch.manual_seed(5)
        first, second = iter(loader), iter(loader)
        out = [next(first), next(second), next(second), next(first)]
        return [*out, *first, *second, torch.get_rng_state()]

    dataset = Numbers(30, draws=("torch",))
    make = functools.partial(DataLoader, dataset, 4, shuffle=True, num_workers=workers)
    same(interleaved(ts.wrap(make(), spheres)), interleaved(make()))


def test_a_given_generator_is_where_the_plain_loader_has_it(spheres):
    def states(loader):
        return [(batch, loader.generator.get_state()) for _ in range(2) for batch in loader]

    def make():
        return DataLoader(Numbers(70), 8, shuffle=True, generator=torch.Generator().manual_seed(1))

    same(states(ts.wrap(make(), spheres)), states(make()))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("dataset", [TENSORS, Numbers(30)], ids=["tensors", "samples"])
def test_index_batches_of_any_kind(spheres, workers, dataset):
    batches = [
        *(np.array([1, 2]), torch.tensor([3, 4]), (1, 2), {1, 2}, {1: "a"}, range(3, 9)),
        *([], [1], [np.int64(1), True], [torch.tensor(3)], ["1"], [2]),
    ]
    make = functools.partial(
        DataLoader, dataset, batch_sampler=batches, num_workers=workers, collate_fn=list
    )
    compare(make, spheres)
    if workers == 0:  # a process could not be sent one

        class Generators(Sampler):
            def __iter__(self):
                return ((row for row in (k, k + 1)) for k in range(0, 8, 2))

        compare(lambda: DataLoader(dataset, batch_sampler=Generators()), spheres)


def test_a_persistent_loader_that_was_begun_in_inference_mode(spheres):
    for dataset in (TENSORS, Numbers(30)):
        loader = DataLoader(dataset, 6, num_workers=2, persistent_workers=True)
        wrapped = ts.wrap(loader, spheres)
        with torch.inference_mode():
            iterator = iter(wrapped)
            next(iterator)
        for batch in [next(iterator), *wrapped]:
            assert not batch[0].is_inference()


def test_attributes_and_length(spheres):
    plain = DataLoader(TENSORS, 7, shuffle=True, num_workers=2, drop_last=True)
    loader = ts.wrap(plain, spheres)
    assert isinstance(loader, DataLoader) and isinstance(loader, ts.SphereLoader)
    assert len(loader) == len(plain) == 4
    assert loader.sampler is plain.sampler and loader.dataset is plain.dataset
    for name, value in vars(plain).items():
        if name != "_iterator":
            assert getattr(loader, name) is value
    for name in ("batch_size", "batch_sampler", "sampler", "drop_last", "dataset"):
        with pytest.raises(ValueError, match=f"{name} attribute should not be set"):
            setattr(loader, name, None)
    loader.collate_fn = default_collate  # as with a DataLoader


def test_a_subclass_keeps_its_methods(spheres):
    class Doubling(DataLoader):
        def __iter__(self):
            return (batch * 2 for batch in super().__iter__())

        def hello(self):
            return "hello"

    loader = ts.wrap(Doubling(torch.arange(6), 3), spheres)
    assert isinstance(loader, Doubling) and loader.hello() == "hello"
    assert [batch.tolist() for batch in loader] == [[0, 2, 4], [6, 8, 10]]


def test_settings_of_the_caller_hold_in_the_threads(spheres):
    class Settings(Dataset):
        def __len__(self):
            return 24

        def __getitem__(self, index):
            return (
                torch.is_grad_enabled(),
                torch.is_autocast_enabled("cpu"),
                torch.ones(2).requires_grad,
            )

    for workers in (0, 2):
        plain = DataLoader(Settings(), 4, num_workers=workers, collate_fn=set)
        with torch.no_grad(), torch.autocast("cpu"):
            assert [*ts.wrap(plain, spheres)] == [{(False, True, False)}] * 6


def test_pinning_without_an_accelerator_warns_as_it_does(spheres):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if torch.accelerator.is_available():
            pytest.skip("there is an accelerator")
    for workers in (0, 2):
        compare(
            lambda workers=workers: DataLoader(TENSORS, 8, pin_memory=True, num_workers=workers),
            spheres,
            count=1,
        )


def test_order_is_free_where_it_was_asked_for(spheres):
    loader = ts.wrap(DataLoader(Numbers(40), 4, num_workers=3, in_order=False), spheres)
    rows = sorted(int(i) for batch in loader for i in batch[1])
    assert rows == list(range(40))
