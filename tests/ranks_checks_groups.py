"""What ranks of test_rank_checks.py run: groups that come late, go, or are left by a rank."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch
import torch.distributed as dist
from rank_checks_support import (
    BATCH,
    DATA,
    X,
    Y,
    model_on,
    part,
    rank,
    run,
    step,
)
from torch import nn
from torch.utils.data import DataLoader

import torch_spheres as ts


def alone(spheres):
    """An evaluation of rank 0 alone, as docs/processes.md has it, between two steps."""
    model, optimizer = model_on(spheres)
    loader = ts.wrap(DataLoader(DATA, BATCH, shuffle=True), spheres)
    test = ts.wrap(DataLoader(DATA, BATCH, shuffle=True), spheres, process_group=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "the shards of this model are so")
        for _ in range(2):
            for n, (x, y) in enumerate(loader):
                step(model, optimizer, x, y)
                if rank() == 0 and n in (1, 4):
                    with torch.no_grad():
                        model.eval()
                        for x_test, _ in test:
                            model(x_test)
                        model.train()
    # The rank's own generator is still looked at when nobody has evaluated.
    x, y = next(iter(loader))
    if rank() == 1:
        torch.rand(1)
    with pytest.warns(UserWarning, match="not at the same place on all ranks"):
        step(model, optimizer, x, y)


def again(spheres, folder):
    """The group is destroyed, and there is another one."""
    model, optimizer = model_on(spheres)
    loader = ts.wrap(DataLoader(DATA, BATCH), spheres)
    for x, y in loader:
        step(model, optimizer, x, y)
    number, world = rank(), dist.get_world_size()
    dist.destroy_process_group()
    for use in (lambda: model(x), lambda: next(iter(loader))):
        with pytest.raises(RuntimeError, match=r"was destroyed \(destroy_process_group\(\)\)"):
            use()
    with torch.no_grad():
        model.eval()(x)  # this process's own
    model.train()
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=number, world_size=world
    )
    if number == 1:
        with torch.no_grad():
            model.module.weight += 1  # rank 0's are everybody's, as at the beginning
    for x, y in loader:
        step(model, optimizer, x, y)
    total = model.module.weight.detach().clone()
    dist.all_reduce(total)
    torch.testing.assert_close(total, world * model.module.weight.detach())


def untold():
    """Models and loaders that were made before there was a group."""
    with ts.KissingSpheres(concurrency=1) as spheres:
        model, optimizer = model_on(spheres)
        with pytest.warns(UserWarning, match=r"launched as one of 2 \(WORLD_SIZE is 2\)"):
            step(model, optimizer, X[:24], Y[:24])
        mine = ts.SphereParallel(nn.Linear(6, 5), spheres, process_group=False)
        loader = ts.wrap(DataLoader(DATA, BATCH), spheres)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", "the shards of this model are so")
            step(model, optimizer, X[:24], Y[:24])  # once
        dist.init_process_group("gloo")
        with pytest.warns(UserWarning, match="the model was made before torch.distributed was"):
            step(model, optimizer, X[:24], Y[:24])
        with pytest.warns(UserWarning, match="the loader was made before torch.distributed was"):
            next(iter(loader))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", "the shards of this model are so")
            step(model, optimizer, X[:24], Y[:24])
            mine(X[:24])
            next(iter(loader))
        dist.destroy_process_group()


def leaves_early(spheres):
    """Rank 1 ends by itself; the others say so."""
    model, optimizer = model_on(spheres)
    x, y = part(X[:48]), part(Y[:48])
    step(model, optimizer, x, y)
    if rank() == 1:
        sys.exit(0)
    try:
        step(model, optimizer, x, y)
    except ts.RankError as error:
        print("told", error, flush=True)


if __name__ == "__main__":
    run(globals())
