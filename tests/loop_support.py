"""Comparing a SphereParallel model with the bare module, for several test files."""

from __future__ import annotations

import contextlib
import copy
import gc
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import torch_spheres as ts

T = TypeVar("T")


class W(nn.Module):
    """A layer `n` and any attributes; its forward calls ``f(self, *args)``."""

    def __init__(self, f: Callable[..., Any], **attributes: Any) -> None:
        super().__init__()
        self.n = nn.Linear(4, 4)
        self.f = f
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, *args: Any) -> Any:
        return self.f(self, *args)


def pair(module: nn.Module, spheres: ts.KissingSpheres) -> tuple[ts.SphereParallel, nn.Module]:
    """The module on the spheres, and a bare copy of it; in float64, so that rounding is small."""
    module.double()
    return ts.SphereParallel(copy.deepcopy(module), spheres), module


def assert_same_gradients(parallel: nn.Module, bare: nn.Module) -> None:
    """Up to rounding. Parameters without a gradient have none in either."""
    for (name, p), (_, q) in zip(parallel.named_parameters(), bare.named_parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12, msg=name)


def assert_same_weights(parallel: nn.Module, bare: nn.Module) -> None:
    """Up to rounding: parameters and buffers."""
    mine, other = parallel.state_dict(), bare.state_dict()
    assert mine.keys() == other.keys()
    for name, value in other.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-9, atol=1e-12, msg=name)


def soon(condition: Callable[[], bool], seconds: float = 20) -> bool:
    """For what a sphere lets go of after it has woken the caller."""
    end = time.monotonic() + seconds
    while not (done := condition()) and time.monotonic() < end:
        time.sleep(0.001)
    return done


class Held:
    """What autograd keeps for a backward pass; it lives as long as the graph."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()


@contextlib.contextmanager
def no_graph_left_behind() -> Iterator[None]:
    """A block whose graphs are freed soon after it, without the garbage collector's help."""
    alive: weakref.WeakSet[Held] = weakref.WeakSet()
    packed = 0

    def pack(tensor: Tensor) -> Held:
        nonlocal packed
        packed += 1
        held = Held(tensor)
        alive.add(held)
        return held

    gc.collect()
    gc.disable()
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
            yield
        assert packed > 0
        assert soon(lambda: not alive)
    finally:
        gc.enable()


def at_each_concurrency(run: Callable[[ts.KissingSpheres], T], *concurrencies: int) -> list[T]:
    """What `run` returns on spheres of each concurrency, from the same seed."""
    results = []
    for concurrency in concurrencies:
        with ts.KissingSpheres(concurrency=concurrency) as spheres:
            torch.manual_seed(0)
            results.append(run(spheres))
    return results
