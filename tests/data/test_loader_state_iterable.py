"""A loader over an iterable dataset goes on in the middle of an epoch."""

from __future__ import annotations

import threading

import pytest
import torch
from loader_support import Plain, flat, resumed
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

import torch_spheres as ts

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


class Shuffling(IterableDataset):
    """Draws its order when it is iterated, and goes on drawing."""

    def __iter__(self):
        order = torch.randperm(20).tolist()
        return ((row, torch.rand(1)) for row in order)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_iterable_dataset_that_shuffles_itself(spheres, workers):
    for taken in (0, 1, 3):
        torch.manual_seed(1)
        loader = ts.wrap(DataLoader(Shuffling(), 4, num_workers=workers), spheres)
        iterator = iter(loader)
        for _ in range(taken):
            next(iterator)
        state, rng = loader.state_dict(), torch.get_rng_state()
        left = [*iterator]
        torch.manual_seed(50)
        again = ts.wrap(DataLoader(Shuffling(), 4, num_workers=workers), spheres)
        again.load_state_dict(state)
        torch.set_rng_state(rng)
        assert flat([*again]) == flat(left)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dataset_whose_state_dict_fails_can_still_be_iterated(spheres, workers):
    class Failing(Counter):
        def __iter__(self):
            iterator = super().__iter__()
            iterator.__class__ = FailingIterator
            return iterator

    class FailingIterator(CounterIterator):
        def state_dict(self):
            raise OSError("no state today")

    loader = ts.wrap(DataLoader(Failing(), 4, num_workers=workers), spheres)
    assert sum(len(batch[0]) for batch in loader) == 23
    iterator = iter(loader)
    next(iterator)
    with pytest.raises(RuntimeError, match=r"no state to save: FailingIterator.*no state today"):
        loader.state_dict()


class Counter(IterableDataset):
    """Keeps its position in an iterator that can save it."""

    def __init__(self, rows=23):
        self.rows = rows

    def __iter__(self):
        return CounterIterator(self.rows)


class CounterIterator:
    replayed = 0

    def __init__(self, rows):
        info = get_worker_info()
        self.step = 1 if info is None else info.num_workers
        self.at = 0 if info is None else info.id
        self.rows = rows

    def __iter__(self):
        return self

    def __next__(self):
        if self.at >= self.rows:
            raise StopIteration
        CounterIterator.replayed += 1
        self.at += self.step
        return self.at - self.step, torch.rand(1)

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


class Remembering(IterableDataset):
    """Keeps its position in itself."""

    def __init__(self, rows=23):
        self.rows, self.at, self.loaded = rows, 0, False

    def __iter__(self):
        info = get_worker_info()
        step, first = (1, 0) if info is None else (info.num_workers, info.id)
        start, self.loaded = (self.at if self.loaded else 0), False
        for k in range(start, self.rows):
            self.at = k + 1
            yield k * step + first, torch.rand(1)

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at, self.loaded = state["at"], True


@pytest.mark.parametrize("kind", [Counter, Remembering, Plain])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_iterable_datasets(spheres, kind, workers):
    for batch_size in (None, 4):
        for stop_after in (0, 1, 4, 6):

            def begin(batch_size=batch_size):
                plain = DataLoader(kind(), batch_size, num_workers=workers)
                return ts.wrap(plain, spheres)

            torch.manual_seed(8)
            loader = begin()
            iterator = iter(loader)
            if stop_after > 4 and batch_size and workers == 0:
                continue
            for _ in range(stop_after):
                next(iterator)
            state, rng = loader.state_dict(), torch.get_rng_state()
            left = [*iterator]
            torch.manual_seed(77)
            again = resumed(begin, state, rng)
            before = CounterIterator.replayed
            assert flat([*again]) == flat(left)
            if kind is Counter:  # nothing is read that was read before
                rows = len(left) if batch_size is None else sum(len(b[0]) for b in left)
                assert CounterIterator.replayed - before == rows


def test_a_state_that_another_thread_asks_for_waits_for_the_batch(spheres):
    entered, gate = threading.Event(), threading.Event()

    class Held(IterableDataset):
        def __iter__(self):
            for i in range(8):
                if i == 4:
                    entered.set()
                    assert gate.wait(60)
                yield i

    loader = ts.wrap(DataLoader(Held(), 4), spheres)
    iterator = iter(loader)
    next(iterator)
    thread = threading.Thread(target=next, args=(iterator,))
    thread.start()
    assert entered.wait(60)
    states = []
    saving = threading.Thread(target=lambda: states.append(loader.state_dict()))
    saving.start()
    gate.set()
    thread.join(60)
    saving.join(60)
    assert [state["tasks"] for state in states] == [2]
