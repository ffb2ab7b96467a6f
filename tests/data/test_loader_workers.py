"""Logical workers: what a dataset sees of them, their random streams, their order."""

from __future__ import annotations

import contextvars
import random
import time

import numpy as np
import pytest
import torch
from loader_support import Asking, Numbers, flat
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from torch.utils.data._utils.worker import _generate_state

import torch_spheres as ts
from torch_spheres.data.worker_info import thread_shows

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


def ask(spheres, fn, rows=24, batch_size=2, workers=3, **options):
    """What `fn(index)` returns in a wrapped loader's threads."""
    wrapping = {k: options.pop(k) for k in ("copy_dataset",) if k in options}
    plain = DataLoader(
        Asking(fn, rows), batch_size, num_workers=workers, collate_fn=list, **options
    )
    return [sample for batch in ts.wrap(plain, spheres, **wrapping) for sample in batch]


# ---- what a dataset sees ----


def test_worker_info_is_that_of_the_batchs_worker(spheres):
    torch.manual_seed(0)
    base = int(torch.empty((), dtype=torch.int64).random_())
    torch.manual_seed(0)
    infos = ask(spheres, lambda _: get_worker_info())
    assert [info.id for info in infos] == [i // 2 % 3 for i in range(24)]
    for info in infos:
        assert info.num_workers == 3 and info.seed == base + info.id
        assert isinstance(info.dataset, Asking) and info.worker_method == "thread"
        assert info.rng.torch_generator.initial_seed() == info.seed
    assert get_worker_info() is None
    assert set(ask(spheres, lambda _: get_worker_info(), workers=0)) == {None}


def test_streams_are_those_of_process_workers(spheres):
    def draws(_):
        info = get_worker_info()
        rng = info.rng
        return (
            info.seed,
            torch.initial_seed(),
            torch.rand(2),
            # (torch has it from 2.13 on.)
            getattr(torch.random, "thread_safe_generator", lambda: rng.torch_generator)()
            is rng.torch_generator,
            rng.random_generator.random(),
            rng.numpy_generator.rand(),
        )

    first, *_, last = ask(spheres, draws, workers=2)
    for sample, worker in ((first, 0), (last, 1)):
        seed = sample[0]
        base = seed - worker
        assert sample[1] == seed and sample[3]
        mine = random.Random(seed)
        numpy = np.random.RandomState(_generate_state(base, worker))
        generator = torch.Generator().manual_seed(seed)
        for _ in range(12 if worker else 1):  # worker 1's last sample is its twelfth
            expected = torch.rand(2, generator=generator), mine.random(), numpy.rand()
        assert flat([sample[2], sample[4], sample[5]]) == flat([*expected])


def test_the_same_batches_at_any_concurrency():
    def draws(_):
        rng = get_worker_info().rng
        return torch.rand(2), rng.random_generator.random(), rng.numpy_generator.rand()

    results = []
    for levels, concurrency in ((1, 1), (2, 1), (2, 2), (2, 12), (3, 5)):
        with ts.KissingSpheres(levels=levels, concurrency=concurrency) as spheres:
            torch.manual_seed(4)
            results.append(flat(ask(spheres, draws, rows=40)))
    assert all(result == results[0] for result in results)


def test_sample_seeds_depend_on_the_place_alone():
    seeds = {}
    for workers, concurrency in ((0, 1), (0, 5), (2, 2), (3, 4)):
        with ts.KissingSpheres(levels=2, concurrency=concurrency) as spheres:
            torch.manual_seed(4)
            seeds[workers, concurrency] = ask(
                spheres, lambda _: ts.sample_seed(), rows=100, batch_size=20, workers=workers
            )
    first, *others = seeds.values()
    assert all(other == first for other in others)
    assert len(set(first)) == 100 and all(0 <= seed < 2**63 for seed in first)
    with pytest.raises(RuntimeError, match="this thread loads nothing"):
        ts.sample_seed()


def test_sample_seeds_of_batches_and_streams(spheres):
    class Stream(IterableDataset):
        def __iter__(self):
            return (ts.sample_seed() for _ in range(6))

    torch.manual_seed(1)
    first = [*ts.wrap(DataLoader(Stream(), 2, num_workers=1), spheres)]
    assert len(first) == 3 and all(len(set(batch.tolist())) == 1 for batch in first)
    assert len({int(batch[0]) for batch in first}) == 3


def test_no_shared_memory_is_taken(spheres):
    plain = DataLoader(Numbers(8), 4, num_workers=2)
    for worker, batch in enumerate(ts.wrap(plain, spheres)):
        assert not batch[0].is_shared() and batch[4].tolist() == [20 + worker] * 4
    for worker, batch in enumerate(plain):  # the process workers' still, and their own info
        assert batch[0].is_shared() and batch[4].tolist() == [20 + worker] * 4


def test_a_collate_fn_sees_the_worker(spheres):
    def collate(samples):
        return get_worker_info().id, torch.utils.data.default_collate(samples).is_shared()

    loader = DataLoader(torch.arange(12.0), 2, num_workers=3, collate_fn=collate)
    assert [*ts.wrap(loader, spheres)] == [(i % 3, False) for i in range(6)]


def test_the_info_of_an_outer_loader_comes_back():
    assert get_worker_info() is None
    with thread_shows(info="outer"):
        with thread_shows(info=None):
            assert get_worker_info() is None
        assert get_worker_info() == "outer"
    assert get_worker_info() is None


def test_context_variables_of_a_worker_stay(spheres):
    variable = contextvars.ContextVar("variable")

    def begin(worker):
        variable.set([worker])

    def visit(index):
        variable.get().append(index)
        return [*variable.get()]

    loader = DataLoader(
        Asking(visit, 8), 1, num_workers=2, worker_init_fn=begin, collate_fn=lambda s: s[0]
    )
    assert [*ts.wrap(loader, spheres)][-2:] == [[0, 0, 2, 4, 6], [1, 1, 3, 5, 7]]


def test_worker_init_fn_runs_once_for_each_worker_and_seeds_it(spheres):
    calls = []

    def init(worker):
        calls.append((worker, get_worker_info().id, torch.initial_seed() == get_worker_info().seed))
        torch.manual_seed(100 + worker)

    loader = DataLoader(
        Asking(lambda _: torch.initial_seed(), 12),
        2,
        num_workers=2,
        worker_init_fn=init,
        persistent_workers=True,
    )
    wrapped = ts.wrap(loader, spheres)
    for _ in range(2):
        assert [batch.tolist() for batch in wrapped] == [[100, 100], [101, 101]] * 3
    assert sorted(calls) == [(0, 0, True), (1, 1, True)]


def test_copies_of_the_dataset(spheres):
    class Counting(Dataset):
        def __init__(self):
            self.active = 0

        def __len__(self):
            return 48

        def __getitem__(self, index):
            self.active += 1  # not thread-safe
            seen = self.active
            time.sleep(0.001)
            self.active -= 1
            return seen, id(self)

    dataset = Counting()
    for workers in (0, 2):
        plain = DataLoader(dataset, 12, num_workers=workers, collate_fn=list)
        samples = [s for batch in ts.wrap(plain, spheres, copy_dataset=True) for s in batch]
        assert {seen for seen, _ in samples} == {1}
        owners = {owner for _, owner in samples}
        assert len(owners - {id(dataset)}) == workers


class Range(IterableDataset):
    """As in torch's documentation: every worker is given its part by `worker_init_fn`."""

    def __init__(self, start, end):
        self.start, self.end = start, end

    def __iter__(self):
        return iter(range(self.start, self.end))


def take_part(worker):
    info = get_worker_info()
    dataset = info.dataset
    size = -(-(dataset.end - dataset.start) // info.num_workers)
    begin = dataset.start
    dataset.start = begin + worker * size
    dataset.end = min(dataset.start + size, dataset.end)


class OwnIterator(IterableDataset):
    """Is its own iterator, which two workers could not share."""

    def __iter__(self):
        self.rows = iter(range(get_worker_info().id * 10, get_worker_info().id * 10 + 6))
        return self

    def __next__(self):
        return next(self.rows)


def test_attributes_that_a_worker_sets_are_its_own(spheres):
    loaders = [
        DataLoader(Range(3, 20), 2, num_workers=3, worker_init_fn=take_part),
        DataLoader(OwnIterator(), 2, num_workers=3),
    ]
    for plain in loaders:
        wrapped = ts.wrap(plain, spheres)
        for _ in range(2):
            assert flat([*wrapped]) == flat([*plain])
    assert (loaders[0].dataset.start, loaders[0].dataset.end) == (3, 20)

    def mark(worker):
        dataset = get_worker_info().dataset
        assert not hasattr(dataset, "mark")
        dataset.mark = worker

    marked = Asking(lambda index: index, 12)
    loader = DataLoader(marked, 2, num_workers=3, worker_init_fn=mark)
    marked.ask = lambda index: get_worker_info().dataset.mark
    samples = [batch.tolist() for batch in ts.wrap(loader, spheres)]
    assert samples == [[0, 0], [1, 1], [2, 2]] * 2 and not hasattr(marked, "mark")


# ---- processes ----


def test_processes_can_go_on_loading(spheres):
    loader = DataLoader(Numbers(20, draws=("torch", "random")), 4, num_workers=2)
    torch.manual_seed(2)
    plain = [*loader]
    torch.manual_seed(2)
    wrapped = ts.wrap(loader, spheres, workers="process", device="cpu")
    assert flat([*wrapped]) == flat(plain)
    assert wrapped.stats().way == "process" and wrapped.stats().batches == 5
    assert wrapped.stats().bytes > 0 and wrapped.stats().waited > 0
    with pytest.raises(RuntimeError, match="does not know where worker processes are"):
        wrapped.state_dict()
