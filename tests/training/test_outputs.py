"""What comes out of a call: along which dimension, how often, and what is no tensor."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections import deque

import numpy as np
import pytest
import torch
from judge import Calls, judged, parallel
from outputs_support import EVEN, ROWS, Side, X
from spheres_support import spheres_of
from torch import nn

import torch_spheres as ts

spheres = spheres_of(1, 12, ids=["alone", "twelve at once"])


# ---- along which dimension ----

ALONG = {
    "rows first": lambda s, x: s.layer(x),
    "rows last": lambda s, x: s.layer(x).T,
    "rows in the middle": lambda s, x: torch.stack([s.layer(x), s.layer(2 * x)]),
    "one dimension": lambda s, x: s.layer(x).sum(1),
    "several for each row": lambda s, x: s.layer(x).repeat_interleave(3, 0),
    "several, in the middle": lambda s, x: s.layer(x).repeat_interleave(2, 0).T[:, :, None],
    "as many columns as rows of a shard": lambda s, x: s.layer(x)[:, :2],
    "twice as many": lambda s, x: s.layer(x).T[None],
    "complex": lambda s, x: torch.view_as_complex(s.layer(x).view(-1, 2, 2)).abs().T,
    "integers": lambda s, x: (s.layer(x), s.layer(x).argmax(1), (x > 0).T),
    "no elements": lambda s, x: (s.layer(x), x[:, :0], x.new_zeros(0, 3)),
    "other inputs' rows": lambda s, x: {"a": s.layer(x), "b": [x.T, (x[:, 0],)]},
}


@pytest.mark.parametrize("x", [X, EVEN, X[:13], X[:2]], ids=len)
@pytest.mark.parametrize("fn", ALONG.values(), ids=ALONG)
def test_the_rows_dimension_is_found(spheres, fn, x):
    judged(Calls(fn), spheres, (x,))


def test_the_dimension_is_found_for_each_form_of_call(spheres):
    """Which differ in what comes out, in training, and not in lengths."""

    class Forms(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(()))

        def forward(self, x, last=False):
            y = self.w * x
            return y.movedim(0, -1) if last or (not self.training and x.dim() == 2) else y

    module = Forms()
    model = ts.SphereParallel(module, spheres)
    plain = Forms()
    for training in (True, False):
        model.train(training)
        plain.train(training)
        for x in (EVEN, EVEN[:, :, None], EVEN[:, :2]):
            for last in (False, True):
                torch.testing.assert_close(model(x, last), plain(x, last))


def test_aux_outputs_of_training_alone(spheres):
    """The evaluation returns something else, so that shapes are compared in training."""

    class Inception(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x):
            y = self.norm(self.layer(x))
            return (y, y.T) if self.training else y

    module = Inception()
    state = {name: value.clone() for name, value in module.state_dict().items()}
    model = ts.SphereParallel(module, spheres)
    with torch.no_grad():
        y, transposed = model(EVEN)
    assert torch.equal(y.T, transposed)
    # (Processors with AMX have other kernels for two rows than for 24.)
    torch.testing.assert_close(model.eval()(EVEN), module(EVEN))
    module.load_state_dict(state)
    module.train()
    reference = ts.SphereParallel(module, spheres)
    reference(EVEN)
    assert module.norm.num_batches_tracked == 1, "comparing left no trace"


def test_shapes_alone_where_nothing_can_be_compared(spheres):
    """A module that runs for few rows alone: what it returns is put together as ever."""

    def few(fn):
        def limited(s, x):
            assert len(x) < 4
            return fn(s, x)

        return parallel(limited, spheres), Calls(fn)

    model, plain = few(lambda s, x: s.layer(x))
    torch.testing.assert_close(model(EVEN), plain(EVEN))
    model, plain = few(lambda s, x: s.layer(x).T)
    torch.testing.assert_close(model(X), plain(X))  # shards of two sizes tell
    model, _ = few(lambda s, x: s.layer(x).T[:3])
    with pytest.raises(ValueError, match=r"along dimension 0, which must be the batch's rows"):
        model(EVEN)


@pytest.mark.parametrize("part", [False, True], ids=["the whole", "a part"])
@pytest.mark.parametrize("in_place", [False, True], ids=["torch.compile", "Module.compile"])
def test_compiled_modules_are_compared_as_they_were(spheres, in_place, part):
    """Nothing is compiled for it, and nothing is left of it."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(len(inputs))
        return graph.forward

    torch.manual_seed(0)
    rnn = nn.GRU(4, 2, 2, batch_first=True)  # whose state could be two layers, or two rows
    plain = copy.deepcopy(rnn)
    if in_place:
        rnn.compile(backend=backend)
    else:
        rnn = torch.compile(rnn, backend=backend)
    model = ts.SphereParallel(nn.Sequential(rnn) if part else rnn, spheres)
    x = torch.randn(24, 3, 4)
    for _ in range(2):
        torch.testing.assert_close(model(x), plain(x))
        count = len(compiled)
    assert len(compiled) == count
    (found,) = [m for m in model.module.modules() if isinstance(m, nn.GRU)]
    assert (found._compiled_call_impl is not None) == in_place
    torch._dynamo.reset()


# ---- once ----

ONCE = {
    "a matrix": lambda s, x: (s.layer(x), s.matrix),
    "a vector": lambda s, x: (s.layer(x), s.vector * 2),
    "a vector as long as two shards": lambda s, x: (s.layer(x), s.matrix.flatten()[:6]),
    "a constant": lambda s, x: (s.layer(x), torch.arange(4.0)),
    "a bias of the layer": lambda s, x: {"y": s.layer(x), "b": s.layer.bias},
}


@pytest.mark.parametrize("x", [X, EVEN], ids=len)
@pytest.mark.parametrize("fn", ONCE.values(), ids=ONCE)
def test_what_does_not_depend_on_rows_comes_once(spheres, fn, x):
    judged(Calls(fn), spheres, (x,))


def test_what_comes_once_is_no_view_of_the_weights(spheres):
    model = parallel(lambda s, x: (s.layer(x), s.matrix), spheres)
    before = model.module.matrix.detach().clone()
    with torch.no_grad():
        model(X)[1].zero_()
    assert torch.equal(model.module.matrix, before)


def test_kinds_of_tensors_that_have_no_values_to_compare(spheres):
    def fn(s, x):
        return s.layer(x), s.vector, (x * 2).T

    out = ts.SphereParallel(Calls(fn).to("meta"), spheres)(X.to("meta"))
    assert [tuple(t.shape) for t in out] == [(ROWS, 4), (3,), (4, ROWS)]
    eye = torch.eye(3).to_sparse()
    _, sparse, same = parallel(lambda s, x: (s.layer(x), x.to_sparse(), eye), spheres)(X)
    assert torch.equal(sparse.to_dense(), X)
    assert torch.equal(same.to_dense(), torch.eye(3))
    eighths = X.to(torch.float8_e4m3fn)
    found = parallel(lambda s, x: x.to(torch.float8_e4m3fn), spheres)(X)
    assert torch.equal(found.view(torch.uint8), eighths.view(torch.uint8))


# ---- what is no tensor, and the same for all shards ----


@dataclasses.dataclass
class Settings:
    width: int
    name: str


class Plain:
    pass


@pytest.mark.parametrize(
    "value",
    [
        None, 3, 2.5, "text", float("nan"), True, (1, 2), [1, 2], [], ["a", "b"], {"a": None}, {3},
        deque([1, 2]), range(2), Settings(1, "a"), Side.LEFT, torch.float32, np.float32(2),
        torch.Size([2, 4]), {"a": (1, [2, "b"])}, b"bytes", print,
    ],
    ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("x", [X, EVEN, X[:1]], ids=len)
def test_what_is_the_same_for_all_shards_is_returned(spheres, value, x):
    out, found = parallel(lambda s, x: (s.layer(x), value), spheres)(x)
    assert len(out) == len(x)
    assert type(found) is type(value)
    assert found == value or found != found


def test_objects_that_cannot_be_compared_are_the_first_shards(spheres):
    found = parallel(lambda s, x: (x, Plain()), spheres)(X)[1]
    assert type(found) is Plain


# ---- what has an element for each row ----


@pytest.mark.parametrize("x", [X, EVEN, X[:12], X[:1]], ids=len)
@pytest.mark.parametrize("kind", [list, tuple, deque])
def test_sequences_with_an_element_for_each_row(spheres, kind, x):
    def fn(s, x):
        return s.layer(x), kind(f"{v:.3f}" for v in x[:, 0].tolist()), kind("a" for _ in x)

    out, texts, same = parallel(fn, spheres)(x)
    assert len(out) == len(texts) == len(x)
    assert texts == kind(f"{v:.3f}" for v in x[:, 0].tolist())
    assert same == kind("a" for _ in x)


@pytest.mark.parametrize("x", [X, EVEN], ids=len)
def test_numpy_arrays_of_rows(spheres, x):
    def fn(s, x):
        return x.numpy() * 2, x.numpy().T, np.array([f"{v:.3f}" for v in x[:, 0].tolist()])

    model = parallel(fn, spheres)
    for found, expected in zip(model(x), fn(None, x), strict=True):
        assert type(found) is np.ndarray
        assert found.dtype == expected.dtype
        assert np.array_equal(found, expected)


def test_sequences_where_nothing_can_be_compared(spheres):
    def random(s, x, values):
        torch.rand(())  # compared are shapes alone
        return values(x)

    with pytest.raises(RuntimeError, match="generator of its own"):
        parallel(lambda s, x: torch.rand(2, generator=torch.Generator()), spheres)(X)
    model = parallel(lambda s, x: random(s, x, lambda x: ["a"] * len(x)), spheres)
    assert model(X) == ["a"] * ROWS


def test_sequences_that_may_have_an_element_for_each_row(spheres):
    def fn(s, x):
        assert len(x) < 4  # it cannot be compared
        return s.layer(x), ["0", "1"]

    with pytest.raises(ValueError, match="not clear whether it has one for each row"):
        parallel(fn, spheres)(EVEN)
    assert parallel(fn, spheres)(X[:13])[1] == ["0", "1"], "shards of one row and of two have both"


def test_masked_arrays_keep_their_masks(spheres):
    def fn(s, x):
        values = x.numpy()
        return s.layer(x), np.ma.masked_where(values > 0, values)

    x = torch.randn(24, 4)
    _, found = ts.SphereParallel(Calls(fn), spheres)(x)
    expected = np.ma.masked_where(x.numpy() > 0, x.numpy())
    assert np.array_equal(found.mask, expected.mask) and found.sum() == expected.sum()


def test_places_in_an_order_of_nearly_equal_numbers(spheres):
    torch.manual_seed(0)
    table = torch.randn(10_000, 4)
    model = ts.SphereParallel(Calls(lambda s, x: (s.layer(x) @ table.t()).argsort(1)), spheres)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "output 0")
        model(torch.randn(24, 4))
