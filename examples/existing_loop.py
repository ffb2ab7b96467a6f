"""Gradient accumulation in an existing loop: before, and after with work functions on spheres.

Before: the shards of a batch one after another, their gradients added up. After: the same shards
as work items, each handing its gradients to the hook. The weights are the same, bit for bit, when
the loop before adds in the order of the hierarchy's tree.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torch_spheres as ts

SHARDS, STEPS = 12, 5
Tensors = tuple[Tensor, ...]


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(96, 20, generator=generator), torch.randint(0, 4, (96,), generator=generator))
        for _ in range(STEPS)
    ]


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 4))


def shard_gradients(model: nn.Module, x: Tensor, y: Tensor, total: int) -> tuple[Tensor, ...]:
    """Gradients of the shard's part of the batch's mean loss."""
    loss = F.cross_entropy(model(x), y, reduction="sum") / total
    return torch.autograd.grad(loss, list(model.parameters()))


def in_tree_order(c: list[Tensor]) -> Tensor:
    quads = [(c[i] + c[i + 1]) + (c[i + 2] + c[i + 3]) for i in (0, 4, 8)]
    return (quads[0] + quads[1]) + quads[2]


def before() -> nn.Module:
    """Sequential accumulation in plain torch, on one thread."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for x, y in batches():
        parts = zip(x.tensor_split(SHARDS), y.tensor_split(SHARDS), strict=True)
        grads = [shard_gradients(model, xs, ys, len(x)) for xs, ys in parts]
        for p, shards in zip(model.parameters(), zip(*grads, strict=True), strict=True):
            p.grad = in_tree_order(list(shards))
        optimizer.step()
    return model


def after(concurrency: int | None = None) -> nn.Module:
    """The same, with the shards on the spheres."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with ts.KissingSpheres(levels=2, concurrency=concurrency) as spheres:
        hook = ts.GradientHook(optimizer, spheres)

        for x, y in batches():
            xs, ys = x.tensor_split(SHARDS), y.tensor_split(SHARDS)

            def work(k: int, xs: Tensors = xs, ys: Tensors = ys) -> None:
                rows = sum(map(len, xs))
                hook.add(k, shard_gradients(model, xs[k], ys[k], rows))

            optimizer.zero_grad()
            spheres.distribute_work(range(SHARDS), work)
            spheres.wait()
            optimizer.step()  # sums the shards' gradients up the hierarchy first
    return model


def same_bits(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()  # --help
    torch.set_num_threads(1)  # the spheres' shards run with one intra-op thread each
    sequential = before()
    for concurrency in (1, 2, 12):
        assert same_bits(sequential, after(concurrency)), concurrency
    print("the same weights, bit for bit, at concurrency 1, 2 and 12")
