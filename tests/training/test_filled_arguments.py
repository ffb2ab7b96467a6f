"""Arguments that a forward fills or takes from, which the loop would look for in vain."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import pytest
import torch
from loop_support import W
from spheres_support import spheres_of
from torch import Tensor

import torch_spheres as ts

X = torch.randn(48, 4, generator=torch.Generator().manual_seed(0))

spheres = spheres_of(1, 12)


@dataclasses.dataclass
class Batch:
    x: Tensor
    hidden: Tensor | None = None


class Plain:
    hidden: Tensor | None = None


def fill_list(s: Any, x: Tensor, found: list[Any]) -> Tensor:
    found.append(s.n(x))
    return s.n(x)


def fill_dict(s: Any, batch: dict[str, Any]) -> Tensor:
    batch["hidden"] = s.n(batch["x"])
    return s.n(batch["x"])


def pop(s: Any, batch: dict[str, Any]) -> Tensor:
    return s.n(batch.pop("x"))


def fill_object(s: Any, x: Tensor, found: Any) -> Tensor:
    found.hidden = s.n(x)
    return s.n(x)


def fill_dataclass(s: Any, batch: Batch) -> Tensor:
    batch.hidden = s.n(batch.x)
    return s.n(batch.x)


@pytest.mark.parametrize(
    ("forward", "make"),
    [
        (fill_list, lambda: (X, [])),
        (fill_list, lambda: (X, [X])),
        (fill_dict, lambda: ({"x": X},)),
        (pop, lambda: ({"x": X, "y": X},)),
        (fill_object, lambda: (X, Plain())),
        (fill_dataclass, lambda: (Batch(X),)),
    ],
)
def test_arguments_that_a_forward_fills_are_reported_once(spheres, forward, make):
    parallel = ts.SphereParallel(W(forward), spheres)
    with pytest.warns(UserWarning, match=r"changes its arguments \['args'\].*Return what"):
        out = parallel(*make())
    assert torch.equal(out, parallel.module(*make()))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the module's forward")
        parallel(*make())


def test_arguments_that_a_forward_only_reads(spheres):
    def forward(s: Any, batch: dict[str, Any], extra: Batch) -> Tensor:
        return s.n(batch["x"]) + sum(batch["more"]) + extra.x

    parallel = ts.SphereParallel(W(forward), spheres)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the module's forward")
        for _ in range(3):
            parallel({"x": X, "more": [X, X]}, Batch(X))
