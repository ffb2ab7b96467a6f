"""Shards have the user's own objects: what the loop changes of them between steps is seen."""

from __future__ import annotations

import collections
import threading

import numpy as np
import pytest
import torch
from loop_support import W
from spheres_support import spheres_of
from torch import Tensor, nn

import torch_spheres as ts

X = torch.randn(48, 4, generator=torch.Generator().manual_seed(0))

spheres = spheres_of(1, 12)


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value: float) -> None:
        self.value = value


class Scale:
    def __init__(self) -> None:
        self.by = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.by


@pytest.mark.parametrize(
    ("value", "change", "read"),
    [
        ({1}, lambda v: v.add(2), lambda v: sum(v)),
        (collections.deque([1.0]), lambda v: v.append(2.0), lambda v: sum(v)),
        (np.ones(4, np.float32), lambda v: v.__imul__(3), torch.from_numpy),
        (Slotted(1.0), lambda v: setattr(v, "value", 3.0), lambda v: v.value),
        (Scale(), lambda v: setattr(v, "by", 3.0), lambda v: v(1.0)),
        (
            {"a": {"b": {"c": {"d": {"e": [1.0]}}}}},
            lambda v: v["a"]["b"]["c"]["d"]["e"].append(2.0),
            lambda v: sum(v["a"]["b"]["c"]["d"]["e"]),
        ),
        (torch.ones(4), lambda v: v.mul_(3), lambda v: v),
        (bytearray(b"a"), lambda v: v.extend(b"b"), len),
        ([[1.0]], lambda v: v[0].append(2.0), lambda v: sum(v[0])),
    ],
    ids=["set", "deque", "array", "slots", "callable", "deep", "tensor", "bytearray", "list"],
)
def test_objects_that_the_loop_changes_in_place_are_seen(spheres, value, change, read):
    model = W(lambda s, x: s.n(x) * read(s.value), value=value)
    parallel = ts.SphereParallel(model, spheres)
    for _ in range(2):
        torch.testing.assert_close(parallel(X), model(X), rtol=1e-5, atol=1e-6)
        change(value)


@pytest.mark.usefixtures("no_comparison")
def test_the_replicas_have_the_users_own_objects(spheres):
    lock, seen = threading.Lock(), []
    model = W(lambda s, x: (seen.append(s.lock is lock and s.config is config), s.n(x))[1])
    config = model.config = {"a": [1]}
    model.lock = lock  # which cannot be copied
    ts.SphereParallel(model, spheres)(X)
    assert seen == [True] * 12


def test_parameters_of_the_users_own_class(spheres):
    class Scaled(nn.Parameter):
        def times(self) -> Tensor:
            return self * self.factor

    model = W(lambda s, x: s.n(x) * s.w.times())
    model.w = Scaled(torch.ones(4))
    parallel = ts.SphereParallel(model, spheres)
    for factor in (2.0, 3.0):
        model.w.factor = factor
        torch.testing.assert_close(parallel(X), factor * model.n(X))


def test_classes_with_slots_and_with_arguments_for_new(spheres):
    class Odd(nn.Module):
        __slots__ = ("factor",)

        def __new__(cls, factor: float) -> Odd:
            return super().__new__(cls)

        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor

        def forward(self, x: Tensor) -> Tensor:
            return x * self.factor

    model = nn.Sequential(nn.Linear(4, 4), Odd(3.0))
    parallel = ts.SphereParallel(model, spheres)
    torch.testing.assert_close(parallel(X), model(X))
    model[1].factor = 5.0
    torch.testing.assert_close(parallel(X), model(X))
