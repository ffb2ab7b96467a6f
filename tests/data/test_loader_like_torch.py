"""What worker processes are relied on for, with the plain DataLoader as the judge."""

from __future__ import annotations

import itertools
import multiprocessing
import threading
import time

import pytest
import torch
from loader_support import eventually
from torch import nn
from torch.utils.data import (
    BatchSampler,
    ChainDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    get_worker_info,
)

import torch_spheres as ts

pytestmark = pytest.mark.filterwarnings(
    "ignore:This DataLoader will create:UserWarning",
    "ignore:Length of IterableDataset:UserWarning",
    "ignore:The PyTorch API of nested tensors:UserWarning",
)


class Once(Dataset):
    """Each worker waits, with its first sample, until all have begun: so all get some."""

    def __init__(self, rows, workers):
        self.rows, self.workers, self.waited = rows, workers, False
        self.begun, self.all = multiprocessing.Value("i", 0), multiprocessing.Event()

    def __len__(self):
        return self.rows

    def __getitem__(self, index):
        if not self.waited:
            self.waited = True
            with self.begun.get_lock():
                self.begun.value += 1
                if self.begun.value == self.workers:
                    self.all.set()
        assert self.all.wait(60)
        return self.seen(index)

    def seen(self, index):
        info = get_worker_info()
        return info.id, info.num_workers, info.seed, torch.initial_seed(), len(info.dataset)


@pytest.mark.parametrize("workers", [1, 3, 6])
def test_ids_and_seeds(spheres, workers):
    def samples(wrap):
        torch.manual_seed(5)
        plain = DataLoader(
            Once(workers * 2, workers), batch_size=1, num_workers=workers, collate_fn=list
        )
        return [s for batch in wrap(plain) for s in batch]

    mine = samples(lambda loader: ts.wrap(loader, spheres))
    assert mine == samples(lambda loader: loader)
    assert len({seed for _, _, _, seed, _ in mine}) == workers
    assert all(seed == initial for _, _, seed, initial, _ in mine)


def test_seeds_are_the_same_after_the_same_seed_and_new_in_each_epoch(spheres):
    def epochs():
        torch.manual_seed(1)
        loader = ts.wrap(DataLoader(Once(4, 2), num_workers=2, collate_fn=list), spheres)
        return [[s[0][3] for s in loader] for _ in range(2)]

    first = epochs()
    assert first == epochs() and first[0] != first[1]


class Slow(Dataset):
    """Sample 0 comes when all others have."""

    def __init__(self, rows):
        self.rows, self.lock = rows, threading.Lock()
        self.others, self.left = threading.Event(), [rows - 1]

    def __len__(self):
        return self.rows

    def __getitem__(self, index):
        if index == 0:
            assert self.others.wait(60)
        else:
            with self.lock:
                self.left[0] -= 1
                if self.left[0] == 0:
                    self.others.set()
        return index


def test_order_with_and_without_in_order(spheres):
    plain = DataLoader(Slow(10), num_workers=2, in_order=False, prefetch_factor=1)
    rows = [int(batch) for batch in ts.wrap(plain, spheres)]
    assert sorted(rows) == [*range(10)] and rows.index(0) >= 8
    plain = DataLoader(Waits(0.001), num_workers=2, in_order=True)
    assert [int(batch) for batch in ts.wrap(plain, spheres)] == [*range(4)]


class Queues(Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        return get_worker_info().id


@pytest.mark.parametrize(("workers", "batch"), [*itertools.product((1, 2, 5), (1, 3))])
def test_each_worker_has_a_queue_of_its_own(spheres, workers, batch):
    """Batch k is worker k modulo n's."""
    loader = ts.wrap(DataLoader(Queues(), batch, num_workers=workers), spheres)
    for k, ids in enumerate(loader):
        assert set(ids.tolist()) == {k % workers}


class Nested(Dataset):
    def __init__(self, layout):
        self.layout = layout

    def __len__(self):
        return 6

    def __getitem__(self, index):
        parts = [torch.full((k + 1, 2), float(index)) for k in range(3)]
        return torch.nested.nested_tensor(parts, layout=self.layout)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors(spheres, layout):
    loader = ts.wrap(DataLoader(Nested(layout), None, num_workers=2), spheres)
    for index, found in enumerate(loader):
        assert found.is_nested and found.layout == layout
        assert [t.tolist() for t in found.unbind()] == [
            [[float(index)] * 2] * (k + 1) for k in range(3)
        ]


class Convolved(Dataset):
    def __init__(self):
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))

    def __len__(self):
        return 8

    def __getitem__(self, index):
        with torch.no_grad():
            return self.net(torch.full((1, 3, 16, 16), float(index)))[0]


def test_convolutions_in_workers(spheres):
    data = Convolved()
    data.net(torch.randn(4, 3, 64, 64))  # in the loop's thread, with all of its threads, before
    plain = torch.cat([*DataLoader(data, 2)])
    for _ in range(3):
        torch.testing.assert_close(
            torch.cat([*ts.wrap(DataLoader(data, 2, num_workers=3), spheres)]), plain
        )


class Part(IterableDataset):
    """Some workers have nothing, some less than others."""

    def __init__(self, sizes):
        self.sizes = sizes

    def __iter__(self):
        info = get_worker_info()
        if info is None:
            return iter(range(sum(self.sizes)))
        begin = sum(self.sizes[: info.id])
        return iter(range(begin, begin + self.sizes[info.id]))


@pytest.mark.parametrize("sizes", [(0, 7), (7, 0, 2), (0, 0, 0, 5), (1, 1, 1), (0, 0)])
@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
def test_iterable_datasets_whose_workers_end_at_different_times(
    spheres, sizes, persistent, drop_last
):
    plain = DataLoader(
        Part(sizes), 2, num_workers=len(sizes), persistent_workers=persistent, drop_last=drop_last
    )
    loader = ts.wrap(plain, spheres)
    expected = [batch.tolist() for batch in plain]
    for _ in range(2):
        assert [batch.tolist() for batch in loader] == expected


def test_chained_iterables(spheres):
    plain = DataLoader(ChainDataset([Part((3, 4)), Part((2, 1))]), 2, num_workers=2)
    assert [b.tolist() for b in ts.wrap(plain, spheres)] == [b.tolist() for b in plain]


@pytest.mark.parametrize("persistent", [False, True])
def test_early_exits_end_the_workers(spheres, persistent):
    for taken in (0, 1, 5):
        loader = ts.wrap(
            DataLoader(Queues(), 2, num_workers=4, persistent_workers=persistent), spheres
        )
        iterator = iter(loader)
        workers = iterator._workers
        for _ in range(taken):
            next(iterator)
        del iterator
        if persistent:
            assert len([*loader]) == 20
            del loader
        eventually(lambda workers=workers: not any(w.is_alive() for w in workers))


class Growing(Dataset):
    def __init__(self):
        self.rows = [*range(10)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dataset_that_grows_between_epochs(spheres, workers):
    data = Growing()
    loader = ts.wrap(DataLoader(data, 3, num_workers=workers), spheres)
    assert torch.cat([*loader]).tolist() == [*range(10)]
    data.rows += [10, 11, 12]
    assert torch.cat([*loader]).tolist() == [*range(13)]


class Bulk(Dataset):
    def __len__(self):
        return 20

    def __getitem__(self, indices):
        return torch.tensor(indices)


@pytest.mark.parametrize("workers", [0, 3])
def test_samplers_of_batches_without_collation(spheres, workers):
    def loader(wrap):
        torch.manual_seed(0)
        sampler = BatchSampler(RandomSampler(range(20)), 4, drop_last=False)
        plain = DataLoader(Bulk(), None, sampler=sampler, num_workers=workers)
        return [batch.tolist() for batch in wrap(plain)]

    assert loader(lambda plain: ts.wrap(plain, spheres)) == loader(lambda plain: plain)


class Waits(Dataset):
    def __init__(self, seconds):
        self.seconds = seconds

    def __len__(self):
        return 4

    def __getitem__(self, index):
        time.sleep(self.seconds)
        return index


def test_a_timeout(spheres):
    loader = ts.wrap(DataLoader(Waits(1.0), num_workers=2, timeout=0.05), spheres)
    with pytest.raises(RuntimeError, match=r"DataLoader timed out after 0\.05 seconds"):
        next(iter(loader))
    loader = ts.wrap(DataLoader(Waits(0.0), num_workers=2, timeout=60), spheres)
    assert torch.cat([*loader]).tolist() == [*range(4)]


def test_errors_of_init_functions_and_of_iterators(spheres):
    def fail(worker):
        raise OSError(f"worker {worker} has no disk")

    loader = ts.wrap(DataLoader(Queues(), num_workers=2, worker_init_fn=fail), spheres)
    with pytest.raises(OSError, match="has no disk"):
        list(loader)

    class Fails(IterableDataset):
        def __iter__(self):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(ts.wrap(DataLoader(Fails(), num_workers=2), spheres))


# ---- DataPipes, which torch no longer develops ----


def add_one(row):
    return [value + 1 for value in row]


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("persistent", [False, True])
def test_data_pipes(spheres, workers, persistent):
    """Shuffled by one seed for all workers, anew in each epoch, and divided where they say so."""
    pipes = pytest.importorskip("torch.utils.data.datapipes.iter")

    def epochs(wrap):
        torch.manual_seed(3)
        pipe = pipes.IterableWrapper([[k, k] for k in range(20)]).map(add_one)
        plain = DataLoader(
            pipe.shuffle(buffer_size=7).sharding_filter(), 4, shuffle=True, num_workers=workers,
            persistent_workers=persistent and workers > 0,
        )  # fmt: skip
        loader = wrap(plain)
        found = [[batch[0].tolist() for batch in loader] for _ in range(3)]
        torch.manual_seed(3)
        return [*found, [batch[0].tolist() for batch in loader]]

    mine = epochs(lambda plain: ts.wrap(plain, spheres))
    assert mine == epochs(lambda plain: plain)
    assert sorted(itertools.chain(*mine[0])) == [*range(1, 21)] and mine[0] != mine[1]


def test_data_pipes_are_divided_by_one_worker_at_a_time(monkeypatch, spheres):
    """Torch finds the parts of a pipe with a hook that it refuses to set a second time."""
    pipes = pytest.importorskip("torch.utils.data.datapipes.iter")
    IterDataPipe = torch.utils.data.IterDataPipe  # noqa: N806 - a class
    hook = IterDataPipe.set_reduce_ex_hook.__func__

    def slow(kind, function):
        hook(kind, function)
        time.sleep(0.002)

    monkeypatch.setattr(IterDataPipe, "set_reduce_ex_hook", classmethod(slow))
    pipe = pipes.IterableWrapper(range(40)).shuffle().sharding_filter()
    loader = ts.wrap(DataLoader(pipe, 4, shuffle=True, num_workers=6), spheres)
    for _ in range(3):
        assert sorted(torch.cat([*loader]).tolist()) == [*range(40)]


def test_data_pipes_have_no_position(spheres):
    pipes = pytest.importorskip("torch.utils.data.datapipes.map")
    loader = ts.wrap(DataLoader(pipes.SequenceWrapper(range(10)), 3, num_workers=2), spheres)
    assert torch.cat([*loader]).tolist() == [*range(10)]
    with pytest.raises(RuntimeError, match=r"state_dict\(\): a DataPipe does not say where"):
        loader.state_dict()
