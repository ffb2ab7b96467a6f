"""States saved at any moment of any epoch: after a break, after an error, of iterable datasets."""

from __future__ import annotations

import contextlib
import itertools
import random

import numpy as np
import pytest
import torch
from loader_support import flat
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

import torch_spheres as ts

pytestmark = pytest.mark.filterwarnings(
    "ignore:This DataLoader will create:UserWarning",
    "ignore:while logical workers loaded a batch, something drew:UserWarning",
)


class Rows(Dataset):
    def __init__(self, rows=40, bad=()):
        self.rows, self.bad = rows, bad

    def __len__(self):
        return self.rows

    def __getitem__(self, index):
        if index in self.bad:
            raise KeyError(index)
        return index, torch.rand(())


class Stream(IterableDataset):
    """Shuffled by torch when an epoch begins; `eager`: in `iter()`, else with the first sample."""

    def __init__(self, rows=30, eager=True):
        self.rows, self.eager = rows, eager

    def __iter__(self):
        if self.eager:
            return iter(self.mine().tolist())
        return (row for row in self.mine().tolist())

    def mine(self):
        info = get_worker_info()
        rows = torch.arange(self.rows)
        if info is not None:
            rows = rows[info.id :: info.num_workers]
        return rows[torch.randperm(len(rows))]


class Later(Stream):
    """A generator that shuffles in the middle, too."""

    def __iter__(self):
        half = self.mine()
        yield from half[:5].tolist()
        rest = half[5:]
        yield from rest[torch.randperm(len(rest))].tolist()


class Positioned(Stream):
    """Knows where it is."""

    def __iter__(self):
        self.done = getattr(self, "start", 0)
        self.start = 0
        for row in range(self.rows)[self.done :]:
            self.done += 1
            yield row

    def state_dict(self):
        return {"start": self.done}

    def load_state_dict(self, state):
        self.start = state["start"]


def seen(batches):
    return [flat(batch) for batch in batches]


DATASETS = {
    "rows": Rows,
    "stream": Stream,
    "lazy stream": lambda: Stream(eager=False),
    "shuffling twice": Later,
    "with a position": Positioned,
}


@pytest.mark.parametrize("data", DATASETS)
@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (1, False), (3, False), (2, True)])
@pytest.mark.parametrize("how", ["alive", "broken off", "gone"])
def test_a_state_of_any_epoch_gives_what_was_left(spheres, data, workers, persistent, how):
    def make():
        dataset = DATASETS[data]()
        shuffle = None if isinstance(dataset, IterableDataset) else True
        plain = DataLoader(dataset, 4, shuffle, num_workers=workers, persistent_workers=persistent)
        return ts.wrap(plain, spheres)

    for epochs, taken in itertools.product((0, 1, 2), (0, 1, 4)):
        torch.manual_seed(epochs)
        loader = make()
        for _ in range(epochs):
            list(loader)
        iterator = iter(loader)
        for _ in range(taken):
            next(iterator)
        state, rng = loader.state_dict(), torch.get_rng_state()
        left = seen(iterator)
        # The same once more, and asked for afterwards.
        torch.manual_seed(epochs)
        again = make()
        for _ in range(epochs):
            list(again)
        if how == "alive":
            iterator = iter(again)
            for _ in range(taken):
                next(iterator)
        elif how == "gone":
            iterator = iter(again)
            for _ in range(taken):
                next(iterator)
            del iterator
        else:
            for number, _ in enumerate(again, 1):
                if number == taken:
                    break
            if taken == 0:
                continue
        asked = again.state_dict()
        assert asked["tasks"] == state["tasks"] and asked["base_seed"] == state["base_seed"]
        for saved in (state, asked):
            other = make()
            torch.manual_seed(99)
            other.load_state_dict(saved)
            torch.set_rng_state(rng)
            assert seen(other) == left, (epochs, taken)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_the_issue_counts(spheres, workers):
    """Broken off after three batches of five, 25 of 40 samples are left, not 40."""
    loader = ts.wrap(DataLoader(Rows(), 5, num_workers=workers), spheres)
    for i, _ in enumerate(loader):
        if i == 2:
            break
    state = loader.state_dict()
    again = ts.wrap(DataLoader(Rows(), 5, num_workers=workers), spheres)
    again.load_state_dict(state)
    assert sum(len(batch[0]) for batch in again) == 25
    assert sum(len(batch[0]) for batch in again) == 40
    assert again.state_dict()["begun"] is False


@pytest.mark.parametrize("workers", [0, 2])
def test_in_an_except_block(spheres, workers, tmp_path):
    loader = ts.wrap(DataLoader(Rows(), 5, num_workers=workers), spheres)
    model = torch.nn.Linear(2, 2)
    with contextlib.suppress(ZeroDivisionError):
        try:
            for i, _ in enumerate(loader):
                if i == 2:
                    raise ZeroDivisionError
        except ZeroDivisionError:
            assert loader.state_dict()["tasks"] == 3
            raise
    ts.save_checkpoint(tmp_path / "c.pt", model=model, loader=loader)
    again = ts.wrap(DataLoader(Rows(), 5, num_workers=workers), spheres)
    ts.load_checkpoint(tmp_path / "c.pt", model=model, loader=again)
    assert sum(len(batch[0]) for batch in again) == 25


@pytest.mark.parametrize("workers", [0, 2])
def test_after_an_error_of_the_dataset(spheres, workers):
    """The batch that failed is not to come again, as in plain torch's loop that goes on."""
    loader = ts.wrap(DataLoader(Rows(bad=(12,)), 5, num_workers=workers), spheres)
    with pytest.raises(KeyError):
        list(loader)
    again = ts.wrap(DataLoader(Rows(), 5, num_workers=workers), spheres)
    again.load_state_dict(loader.state_dict())
    assert sum(len(batch[0]) for batch in again) == 25


class Elsewhere(Stream):
    """Shuffled by generators that all threads share."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def __iter__(self):
        rows = [*range(self.rows)]
        if self.kind == "random":
            random.shuffle(rows)
        else:
            np.random.shuffle(rows)
        return iter(rows)


@pytest.mark.parametrize("kind", ["random", "numpy"])
@pytest.mark.parametrize("workers", [0, 2])
def test_shuffles_that_cannot_be_repeated_are_refused(spheres, kind, workers):
    def make():
        return ts.wrap(DataLoader(Elsewhere(kind), 5, num_workers=workers), spheres)

    loader = make()
    iterator = iter(loader)
    next(iterator)
    state = loader.state_dict()
    again = make()
    again.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Elsewhere draws from .*get_worker_info\(\)\.rng"):
        list(again)
    to_come = make()
    to_come.load_state_dict(make().state_dict())  # nothing has to be read again
    assert sum(map(len, to_come)) == 30 * max(1, workers)


def batches(*lists):
    class Fixed:
        def __iter__(self):
            return iter(lists)

        def __len__(self):
            return len(lists)

    return Fixed()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([[0, 1, 2], [3, 4, 5]], [[0, 2, 1], [3, 4, 5]]),  # behind the first index
        ([[0, 1, 2], [3, 4, 5]], [[0, 1, 3], [2, 4, 5]]),
        ([[0, 1], [2, 3]], [[1, 0], [2, 3]]),
        ([["a", "b"], ["c"]], [["a", "c"], ["b"]]),
        ([[(0, 1), (0, 2)], [(1, 1)]], [[(0, 1), (0, 3)], [(1, 1)]]),
        ([torch.arange(3), torch.arange(2)], [torch.tensor([0, 2, 1]), torch.arange(2)]),
    ],
)
def test_another_order_is_not_taken_for_the_same(spheres, workers, first, second):
    class Keyed(Dataset):
        def __getitem__(self, index):
            return str(index)

    def make(lists):
        plain = DataLoader(Keyed(), batch_sampler=batches(*lists), num_workers=workers)
        return ts.wrap(plain, spheres)

    loader = make(first)
    iterator = iter(loader)
    next(iterator)
    state, left = loader.state_dict(), [*iterator]
    same = make(first)
    same.load_state_dict(state)
    assert [*same] == left
    other = make(second)
    other.load_state_dict(state)
    with pytest.raises(RuntimeError, match="does not repeat the 1 batches"):
        iter(other)


# ---- Hugging Face's iterable datasets, which shuffle in a buffer ----


class BufferShuffledExamplesIterable:
    ex_iterable = None


def shuffled_in_a_buffer():
    """A stand-in, with what a loader looks at; its own state forgets the buffer."""

    class Shuffled(Stream):
        __module__ = "datasets.iterable_dataset"
        _ex_iterable = BufferShuffledExamplesIterable()
        epoch = 0

        def set_epoch(self, epoch):
            self.epoch = epoch

        def __iter__(self):
            generator = torch.Generator().manual_seed(self.epoch)
            mine = super().mine().sort()[0]
            return iter(mine[torch.randperm(len(mine), generator=generator)].tolist())

        def state_dict(self):
            raise AssertionError("it would lose rows")

        def load_state_dict(self, state):
            raise AssertionError("it would lose rows")

    return Shuffled()


def hugging_face():
    datasets = pytest.importorskip("datasets")

    def rows(shards):
        for shard in shards:
            for row in range(8):
                yield {"x": 8 * shard + row}

    data = datasets.IterableDataset.from_generator(rows, gen_kwargs={"shards": [*range(4)]})
    return data.shuffle(seed=3, buffer_size=10).with_format("torch")


@pytest.mark.parametrize("make", [shuffled_in_a_buffer, hugging_face])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("epoch", [0, 2])
def test_datasets_that_shuffle_in_a_buffer_are_read_over(spheres, make, workers, epoch):
    data = make()
    data.set_epoch(epoch)
    loader = ts.wrap(DataLoader(data, 5, num_workers=workers), spheres)
    iterator = iter(loader)
    for _ in range(2):
        next(iterator)
    state, left = loader.state_dict(), seen(iterator)
    again = ts.wrap(DataLoader(make(), 5, num_workers=workers), spheres)  # (of epoch 0)
    again.load_state_dict(state)
    assert seen(again) == left
