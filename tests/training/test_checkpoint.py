"""Activation checkpointing inside the model: the bits of the same model without it."""

from __future__ import annotations

import functools

import pytest
import torch
from reference import digest
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import torch_spheres as ts

X = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))


class Blocks(nn.Module):
    """Three blocks with dropout; each, or parts of it, run again in the backward pass."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.first = nn.Linear(8, 16)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Dropout(0.3)) for _ in range(3)
        )
        self.last = nn.Linear(16, 3)

    def forward(self, x):
        x = F.dropout(self.first(x), 0.2, self.training)
        for block in self.blocks:
            x = self.how(block, x)
        return self.last(x + torch.rand_like(x))


def nested(block, x):
    def inner(x):
        return checkpoint(block, x, use_reentrant=True)

    return checkpoint(inner, x, use_reentrant=True)


def mixed(block, x):
    x = checkpoint(block[0], x, use_reentrant=False)
    return checkpoint(block[1:], x, use_reentrant=True)


def leaf_inside(block, x):
    """Nothing on the way back from here leads to a parameter, except through the checkpoint."""
    return checkpoint(block, x.detach().requires_grad_(), use_reentrant=True) + x


HOW = {
    "none": lambda block, x: block(x),
    "non-reentrant": functools.partial(checkpoint, use_reentrant=False),
    "reentrant": functools.partial(checkpoint, use_reentrant=True),
    "sequential": lambda block, x: checkpoint_sequential(block, 2, x, use_reentrant=True),
    "nested": nested,
    "mixed": mixed,
}


def train(how, spheres):
    torch.manual_seed(0)
    model = Blocks(how)
    parallel = ts.SphereParallel(model, spheres)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss = parallel(X).square().mean()
        loss.backward(retain_graph=True)
        loss.backward()
        optimizer.step()
        parallel.forward_backward(lambda out, y: out.square().mean(), X, X)
        optimizer.step()
    for replica in parallel._engine.pool._idle:
        assert all(p.grad is None for p in replica.module.parameters())
    return digest([*model.parameters(), *(p.grad for p in model.parameters())])


@functools.cache
def without():
    with ts.KissingSpheres(concurrency=1) as spheres:
        return train(HOW["none"], spheres)


@pytest.mark.parametrize("concurrency", [1, 3, 12])
@pytest.mark.parametrize("how", HOW)
def test_the_bits_do_not_depend_on_checkpoints(how, concurrency):
    with ts.KissingSpheres(concurrency=concurrency) as spheres:
        assert train(HOW[how], spheres) == without()


@pytest.mark.parametrize("concurrency", [1, 3])
def test_a_checkpoint_that_only_itself_leads_to_parameters(concurrency):
    grads = []
    for how in (leaf_inside, lambda block, x: block(x.detach()) + x):
        torch.manual_seed(0)
        model = Blocks(how)
        with ts.KissingSpheres(concurrency=concurrency) as spheres:
            ts.SphereParallel(model, spheres)(X).square().mean().backward()
        grads.append(digest([p.grad for p in model.parameters()]))
    assert grads[0] == grads[1]


def test_autocast_is_there_again_when_a_checkpoint_runs():
    with ts.KissingSpheres(concurrency=3) as spheres:
        prints = set()
        for how in ("none", "non-reentrant", "reentrant"):
            torch.manual_seed(0)
            model = Blocks(HOW[how])
            with torch.autocast("cpu", torch.bfloat16):
                out = ts.SphereParallel(model, spheres)(X)
            out.float().square().mean().backward()
            prints.add(digest([p.grad for p in model.parameters()]))
        assert len(prints) == 1


def test_checkpoints_save_less():
    saved = {}
    for how in ("none", "non-reentrant", "reentrant"):
        sizes = []

        def pack(x, sizes=sizes):
            sizes.append(x.numel())
            return x

        with ts.KissingSpheres(concurrency=3) as spheres:
            parallel = ts.SphereParallel(Blocks(HOW[how]), spheres)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                parallel(X)
        saved[how] = sum(sizes)
    assert max(saved["reentrant"], saved["non-reentrant"]) < 0.7 * saved["none"]
