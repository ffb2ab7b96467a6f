"""Loaders that are dropped, broken out of, interrupted or stopped leave nothing behind."""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import pickle
import threading
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from effort import rounds
from loader_support import Numbers, Stream, eventually, wrapped
from torch.utils.data import DataLoader, Dataset, TensorDataset

import torch_spheres as ts
from torch_spheres.runtime.thread_hooks import has_gil

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


class Gated(Dataset):
    """Holds what loads until the gate opens."""

    def __init__(self, rows=40):
        self.gate, self.rows, self.started = threading.Event(), rows, threading.Event()

    def __len__(self):
        return self.rows

    def __getitem__(self, index):
        self.started.set()
        assert self.gate.wait(60)
        return torch.tensor(index)


def takes_no_work(spheres):
    """Whether a stop() has got so far."""
    try:
        spheres._core.submit(len, ((),), collect=True)
    except ts.StoppedError:
        return True
    return False


def resident():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def open_files():
    return len([*Path("/proc/self/fd").iterdir()])


def other_threads():
    """Beside those of the spheres, and of workers, which end a moment after their iterator."""
    eventually(lambda: not workers_at_work())
    return len([t for t in threading.enumerate() if not t.name.startswith("sphere ")])


def workers_at_work():
    """But for persistent ones, which wait for the next epoch."""
    return len(of_loaders()) > PERSISTENT


def of_loaders():
    return [t for t in threading.enumerate() if t.name.startswith("loader worker ")]


PERSISTENT = 2 * 3  # of two loaders


def test_a_soak_of_epochs_with_early_breaks_leaves_nothing(spheres):
    """Threads, open files and memory stay as they were."""
    datasets = [Numbers(60, draws=("torch",)), Stream(60)]
    loaders = [
        wrapped(dataset, spheres, workers, persistent_workers=persistent)
        for dataset in datasets
        for workers, persistent in ((0, False), (2, False), (3, True))
    ]

    def epoch(k):
        for loader in loaders:
            for n, _ in enumerate(loader):
                if n == k % 31:
                    break

    for k in range(10):
        epoch(k)
    gc.collect()
    before = other_threads(), open_files(), resident()
    for k in range(rounds(200)):
        epoch(k)
    gc.collect()
    after = other_threads(), open_files(), resident()
    assert after[:2] == before[:2] and len(of_loaders()) == PERSISTENT
    # Without the GIL the memory of threads that have ended is used again late.
    assert after[2] - before[2] < (16 << 20 if has_gil() else 256 << 20)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dropped_iterator_releases_everything(spheres, workers):
    dataset = Gated()
    loader = wrapped(dataset, spheres, workers)
    iterator = iter(loader)
    dataset.gate.set()
    next(iterator)
    alive = weakref.ref(iterator), weakref.ref(dataset), weakref.ref(loader)
    del iterator
    assert alive[0]() is None  # at once: it is in no cycle
    del loader, dataset
    eventually(lambda: [ref() for ref in alive] == [None] * 3)


def test_an_iterator_dropped_while_it_loads(spheres):
    dataset = Gated()
    loader = wrapped(dataset, spheres, 2)
    iterator = iter(loader)
    dataset.started.wait(60)
    gone = weakref.ref(iterator)
    del iterator
    assert gone() is None
    dataset.gate.set()
    alive = weakref.ref(dataset)
    assert len([*loader]) == 20
    del loader, dataset
    eventually(lambda: alive() is None)


def test_spheres_that_are_stopped_under_a_loader():
    """Logical workers are gone with them; without workers the loop's own thread goes on."""
    dataset, tensors = Gated(), TensorDataset(torch.arange(40))
    with ts.KissingSpheres(levels=2, concurrency=2) as spheres:
        iterator, inline = iter(wrapped(dataset, spheres, 2)), iter(wrapped(tensors, spheres, 0))
        dataset.started.wait(60)
        next(inline)
        stopper = threading.Thread(target=spheres.stop)
        stopper.start()
        eventually(lambda: takes_no_work(spheres))
        dataset.gate.set()
        stopper.join(60)
        with pytest.raises(ts.StoppedError):
            list(iterator)
        with pytest.raises(ts.StoppedError):
            [*wrapped(dataset, spheres, 2)]
        for left, batches in ((inline, 19), (wrapped(dataset, spheres, 0), 20)):
            assert len([*left]) == batches
        # Other threads of the same spheres: a new iterator.
        spheres.start()
        assert len([*wrapped(dataset, spheres, 2)]) == 20


def test_more_loaders_than_batches_may_be_in_flight(spheres):
    dataset = Gated(4)
    iterators = [iter(wrapped(dataset, spheres, 1)) for _ in range(60)]
    threading.Timer(0.05, dataset.gate.set).start()
    more = [iter(wrapped(dataset, spheres, 2)) for _ in range(20)]
    for iterator in [*iterators, *more]:
        assert [batch.tolist() for batch in iterator] == [[0, 1], [2, 3]]


def test_a_hundred_workers(spheres):
    loader = wrapped(Numbers(500), spheres, 100)
    assert [int(i) for batch in loader for i in batch[1]] == list(range(500))


def test_after_its_workers_were_shut_down_an_iterator_is_at_its_end(spheres):
    loader = wrapped(Numbers(20), spheres, 2, persistent_workers=True)
    iterator = iter(loader)
    next(iterator)
    iterator._shutdown_workers()
    assert next(iterator, None) is None
    assert len([*loader]) == 10
    iterator = iter(loader)
    next(iterator)
    state = loader.state_dict()
    loader.load_state_dict(state)
    assert next(iterator, None) is None
    assert len([*loader]) == 9 and len([*loader]) == 10


def test_random_streams_of_persistent_workers_go_on_after_a_restart():
    with ts.KissingSpheres(levels=2, concurrency=2) as spheres:
        loader = wrapped(Numbers(8, draws=("torch",)), spheres, 2, persistent_workers=True)
        torch.manual_seed(0)
        epochs = [torch.stack([batch[5] for batch in loader]) for _ in range(2)]
        spheres.stop()
        spheres.start()
        epochs.append(torch.stack([batch[5] for batch in loader]))
        plain = DataLoader(loader.dataset, 2, num_workers=2, persistent_workers=True)
        torch.manual_seed(0)
        for mine in epochs:
            assert torch.equal(mine, torch.stack([batch[5] for batch in plain]))


def test_persistent_workers_live_again_with_their_spheres():
    with ts.KissingSpheres(levels=2, concurrency=2) as spheres:
        dataset = Gated()
        loader = wrapped(dataset, spheres, 2, persistent_workers=True)
        iterator = iter(loader)
        dataset.started.wait(60)
        stopper = threading.Thread(target=spheres.stop)
        stopper.start()
        eventually(lambda: takes_no_work(spheres))
        dataset.gate.set()
        stopper.join()
        with pytest.raises(ts.StoppedError):
            for _ in iterator:
                pass
        spheres.start()
        assert len([*loader]) == 20 and len([*loader]) == 20


def test_a_warning_that_is_an_error_loses_no_batch(spheres):
    loader = wrapped(Numbers(40), spheres, 2)
    loader._meter.next_warning = iter([None, None, "something new", *[None] * 100]).__next__
    rows, told, iterator = [], 0, iter(loader)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        while True:
            try:
                rows.extend(next(iterator)[1].tolist())
            except UserWarning:
                told += 1
            except StopIteration:
                break
    assert rows == list(range(40)) and told == 1


def test_errors_hold_nothing(spheres):
    """An error's traceback owns frames; none of them may own the error, or the iterator stays."""
    for workers in (0, 2):
        loader = wrapped(Numbers(20, bad=(5,)), spheres, workers)
        iterator = iter(loader)
        alive = weakref.ref(iterator)
        gc.collect()
        gc.disable()
        try:
            for _ in range(5):
                with contextlib.suppress(KeyError):
                    next(iterator)
            del iterator
            assert alive() is None
        finally:
            gc.enable()


@pytest.mark.parametrize("workers", [0, 2])
def test_copies_and_pickles(spheres, workers):
    class Named(DataLoader):
        name = "mine"

    globals()["Named"] = Named
    Named.__qualname__ = "Named"
    for kind in (DataLoader, Named):
        plain = kind(Numbers(20), 4, num_workers=workers)
        loader = ts.wrap(plain, spheres, copy_dataset=True)
        deep, pickled = copy.deepcopy(loader), pickle.loads(pickle.dumps(loader))
        assert deep.spheres is spheres and pickled.spheres is not spheres
        assert pickled.spheres.levels == 2 and pickled.spheres.concurrency == 3
        for other in (deep, pickled):
            assert type(other) is type(loader) and other.dataset is not loader.dataset
            assert [b[1].tolist() for b in other] == [b[1].tolist() for b in plain]
        pickled.spheres.stop()


@pytest.mark.parametrize("workers", [0, 2])
def test_two_threads_in_one_iterator_are_told(spheres, workers):
    dataset = Gated()
    iterator, batches = iter(wrapped(dataset, spheres, workers)), []
    thread = threading.Thread(target=lambda: batches.append(next(iterator)))
    thread.start()
    assert dataset.started.wait(60)
    eventually(lambda: in_use(iterator))
    with pytest.raises(RuntimeError, match=r"another thread is in next\(\) of this iterator"):
        next(iterator)
    dataset.gate.set()
    thread.join(60)
    assert torch.cat([*batches, *iterator]).tolist() == [*range(40)]


def in_use(iterator):
    free = iterator._next_lock.acquire(blocking=False)
    if free:
        iterator._next_lock.release()
    return not free


def test_a_copy_of_a_loader_that_holds_itself_holds_the_copy(spheres):
    loader = ts.wrap(DataLoader(Numbers(20), 4), spheres)
    loader.dataset.loader = [loader]
    copied = copy.deepcopy(loader)
    assert copied.dataset.loader[0] is copied
