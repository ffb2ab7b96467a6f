"""What the ranks of tests/distributed/test_rank_checks.py share: data, models, samplers."""

from __future__ import annotations

import contextlib
import os
import random
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils.data import IterableDataset, Sampler, TensorDataset

import torch_spheres as ts

ROWS, BATCH = 144, 24
GENERATOR = torch.Generator().manual_seed(1)
X, Y = torch.randn(ROWS, 6, generator=GENERATOR), torch.arange(ROWS) % 5
DATA = TensorDataset(X, Y)


def rank() -> int:
    return dist.get_rank()


def model_on(spheres, make=lambda: nn.Linear(6, 5), **options):
    torch.manual_seed(0)
    model = ts.SphereParallel(make(), spheres, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, optimizer


def step(model, optimizer, x, y):
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.item()


def train(spheres, loader, epochs=1, **options):
    model, optimizer = model_on(spheres, **options)
    for _ in range(epochs):
        for x, y in loader:
            step(model, optimizer, x, y)
    return model


def part(values):
    """This rank's rows of a whole batch."""
    mine = next(iter(ts.SphereBatchSampler(range(len(values)), len(values))))
    return values[mine]


class Shuffled(Sampler):
    """By a generator of the process's own."""

    def __init__(self, how):
        self.how = how

    def __len__(self):
        return ROWS

    def __iter__(self):
        rows = [*range(ROWS)]
        if self.how == "random":
            random.shuffle(rows)
        elif self.how == "numpy":
            np.random.shuffle(rows)
        elif self.how == "by rank":
            rows = np.random.default_rng(rank()).permutation(rows).tolist()
        elif self.how == "later":  # the first batch is the same
            rows[BATCH:] = random.sample(rows[BATCH:], ROWS - BATCH)
        elif self.how == "own rows":
            rows = rows[rank() :: dist.get_world_size()] * dist.get_world_size()
        elif self.how == "given":
            rows = torch.randperm(ROWS, generator=torch.Generator().manual_seed(3)).tolist()
        return iter(rows)


class Stream(IterableDataset):
    def __init__(self, how):
        self.how = how

    def __iter__(self):
        for row in Shuffled(self.how):
            yield X[row], Y[row]


def run(program) -> None:
    """A function of a program, by the name of the first argument; the second is a folder."""
    how, folder = sys.argv[1], Path(sys.argv[2])
    warnings.simplefilter("ignore", FutureWarning)
    function = program[how]
    if how == "untold":  # there is no group yet
        function()
        return
    dist.init_process_group("gloo")
    with ts.KissingSpheres(concurrency=2) as spheres, contextlib.ExitStack() as stack:
        if how not in ("alone", "not_wrapped", "losses", "drift"):
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("error", message=".*(ranks|rank's)")
            warnings.filterwarnings("ignore", "the shards of this model are so")
        if function.__code__.co_argcount == 2:
            function(spheres, folder)
        else:
            function(spheres)
    print("done", flush=True)
    if how == "leaves_early":
        os._exit(0)
    dist.destroy_process_group()
