"""With ``num_workers=0`` the loop's own thread loads, in the plain loader's order."""

from __future__ import annotations

import contextvars
import random
import sqlite3
import threading

import numpy as np
import pytest
import torch
from loader_support import Asking, epochs, flat, same
from torch.utils.data import DataLoader, Dataset, get_worker_info

import torch_spheres as ts

variable = contextvars.ContextVar("variable", default=0)


class Stateful(Dataset):
    """Samples that depend on what was asked before, and work in the thread that made them."""

    def __init__(self):
        self.asked = 0
        self.python, self.numpy = random.Random(4), np.random.default_rng(5)
        self.torch = torch.Generator().manual_seed(7)
        self.database = sqlite3.connect(":memory:")

    def __len__(self):
        return 24

    def __getitem__(self, index):
        self.asked += 1
        assert get_worker_info() is None
        return (
            self.asked,
            self.python.random(),
            self.numpy.random(),
            torch.rand((), generator=self.torch),
            torch.rand(()),
            random.random(),
            np.random.rand(),
            self.database.execute(f"select {index}").fetchone()[0],
        )


def passes(wrapping):
    """Two epochs over a new dataset, and what the process draws next."""
    torch.manual_seed(0)
    random.seed(1)
    np.random.seed(2)
    dataset = Stateful()
    out = epochs(wrapping(DataLoader(dataset, 4, shuffle=True)))
    dataset.database.close()
    return [*out, random.random(), np.random.rand()]


def test_datasets_whose_samples_depend_on_the_order_and_the_thread(spheres):
    same(passes(lambda loader: ts.wrap(loader, spheres)), passes(lambda loader: loader))


def test_the_loops_own_thread_loads_and_the_spheres_are_not_even_started():
    spheres = ts.KissingSpheres(levels=2)
    seen = set()
    loader = ts.wrap(DataLoader(Asking(lambda k: seen.add(threading.get_ident()) or k), 6), spheres)
    assert torch.cat([*loader]).tolist() == list(range(24))
    assert seen == {threading.get_ident()} and not spheres.running
    assert loader.stats().way == "caller"


@pytest.mark.parametrize("batches", [False, True])
def test_a_dataset_that_gains_or_loses_getitems_is_asked_as_it_is(spheres, batches):
    def rows(loader):
        dataset.__dict__.pop("__getitems__", None)
        out = []
        for k, batch in enumerate(loader):
            out.append(batch.tolist())
            if k % 2 == batches:
                dataset.__getitems__ = lambda indices: [-i for i in indices]
            else:
                dataset.__dict__.pop("__getitems__", None)
        return out

    dataset = Asking(lambda index: index)
    plain = DataLoader(dataset, 4)
    assert rows(ts.wrap(plain, spheres)) == rows(plain)


def test_what_the_loop_sets_is_seen_by_the_next_batch(spheres):
    class Changing(Dataset):
        level = 0

        def __len__(self):
            return 24

        def __getitem__(self, index):
            return self.level, variable.get(), float(np.geterr()["divide"] == "raise")

    def passes(loader):
        out = []
        with np.errstate(divide="raise"):
            for k, batch in enumerate(loader):
                out.append(batch)
                loader.dataset.level = k + 1
                variable.set(-k)
        variable.set(0)
        loader.dataset.level = 0
        return out

    plain = DataLoader(Changing(), 4)
    assert flat(passes(ts.wrap(plain, spheres))) == flat(passes(plain))
