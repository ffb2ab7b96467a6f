"""Datasets whose samples show who loads them, and when: the loop's own thread does."""

from __future__ import annotations

import contextvars
import random
import sqlite3
import tempfile
import threading
import time

import numpy as np
import pytest
import torch
from loader_support import epochs, on_spheres, same
from torch.utils.data import DataLoader, Dataset

import torch_spheres as ts
from torch_spheres.loading import inline

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


class Stateful(Dataset):
    """Samples that depend on what was asked before, or on the thread that asks."""

    def __init__(self, kind):
        self.kind, self.asked = kind, 0
        self.python, self.numpy = random.Random(4), np.random.default_rng(5)
        self.legacy, self.torch = np.random.RandomState(6), torch.Generator().manual_seed(7)
        self.holder = {"rng": [random.Random(8)]}
        self.file = tempfile.TemporaryFile()  # noqa: SIM115
        self.file.write(bytes(range(200)))
        # (In a list, which is too long for a look inside: that the thread matters shows later.)
        self.connections = [None] * 100
        if kind == "sqlite":
            self.connections[0] = sqlite3.connect(":memory:")

    def __len__(self):
        return 48

    def __getitem__(self, index):
        if self.kind == "counter":
            self.asked += 1
            return index, self.asked
        if self.kind == "python":
            return self.python.random()
        if self.kind == "numpy":
            return self.numpy.random()
        if self.kind == "legacy":
            return self.legacy.rand()
        if self.kind == "torch":
            return torch.rand((), generator=self.torch)
        if self.kind == "deep":
            return self.holder["rng"][0].random()
        if self.kind == "late":  # the process's, and not in the first batches
            return (np.random.rand(), random.random()) if index > 20 else (0.0, 0.0)
        if self.kind == "file":
            self.file.seek(index)
            return self.file.read(1)[0]
        if self.kind == "sqlite":
            return self.connections[0].execute(f"select {index}").fetchone()[0]
        return int(threading.current_thread() is threading.main_thread())

    def close(self):
        self.file.close()
        if self.connections[0] is not None:
            self.connections[0].close()


KINDS = {
    "counter": "state",
    "python": "state",
    "numpy": "state",
    "legacy": "state",
    "torch": "random",
    "deep": "state",
    "late": "random",
    "file": "state",
    "sqlite": "thread",
}


def passes(kind, wrapping):
    """Two epochs over a new dataset and what the process draws next, and the loader that it was."""
    torch.manual_seed(0)
    random.seed(1)
    np.random.seed(2)
    dataset = Stateful(kind)
    loader = wrapping(DataLoader(dataset, 4))
    out = epochs(loader)
    dataset.close()
    return [*out, random.random(), np.random.rand()], loader


@pytest.mark.parametrize("kind", KINDS)
def test_datasets_whose_samples_depend_on_the_order_or_thread(spheres, kind, monkeypatch):
    # (Threads that other tests have left would do as somebody else.)
    monkeypatch.setattr(inline, "_nobody_else", lambda: True)
    plain, _ = passes(kind, lambda loader: loader)
    mine, loader = passes(kind, lambda loader: ts.wrap(loader, spheres))
    same(mine, plain)
    stats = loader.stats()
    assert stats.declined in (KINDS[kind], "slower")
    if kind != "sqlite" and kind != "late":  # these show on the spheres only, if they are tried
        assert stats.declined == KINDS[kind] and stats.way == "caller"


@pytest.mark.parametrize("kind", ["late", "sqlite", "torch"])
def test_what_shows_on_the_spheres_only_is_taken_back(spheres, kind, monkeypatch):
    # (Threads that other tests have left would do as somebody else.)
    monkeypatch.setattr(inline, "_nobody_else", lambda: True)
    plain, _ = passes(kind, lambda loader: loader)
    mine, _ = passes(kind, lambda loader: on_spheres(ts.wrap(loader, spheres)))
    same(mine, plain)


def test_what_other_threads_draw_meanwhile_stays_drawn(spheres):
    """Only with no other thread about are draws on the spheres taken back."""
    drawn, go_on, over = [], threading.Event(), threading.Event()

    class Draws(Dataset):
        def __len__(self):
            return 48

        def __getitem__(self, index):
            if index == 30:
                go_on.set()
                while len(drawn) < 5:
                    time.sleep(0.001)
            return index

    def others():
        go_on.wait(60)
        drawn.extend(random.random() for _ in range(5))
        over.wait(60)
        drawn.extend(random.random() for _ in range(5))

    random.seed(3)
    thread = threading.Thread(target=others)
    thread.start()
    batches = [*on_spheres(ts.wrap(DataLoader(Draws(), 12), spheres))]
    over.set()
    thread.join(60)
    assert torch.cat(batches).tolist() == list(range(48))
    random.seed(3)
    assert drawn == [random.random() for _ in range(10)]


def test_a_file_that_is_opened_by_the_first_sample_says_nothing_yet(spheres):
    class Lazy(Dataset):
        cache = None

        def __len__(self):
            return 400

        def __getitem__(self, index):
            if self.cache is None:
                self.cache = {"opened": True}
            time.sleep(0.0005)
            return index

    loader = ts.wrap(DataLoader(Lazy(), 8), spheres)
    loader._tempo._seconds["spheres"] = 1e-12  # less than any measurement
    assert torch.cat([*loader]).tolist() == list(range(400))
    assert loader.stats().way == "spheres" and loader.stats().declined == ""


def test_what_cannot_be_looked_into_is_left_to_the_caller(spheres):
    class Opaque(Dataset):
        def __init__(self):
            self.rows = (n for n in range(40))

        def __len__(self):
            return 40

        def __getitem__(self, index):
            time.sleep(0.001)
            return next(self.rows)

    loader = ts.wrap(DataLoader(Opaque(), 4), spheres)
    assert torch.cat([*loader]).tolist() == list(range(40))
    assert loader.stats().declined == "opaque"


def test_what_the_loop_changes_is_seen_by_the_next_batch(spheres):
    class Changing(Dataset):
        level = 0

        def __len__(self):
            return 24

        def __getitem__(self, index):
            return self.level, variable.get(), float(np.geterr()["divide"] == "raise")

    variable = contextvars.ContextVar("variable", default=0)

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
    same(passes(on_spheres(ts.wrap(plain, spheres))), passes(plain))
