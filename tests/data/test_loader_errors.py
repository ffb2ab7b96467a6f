"""What goes wrong in a loader's worker reaches the loop, with its place."""

from __future__ import annotations

import random
import threading
import time
import traceback
import warnings

import numpy as np
import pytest
import torch
from loader_support import Asking
from torch.utils.data import DataLoader

import torch_spheres as ts
from torch_spheres.data import prefetch_iter

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


@pytest.mark.parametrize("workers", [0, 2])
def test_the_original_exception_comes_with_its_place(spheres, workers):
    error = KeyError("no such row")

    def fail(index):
        if index == 13:
            raise error
        return index

    loader = ts.wrap(DataLoader(Asking(fail), 4, num_workers=workers, collate_fn=list), spheres)
    iterator = iter(loader)
    assert [next(iterator) for _ in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    with pytest.raises(KeyError) as caught:
        next(iterator)
    assert caught.value is error
    frames = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert "fail" in frames
    note = caught.value.__notes__[0]
    assert note.startswith("while loading dataset[13], sample 1 of batch 3, ")
    assert "in loader worker " in note or "in the caller's thread" in note
    assert [*iterator] == [[16, 17, 18, 19], [20, 21, 22, 23]]


def test_errors_of_collate_fn_and_worker_init_fn(spheres):
    def collate(samples):
        raise OSError(f"cannot put {samples} together")

    for workers in (0, 2):
        loader = ts.wrap(
            DataLoader(torch.arange(4), 2, num_workers=workers, collate_fn=collate), spheres
        )
        with pytest.raises(OSError, match="cannot put") as caught:
            next(iter(loader))
        assert caught.value.__notes__[0].startswith("while loading batch 0, ")

    def init(worker):
        raise OSError(f"no worker {worker}")

    loader = DataLoader(torch.arange(4), 2, num_workers=2, worker_init_fn=init)
    iterator = iter(ts.wrap(loader, spheres))
    for worker in (0, 1):
        with pytest.raises(OSError, match=f"no worker {worker}") as caught:
            next(iterator)
        assert f"in worker_init_fn of logical worker {worker}" in caught.value.__notes__


def test_random_numbers_that_threads_share_are_told_of_once(spheres, monkeypatch):
    looked, now = threading.Event(), prefetch_iter.shared_states

    def looking():
        states = now()
        looked.set()
        return states

    def meanwhile(draw):
        """Draws while the loop waits for its first batch, which is when it looks."""
        return lambda _: looked.wait(60) and draw()

    def seed(worker):
        assert looked.wait(60)
        np.random.seed(worker)

    monkeypatch.setattr(prefetch_iter, "shared_states", looking)
    for plain in (
        DataLoader(Asking(meanwhile(random.random), 8), 1, num_workers=2),
        DataLoader(Asking(meanwhile(np.random.rand), 8), 1, num_workers=2),
        DataLoader(Asking(lambda index: index, 8), 1, num_workers=2, worker_init_fn=seed),
    ):
        looked.clear()
        loader = ts.wrap(plain, spheres)
        with pytest.warns(UserWarning, match=r"get_worker_info\(\)\.rng") as caught:
            batches = [batch for _ in range(2) for batch in loader]
        # (Advice depends on how fast the machine is.)
        told = [w for w in caught if "the loop waited for data" not in str(w.message)]
        assert len(batches) == 16 and len(told) == 1 and told[0].filename == __file__


def test_what_the_loop_draws_itself_is_nobodys_fault(spheres):
    loader = ts.wrap(DataLoader(Asking(lambda index: index, 40), 1, num_workers=2), spheres)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        iterator = iter(loader)
        for _ in range(40):
            random.random()
            np.random.rand()
            next(iterator)


def test_a_batch_that_nobody_waits_for_ends_with_its_sample(spheres):
    gate, asked = threading.Event(), []

    def wait(index):
        asked.append(index)
        assert gate.wait(60)
        return index

    iterator = iter(ts.wrap(DataLoader(Asking(wait, 24), 12, num_workers=1), spheres))
    while not asked:
        time.sleep(0.001)
    (worker,) = iterator._workers
    del iterator
    gate.set()
    worker.join(60)
    assert asked == [0] and not worker.is_alive()


def test_a_timeout_says_so_and_the_batch_still_comes(spheres):
    gate = threading.Event()
    loader = DataLoader(
        Asking(lambda index: gate.wait(60) and index, 4), 2, num_workers=1, timeout=0.05
    )
    iterator = iter(ts.wrap(loader, spheres))
    with pytest.raises(RuntimeError, match=r"DataLoader timed out after 0\.05 seconds"):
        next(iterator)
    gate.set()
    loader_rows = []
    while len(loader_rows) < 2:
        try:
            loader_rows.append(next(iterator).tolist())
        except RuntimeError:
            continue
    assert loader_rows == [[0, 1], [2, 3]]


def test_mistakes(spheres):
    loader = DataLoader(torch.arange(4))
    with pytest.raises(TypeError, match=r"must be a torch\.utils\.data\.DataLoader, got list; for"):
        ts.wrap([1, 2], spheres)
    with pytest.raises(TypeError, match="spheres must be a KissingSpheres, got int"):
        ts.wrap(loader, 12)
    with pytest.raises(TypeError, match=r"copy_dataset must be True or False, got 'yes'"):
        ts.wrap(loader, spheres, copy_dataset="yes")
    with pytest.raises(ValueError, match=r"workers must be one of .*, got 'thread'"):
        ts.wrap(loader, spheres, workers="thread")
    with pytest.raises(ValueError, match="needs a DataLoader with num_workers > 0"):
        ts.wrap(loader, spheres, workers="process")
    with pytest.raises(ValueError, match="copy_dataset=True is for threads"):
        ts.wrap(DataLoader([1], num_workers=1), spheres, workers="process", copy_dataset=True)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="device='cuda': torch has no CUDA device"):
            ts.wrap(loader, spheres, device="cuda")
    with pytest.raises(ValueError, match="wrapped already"):
        ts.wrap(ts.wrap(loader, spheres), spheres)
    with pytest.raises(RuntimeError, match="nonsense"):
        ts.wrap(loader, spheres, device="nonsense")

    class Own(DataLoader):
        def _get_iterator(self):
            return iter([1])

    with pytest.raises(ValueError, match="Own makes its iterators itself"):
        ts.wrap(Own(torch.arange(4)), spheres)


def test_a_context_for_processes_is_told_to_have_no_effect(spheres):
    plain = DataLoader(range(8), 4, num_workers=2, multiprocessing_context="spawn")
    with pytest.warns(UserWarning, match="multiprocessing_context has no effect"):
        loader = ts.wrap(plain, spheres)
    assert [b.tolist() for b in loader] == [[0, 1, 2, 3], [4, 5, 6, 7]]
