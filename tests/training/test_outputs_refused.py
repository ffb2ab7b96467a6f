"""Outputs that cannot be put together from those of shards are refused, with what to return."""

from __future__ import annotations

import collections
import dataclasses
import functools
import types
import warnings

import numpy as np
import pytest
import torch
from judge import Calls, parallel
from outputs_support import EVEN, Side, X
from spheres_support import spheres_of

import torch_spheres as ts

spheres = spheres_of(1, 12, ids=["alone", "twelve at once"])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_refused(spheres, layout):
    def fn(s, x):
        return torch.nested.nested_tensor([*x], layout=layout)

    with pytest.raises(TypeError, match=r"output 0 of the module is a nested tensor.*pad it in"):
        parallel(fn, spheres)(X)


REFUSED = {
    "a statistic": (lambda s, x: x.mean(0), r"shape \(4,\) for 2 rows, has no rows and differs"),
    "a similarity": (lambda s, x: x @ x.T, r"shape \(2, 2\) for 2 rows, depends on pairs of rows"),
    "pairs in one dimension": (lambda s, x: torch.pdist(x), "depends on pairs of rows"),
    "squeezed": (lambda s, x: s.layer(x)[:, :1].squeeze(), None),
    "a list of rows": (lambda s, x: [*s.layer(x)], "as a list with tensors for each row"),
    "detections": (lambda s, x: [{"boxes": r[None]} for r in x], "tensors for each row d"),
    "a shape": (lambda s, x: (x, x.shape), "output 1 .* is no tensor and depends on the rows"),
    "a length": (lambda s, x: (x, len(x)), "output 1 .* is no tensor and depends on the rows"),
    "a number": (lambda s, x: x.sum().item(), r"of type float, is no tensor and differs from"),
    "a string": (lambda s, x: str(x[0, 0]), "is no tensor and depends on the rows; return a"),
    "a flag": (lambda s, x: (x, bool(x[0, 0] > X[5, 0])), "output 1 .* is no tensor and d"),
    "a numpy number": (lambda s, x: np.float64(x.sum()), "is no tensor and d"),
    "a numpy statistic": (lambda s, x: x.numpy().mean(0), "a ndarray .* has no rows and differs"),
    "an enum": (lambda s, x: Side(int(x[0, 0] > 0)), "is no tensor and d"),
    "two for each row": (lambda s, x: ["a"] * 2 * len(x), "is no tensor and depends on the rows"),
    "a generator": (lambda s, x: (r for r in [1]), "is a generator, which can be read only once"),
    "an iterator": (lambda s, x: iter([x]), "is a list_iterator, which can be read only once"),
}  # fmt: skip


@pytest.mark.parametrize("x", [EVEN, X[:12]], ids=len)
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_put_together_is_refused(spheres, name, x):
    fn, message = REFUSED[name]
    if len(x) == 12:
        message = message and message.replace("2 rows", "1 rows").replace("(2, 2\\)", "(1, 1\\)")
        if name == "squeezed":
            message = "another number of dimensions for one row than for several, .*squeeze"
        if name == "pairs in one dimension":
            message = "depends on pairs|no rows"
    model = parallel(fn, spheres)
    with warnings.catch_warnings():
        if message is None:
            torch.testing.assert_close(model(x), model.module(x))
        else:
            with pytest.raises((ValueError, TypeError), match=message):
                model(x)
            with pytest.raises((ValueError, TypeError), match=message):
                model(x)  # and not only in the first call
    model.module.fn = lambda s, x: s.layer(x)
    torch.testing.assert_close(model(x), model.module(x))


class Slotted:
    __slots__ = ("hidden",)

    def __init__(self, hidden):
        self.hidden = hidden


class Attributes:
    def __init__(self, value):
        self.inside = {"a": [Slotted(value)]}


class Child(Slotted):
    __slots__ = ()


HOLDING = {
    "slots": (lambda s, x: (x, Slotted(x)), r"output 1 .* is a Slotted that holds a tensor \(.hid"),
    "inherited slots": (lambda s, x: Child(x), r"a Child that holds a tensor \(\.hidden\)"),
    "deep": (lambda s, x: Attributes(x), r"Attributes .* \(\.inside\['a'\]\[0\]\.hidden\)"),
    "in a list": (lambda s, x: [Attributes(x)] * 2, r"Attributes .* \(\.inside"),
    "a set": (lambda s, x: {x}, r"a set that holds a tensor"),
    "a closure": (lambda s, x: lambda: x, r"a function that holds a tensor \(\.x\)"),
    "a method": (lambda s, x: Slotted(x).__init__, r"a method that holds a tensor"),
    "partial": (lambda s, x: functools.partial(max, x), r"a partial that holds a tensor"),
    "a view of a dict": (lambda s, x: {"a": x}.values(), r"a dict_values that holds a tensor"),
    "a module": (lambda s, x: s.layer, r"a Linear that holds a tensor \(\.weight\)"),
}


@pytest.mark.parametrize("name", HOLDING)
def test_objects_that_hold_tensors_are_refused(spheres, name):
    fn, message = HOLDING[name]
    with pytest.raises(TypeError, match=message + ".*return the tensors themselves"):
        parallel(fn, spheres)(EVEN)


@pytest.mark.parametrize(
    "output",
    [
        lambda s, x: s.layer.weight * len(x),
        lambda s, x: s.layer.weight.pow(2).sum(1) / len(x),
        lambda s, x: (x > -100).sum(0),
        lambda s, x: torch.tensor([len(x)]),
        lambda s, x: torch.tensor(x.shape),
        lambda s, x: np.histogram(x.numpy(), bins=2, range=(-100, 100))[0],
        lambda s, x: tuple(x.shape),
        lambda s, x: [f"{len(x)} rows"],
        lambda s, x: collections.deque([len(x)]),
        lambda s, x: types.SimpleNamespace(rows=len(x)),
        lambda s, x: functools.partial(int, len(x)),
        lambda s, x: Rows(x.tolist()),
        lambda s, x: {"n": len(x)}.values(),
    ],
)
@pytest.mark.parametrize("rows", [24, 26])
def test_what_depends_on_the_number_of_rows_is_refused(spheres, output, rows):
    """All shards may agree on it, and have something else than the batch."""
    model = ts.SphereParallel(Calls(lambda s, x: (s.layer(x), output(s, x))), spheres)
    with pytest.raises((ValueError, TypeError), match="output 1"):
        model(torch.randn(rows, 4))


class Rows:
    """An object without a comparison of its own."""

    def __init__(self, values):
        self.values = values


@dataclasses.dataclass
class Summed:
    x: torch.Tensor

    def __post_init__(self):
        self.mean = float(self.x.detach().mean())


def test_what_a_dataclass_has_computed_from_its_fields_is_refused(spheres):
    model = ts.SphereParallel(Calls(lambda s, x: Summed(s.layer(x))), spheres)
    with pytest.raises(ValueError, match="is no tensor and differs from shard to shard"):
        model(torch.randn(24, 4))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_sparse_outputs_say_what_to_do(spheres):
    model = ts.SphereParallel(Calls(lambda s, x: s.layer(x).to_sparse()), spheres)
    with pytest.raises(TypeError, match=r"layout torch\.sparse_coo.*to_dense\(\)"):
        model(torch.randn(24, 4)).to_dense().sum().backward()
    model = ts.SphereParallel(Calls(lambda s, x: s.layer(x).detach().to_sparse_csr()), spheres)
    with pytest.raises(TypeError, match=r"layout torch\.sparse_csr.*to_dense\(\)"):
        model(torch.randn(24, 4))
