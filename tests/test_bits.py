"""The promise: the bits of the reference, whatever runs the shards, however they interleave."""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable
from pathlib import Path

import fork_server
import pytest
import reference
import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional as F

import torch_spheres as ts

Step = Callable[[nn.Module, Tensor, Tensor], Tensor]
_naps = random.Random()  # not the process's: whoever draws from that in a forward is warned


class Nap(torch.autograd.Function):
    """The identity, with a sleep of random length forward and backward."""

    @staticmethod
    def forward(ctx, x):
        time.sleep(_naps.random() * 0.002)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        time.sleep(_naps.random() * 0.002)
        return grad


def nap(_module, _args, output):
    if isinstance(output, Tensor):
        return Nap.apply(output)
    return None


@functools.cache
def expected(name: str, kind: str, levels: int, rows: int) -> str:
    model = zoo.make(name)
    optimizers = zoo.optimizer_of(model, kind)
    losses = []
    for x, y in zoo.batches(rows):
        optimizers.zero_grad()
        losses.append(reference.train_step(model, x, y, F.cross_entropy, 12 ** (levels - 1)))
        optimizers.step()
    return zoo.fingerprint(model, optimizers, losses)


def trained(
    name: str, kind: str, rows: int, spheres: ts.KissingSpheres, sleepy: bool = False
) -> str:
    model = zoo.make(name)
    parallel = ts.SphereParallel(model, spheres)
    optimizers = zoo.optimizer_of(model, kind)
    for optimizer in optimizers.each:
        ts.GradientHook(optimizer, parallel)
    if sleepy:
        for part in model.children():
            part.register_forward_hook(nap)
    losses = []
    for x, y in zoo.batches(rows):
        optimizers.zero_grad()
        loss = F.cross_entropy(parallel(x), y)
        loss.backward()
        optimizers.step()
        losses.append(loss.detach())
    return zoo.fingerprint(model, optimizers, losses)


@pytest.mark.parametrize("kind", zoo.OPTIMIZERS)
@pytest.mark.parametrize("name", zoo.ZOO)
def test_bits_equal_the_reference_at_every_concurrency(name: str, kind: str) -> None:
    for concurrency in (1, 2, 3, 5, 12):
        with ts.KissingSpheres(concurrency=concurrency) as spheres:
            assert trained(name, kind, 50, spheres) == expected(name, kind, 2, 50), concurrency


@pytest.mark.parametrize("name", zoo.ZOO)
@pytest.mark.parametrize(("levels", "rows"), [(1, 50), (2, 12), (2, 5), (3, 150), (3, 20)])
def test_bits_equal_the_reference_at_every_level(name: str, levels: int, rows: int) -> None:
    for concurrency in (1, 3) if rows < 150 else (3,):
        with ts.KissingSpheres(levels, concurrency=concurrency) as spheres:
            assert trained(name, "sgd", rows, spheres) == expected(name, "sgd", levels, rows)


@pytest.mark.parametrize("name", zoo.ZOO)
def test_bits_do_not_depend_on_the_schedule(name: str) -> None:
    for concurrency in (2, 12):
        with ts.KissingSpheres(concurrency=concurrency) as spheres:
            made = trained(name, "sgd", 60, spheres, sleepy=True)
            assert made == expected(name, "sgd", 2, 60), concurrency


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("name", zoo.ZOO)
def test_forward_backward_has_the_bits_of_its_reference(name: str, counted: bool) -> None:
    def loss_fn(out: Tensor, y: Tensor) -> Tensor | tuple[Tensor, int]:
        if not counted:
            return F.cross_entropy(out, y)
        kept = y != 3
        return F.cross_entropy(out[kept], y[kept], reduction="sum"), int(kept.sum())

    prints = set()
    for levels, rows, steps, numbers in ((2, 50, 3, (0, 1, 2, 5)), (3, 150, 1, (0, 3))):
        for concurrency in numbers:  # 0 is the reference
            model = zoo.make(name)
            optimizers = zoo.optimizer_of(model, "sgd")
            losses = []
            with ts.KissingSpheres(levels, concurrency=max(1, concurrency)) as spheres:
                parallel = ts.SphereParallel(model, spheres)
                for x, y in zoo.batches(rows, steps):
                    optimizers.zero_grad()
                    if concurrency:
                        losses.append(parallel.forward_backward(loss_fn, x, y))
                    else:
                        leaves = 12 ** (levels - 1)
                        step = reference.train_step_by_shard(model, x, y, loss_fn, leaves)
                        losses.append(step)
                    optimizers.step()
            prints.add((levels, zoo.fingerprint(model, optimizers, losses)))
    assert len(prints) == 2, prints


RESUME = """
import sys, torch, zoo
from torch.nn import functional as F
import torch_spheres as ts
path, first, last, concurrency = sys.argv[1], *map(int, sys.argv[2:])
model = zoo.make("transformer with dropout")
optimizers = zoo.optimizer_of(model)
if first:
    saved = torch.load(path)
    model.load_state_dict(saved["model"])
    optimizers.each[0].load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["rng"])
losses = []
with ts.KissingSpheres(concurrency=concurrency) as spheres:
    parallel = ts.SphereParallel(model, spheres)
    for step, (x, y) in enumerate(zoo.batches(50, last)):
        if step >= first:
            optimizers.zero_grad()
            F.cross_entropy(parallel(x), y).backward()
            optimizers.step()
torch.save({"model": parallel.state_dict(), "optimizer": optimizers.each[0].state_dict(),
            "rng": torch.get_rng_state()}, path)
print(zoo.fingerprint(model, optimizers, losses))
"""


def test_a_checkpoint_in_the_middle_resumes_in_a_new_process_bit_for_bit(tmp_path) -> None:
    def run(path: str, *numbers: int) -> str:
        environment = {"PYTHONPATH": str(Path(__file__).parent)}
        done = fork_server.run(RESUME, tmp_path / path, *numbers, env=environment)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    straight = run("straight", 0, 4, 2)
    run("half", 0, 2, 5)
    assert run("half", 2, 4, 1) == straight
