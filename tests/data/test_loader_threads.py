"""Logical workers are threads: n batches at once, each with what is its own, on one thread."""

from __future__ import annotations

import multiprocessing
import os
import sqlite3
import threading
import time

import numpy as np
import pytest
import torch
from loader_support import eventually
from torch import nn
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    get_worker_info,
)

import torch_spheres as ts

pytestmark = pytest.mark.filterwarnings(
    "ignore:This DataLoader will create:UserWarning",
    # Connections belong to the thread that made them, which has ended: only Python can close them.
    "ignore:unclosed database:ResourceWarning",
    "ignore:Exception ignored.*(sqlite3|database connection|FileIO|finalizing file)",
)


def wrapped(dataset, spheres, workers, **options):
    return ts.wrap(DataLoader(dataset, num_workers=workers, **options), spheres)


# ---- as many batches at once as there are workers ----


class Together(Dataset):
    """Each sample waits until so many are being loaded."""

    def __init__(self, rows, parties):
        self.rows, self.barrier = rows, threading.Barrier(parties)

    def __len__(self):
        return self.rows

    def __getitem__(self, index):
        self.barrier.wait(60)
        return index


@pytest.mark.parametrize("workers", [2, 6, 40])
@pytest.mark.parametrize(("levels", "concurrency"), [(1, 1), (2, 1), (2, 12), (3, 2)])
def test_n_workers_are_n_batches_at_once(workers, levels, concurrency):
    with ts.KissingSpheres(levels, concurrency=concurrency) as spheres:
        loader = wrapped(Together(workers * 3, workers), spheres, workers)
        assert torch.cat([*loader]).tolist() == [*range(workers * 3)]


def test_a_model_on_the_same_spheres_trains_while_samples_wait():
    """Neither starves the other: a step goes on though all workers wait, and loading in an item."""
    release = threading.Event()

    class Waits(Together):
        def __getitem__(self, index):
            assert release.wait(60)
            return torch.ones(4)

    with ts.KissingSpheres(concurrency=1) as spheres:
        model = ts.SphereParallel(nn.Linear(4, 2), spheres)
        iterator = iter(wrapped(Waits(8, 1), spheres, 4, batch_size=2))
        for _ in range(3):
            model(torch.ones(24, 4)).sum().backward()
        release.set()
        assert sum(len(batch) for batch in iterator) == 8

        def load(_):
            return sum(len(b) for b in wrapped(Waits(8, 1), spheres, 4, batch_size=2))

        assert spheres.map(load, range(3)) == [8] * 3  # in items, which hold the only turn


# ---- a worker's own things ----


class Keeps(Dataset):
    """What a worker puts on it is there for that worker, on that thread."""

    def __init__(self, rows=60):
        self.rows, self.worker, self.thread = rows, None, None
        self.local = threading.local()

    def __len__(self):
        return self.rows

    def __getitem__(self, index):
        worker = get_worker_info().id
        if self.worker is None:
            self.worker, self.thread = worker, threading.get_ident()
            self.local.worker = worker
        assert self.worker == worker == self.local.worker
        assert self.thread == threading.get_ident()
        time.sleep(0.0005)
        return index


class Database(Dataset):
    """Opened by who needs it first; sqlite refuses other threads."""

    def __init__(self, path):
        self.path, self.connection = path, None

    def __len__(self):
        return 40

    def __getitem__(self, index):
        if self.connection is None:
            self.connection = sqlite3.connect(self.path)
        (value,) = self.connection.execute("select v from t where k = ?", (index,)).fetchone()
        return value


class Reader(Dataset):
    """A file with a position, opened lazily: two threads in it would read the wrong bytes."""

    def __init__(self, path):
        self.path, self.file = path, None

    def __len__(self):
        return 200

    def __getitem__(self, index):
        if self.file is None:
            self.file = self.path.open("rb", buffering=0)
        self.file.seek(8 * index)
        time.sleep(0)
        return int.from_bytes(self.file.read(8), "little")

    def __del__(self):
        if self.file is not None:
            self.file.close()


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize(
    "wrap", [lambda d: d, lambda d: Subset(d, range(len(d))), lambda d: ConcatDataset([d, d])]
)
def test_what_a_worker_keeps_on_its_dataset_is_its_own(spheres, tmp_path, wrap, persistent):
    path = tmp_path / "rows"
    path.write_bytes(b"".join(i.to_bytes(8, "little") for i in range(200)))
    with sqlite3.connect(tmp_path / "db") as db:
        db.execute("create table t (k integer, v integer)")
        db.executemany("insert into t values (?, ?)", [(i, i) for i in range(40)])
    db.close()
    for dataset in (Keeps(), Database(tmp_path / "db"), Reader(path)):
        before = dict(vars(dataset))
        loader = wrapped(wrap(dataset), spheres, 5, batch_size=3, persistent_workers=persistent)
        expected = [*range(len(dataset))] * (len(wrap(dataset)) // len(dataset))
        for _ in range(2):
            assert torch.cat([*loader]).tolist() == expected
        assert vars(dataset) == before, "the loop's own is as it was"


def test_a_connection_that_worker_init_fn_opens(spheres, tmp_path):
    with sqlite3.connect(tmp_path / "db") as db:
        db.execute("create table t (k integer, v integer)")
        db.executemany("insert into t values (?, ?)", [(i, i) for i in range(40)])
    db.close()

    def connect(worker):
        get_worker_info().dataset.connection = sqlite3.connect(tmp_path / "db")

    loader = wrapped(Database("nowhere"), spheres, 3, batch_size=4, worker_init_fn=connect)
    assert torch.cat([*loader]).tolist() == [*range(40)]


class WithMethods(Dataset):
    """Its methods are what the loader is given, and what it has on an attribute."""

    def __init__(self):
        self.worker, self.read = None, self.read_plainly

    def __len__(self):
        return 40

    def set_up(self, worker):
        self.worker = worker

    def read_plainly(self, index):
        assert self.worker == get_worker_info().id
        return index

    def __getitem__(self, index):
        return self.read(index)

    def collate(self, samples):
        assert self.worker == get_worker_info().id
        return [(index, self.worker) for index in samples]


def test_methods_of_the_dataset_are_those_of_the_workers_copy(spheres):
    dataset = WithMethods()
    loader = wrapped(dataset, spheres, 4, worker_init_fn=dataset.set_up, collate_fn=dataset.collate)
    batches = [sample for batch in loader for sample in batch]
    assert [index for index, _ in batches] == [*range(40)]
    assert [worker for _, worker in batches] == [k % 4 for k in range(40)]
    assert dataset.worker is None


def test_an_init_function_that_writes_to_the_loops_own_dataset_is_refused(spheres):
    dataset = WithMethods()
    loader = wrapped(dataset, spheres, 2, worker_init_fn=lambda w: setattr(dataset, "worker", w))
    with pytest.raises(RuntimeError, match=r"sets \['worker'\].*get_worker_info\(\)\.dataset"):
        list(loader)


class Uncopied(Keeps):
    def __reduce_ex__(self, protocol):
        raise TypeError("cannot pickle this")

    def __getitem__(self, index):
        return index


def test_a_dataset_that_cannot_be_copied_is_shared_and_that_is_said(spheres):
    with pytest.warns(UserWarning, match=r"Uncopied cannot be copied .*workers share it"):
        batches = [*wrapped(Uncopied(), spheres, 2)]
    assert len(batches) == 60


def test_big_things_are_shared_and_not_copied(spheres):
    class Holds(Keeps):
        def __init__(self):
            super().__init__()
            self.table, self.inner = [*range(100)], TensorDataset(torch.arange(60))

        def __getitem__(self, index):
            return id(self.table), self.inner.tensors[0].data_ptr(), id(self.inner)

    dataset = Holds()
    samples = [s for b in wrapped(dataset, spheres, 3, collate_fn=list) for s in b]
    assert {s[:2] for s in samples} == {(id(dataset.table), dataset.inner.tensors[0].data_ptr())}
    assert len({s[2] for s in samples} - {id(dataset.inner)}) == 3


class Table:
    """As a data frame, whose copies have data of their own."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return id(self), index

    def __copy__(self):
        raise AssertionError("all of its data would be copied")


def test_datasets_that_would_copy_their_data_are_shared(spheres, tmp_path):
    mapped = np.memmap(tmp_path / "rows", dtype=np.float32, mode="w+", shape=(12, 4))
    mapped[:] = np.arange(48.0).reshape(12, 4)
    loader = wrapped(mapped, spheres, 3, collate_fn=list)
    assert all(np.shares_memory(row, mapped) for batch in loader for row in batch)
    table = Table()
    ids = {s[0] for batch in wrapped(table, spheres, 3, collate_fn=list) for s in batch}
    assert ids == {id(table)}
    rows = [torch.tensor(k) for k in range(12)]
    assert torch.cat([*wrapped(rows, spheres, 3)]).tolist() == [*range(12)]


class Stream(IterableDataset):
    """Shuffles by an epoch that the loop sets in shared memory, and saves its position."""

    def __init__(self, epoch):
        self.epoch, self.done = epoch, 0

    def __iter__(self):
        return (i + 100 * int(self.epoch.value if hasattr(self.epoch, "value") else self.epoch[0])
                for i in range(3))  # fmt: skip

    def state_dict(self):
        return {"done": self.done}

    def load_state_dict(self, state):
        self.done = state["done"]


@pytest.mark.parametrize("kind", ["tensor", "value"])
def test_an_epoch_in_shared_memory_reaches_persistent_workers(spheres, kind):
    epoch = (
        torch.zeros(1, dtype=torch.long).share_memory_()
        if kind == "tensor"
        else multiprocessing.Value("i", 0)
    )
    loader = wrapped(Stream(epoch), spheres, 2, batch_size=None, persistent_workers=True)
    for number in range(3):
        if kind == "tensor":
            epoch[0] = number
        else:
            epoch.value = number
        assert sorted(map(int, loader)) == sorted([100 * number + i for i in range(3)] * 2)


# ---- the threads ----


def test_workers_are_threads_that_can_be_asked(spheres):
    iterator = iter(wrapped(Keeps(), spheres, 3, batch_size=2))
    workers = iterator._workers
    assert len(workers) == 3 and {w.pid for w in workers} == {os.getpid()}
    assert all(w.is_alive() for w in workers)
    assert [w.name for w in workers] == [f"loader worker {k}" for k in range(3)]
    assert [w.exitcode for w in workers] == [None] * 3
    assert len([*iterator]) == 30
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0 and not worker.is_alive()
        worker.terminate()


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("persistent", [True, False])
def test_a_loop_is_told_of_a_worker_that_was_ended(spheres, persistent, in_order):
    loader = wrapped(
        Keeps(), spheres, 2, batch_size=2, persistent_workers=persistent, in_order=in_order
    )
    iterator = iter(loader)
    next(iterator)
    iterator._workers[1].terminate()
    iterator._workers[1].join(60)
    for _ in range(2):  # and when it asks again
        with pytest.raises(RuntimeError, match=r"^loader worker 1 exited unexpectedly"):
            for _ in iterator:
                pass
    if persistent:
        with pytest.raises(RuntimeError, match="wrapped anew"):
            list(loader)
        loader = wrapped(Keeps(), spheres, 2, batch_size=2)
    assert len([*loader]) == 30


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="not on this system")
def test_a_worker_sets_its_own_affinity_and_intra_op_threads(spheres):
    mine, threads = os.sched_getaffinity(0), torch.get_num_threads()
    only = {min(mine)}
    seen = []

    class Looks(Keeps):
        def __getitem__(self, index):
            seen.append((os.sched_getaffinity(0), torch.get_num_threads()))
            return index

    loader = wrapped(
        Looks(), spheres, 2, worker_init_fn=lambda worker: os.sched_setaffinity(0, only)
    )
    assert len([*loader]) == 60
    assert all(s == (only, 1) for s in seen)
    assert os.sched_getaffinity(0) == mine and torch.get_num_threads() == threads
    assert spheres.map(lambda _: os.sched_getaffinity(0), range(12)) == [mine] * 12


def test_persistent_workers_keep_their_threads(spheres):
    loader = wrapped(Keeps(), spheres, 3, batch_size=4, persistent_workers=True)
    idents = []
    for _ in range(3):
        iterator = iter(loader)
        idents.append([w.ident for w in iterator._workers])
        assert len([*iterator]) == 15
    assert idents[0] == idents[1] == idents[2]


def test_threads_that_cannot_start_leave_nothing(spheres, monkeypatch):
    start, started = threading.Thread.start, []

    def limited(thread):
        if thread.name.startswith("loader worker"):
            if len(started) == 2:
                raise RuntimeError("can't start new thread")
            started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        iter(wrapped(Keeps(), spheres, 5))
    eventually(lambda: not any(t.is_alive() for t in started))
