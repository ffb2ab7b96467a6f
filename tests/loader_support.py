"""Datasets for the loader's tests, and a pass over a loader as a list that can be compared."""

from __future__ import annotations

import gc
import multiprocessing
import random
import time
import warnings

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

import torch_spheres as ts

# The plain loaders that wrapped ones are compared with have datasets of local classes, which only
# forked workers can have: no longer the default from Python 3.14 on.
multiprocessing.set_start_method("fork", force=True)


class Numbers(Dataset):
    """Samples that say who loaded them, with draws of various kinds."""

    def __init__(self, rows=40, draws=(), bad=()):
        self.rows, self.draws, self.bad = rows, draws, bad

    def __len__(self):
        return self.rows

    def __getitem__(self, index):
        if index in self.bad:
            raise KeyError(f"no row {index}")
        info = get_worker_info()
        sample = [torch.tensor([index, index * index]), index, float(index), str(index)]
        sample.append(-1 if info is None else info.id + 10 * info.num_workers)
        if "torch" in self.draws:
            sample.append(torch.rand(2))
            sample.append(torch.randint(10, ()).item())
        if "seed" in self.draws:
            sample.append(torch.initial_seed())
        if "random" in self.draws:
            sample.append(random.random())
        if "numpy" in self.draws:
            sample.append(np.random.rand())
        return tuple(sample)


class Batches(Numbers):
    """Gives whole batches."""

    def __getitems__(self, indices):
        return [self[i] for i in indices]


class Stream(IterableDataset):
    """Some rows for each worker, not the same number for all."""

    def __init__(self, rows=25, draws=(), uneven=0):
        self.rows, self.draws, self.uneven = rows, draws, uneven

    def __iter__(self):
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        for index in range(worker + self.uneven * worker * workers, self.rows, workers):
            yield (torch.rand(2) if self.draws else torch.zeros(2)), index, worker

    def __len__(self):
        return self.rows


# Warnings about worker processes (Python's of fork() is one, from 3.12 on), and of a dataset, which
# in one of those nobody sees; and advice, which depends on how fast the machine is.
_NOT_COMPARED = ("will create", "use of fork()", "non-tuple sequence", "the loop waited for data")


def epochs(loader, count=2, take=None):
    """Everything that comes out, errors too, with a draw of the training's after each batch."""
    out = []
    for _ in range(count):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            iterator = iter(loader)
            while take is None or len(out) < take:
                try:
                    out.append(next(iterator))
                except StopIteration:
                    break
                except (KeyError, ValueError, IndexError, TypeError, RuntimeError) as error:
                    out.append(type(error).__name__)
                out.append(torch.rand(1))
        messages = [str(w.message) for w in caught]
        out.extend(m for m in messages if not any(known in m for known in _NOT_COMPARED))
    out.append(torch.get_rng_state())
    if loader.generator is not None:
        out.append(loader.generator.get_state())
    return out


def flat(value):
    """Comparable by ==, bit for bit."""
    if isinstance(value, torch.Tensor):
        raw = value.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8)
        return value.dtype, tuple(value.shape), raw.numpy().tobytes()
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, dict):
        return type(value), [(k, flat(v)) for k, v in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value), [flat(v) for v in value]
    return type(value), value


def same(mine, other):
    """Compares two results of `epochs`, and shows the first difference."""
    for k, (a, b) in enumerate(zip(mine, other, strict=False)):
        assert flat(a) == flat(b), f"item {k}: {a} instead of {b}"
    assert len(mine) == len(other)


def resumed(make, state, rng):
    """A new loader that goes on from a state, with the process's random numbers as they were."""
    loader = make()
    loader.load_state_dict(state)
    torch.set_rng_state(rng)
    return loader


def wrapped(dataset, spheres, workers, **options):
    return ts.wrap(DataLoader(dataset, 2, num_workers=workers, **options), spheres)


def eventually(condition):
    """What is under way on the spheres ends by itself, but not at once."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        gc.collect()
        time.sleep(0.01)


class Asking(Dataset):
    """Samples are what `ask(index)` returns, in whatever thread."""

    def __init__(self, ask, rows=24):
        self.ask, self.rows = ask, rows

    def __len__(self):
        return self.rows

    def __getitem__(self, index):
        return self.ask(index)


class Plain(IterableDataset):
    """Keeps nothing: what was there has to be read over."""

    def __iter__(self):
        info = get_worker_info()
        step, first = (1, 0) if info is None else (info.num_workers, info.id)
        for k in range(first, 23, step):
            yield k, torch.rand(1)
