"""A model that is not row-wise is told of, once, with the way out; others hear nothing."""

from __future__ import annotations

import copy
import enum
import random
import threading
import warnings

import numpy as np
import pytest
import torch
import zoo
from judge import parallel
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import torch_spheres as ts

X = torch.randn(26, 5, 4, generator=torch.Generator().manual_seed(0))


def told(model, *args, calls=1, **kwargs):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(calls):
            model(*args, **kwargs)
    return [w for w in caught if "of the module" in str(w.message)]


# ---- across rows ----

ACROSS = {
    "centred": lambda s, x: x - x.mean(0),
    "attention over the batch": lambda s, x: F.scaled_dot_product_attention(x, x, x),
    "softmax over the batch": lambda s, x: s.layer(x).softmax(0),
    "cumulated": lambda s, x: x.cumsum(0),
    "neighbours": lambda s, x: x - x.roll(1, 0),
    "positions": lambda s, x: s.layer(x) + torch.arange(float(len(x)))[:, None],
    "sorted": lambda s, x: x.sort(0)[0],
    "ranks": lambda s, x: (s.layer(x), x[:, 0].argsort().argsort()),
    "tiled": lambda s, x: s.layer(x).repeat(2, 1),
    "the batch's size": lambda s, x: s.layer(x) / len(x),
    "in numpy": lambda s, x: (s.layer(x), x.numpy() - x.numpy().mean(0)),
    "numbered texts": lambda s, x: (s.layer(x), [str(i) for i in range(len(x))]),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", ACROSS)
def test_looking_across_rows_is_told_once(spheres, name, training):
    model = parallel(ACROSS[name], spheres).train(training)
    (warning,) = told(model, X[:, 0], calls=3)
    message = str(warning.message)
    assert "is not the same for rows that are alone in a shard" in message
    for way_out in ("batch_dim=1", "whole=('name',)", "outside of the module"):
        assert way_out in message
    assert warning.category is UserWarning
    assert warning.filename == __file__, "the user's line, not one of ours"
    assert told(model.eval(), X[:12, 0]) == [], "once for a model"


def test_forward_backward_tells_too(spheres):
    model = parallel(ACROSS["centred"], spheres)
    model.module.fn = lambda s, x: s.layer(x) - s.layer(x).mean(0)
    with pytest.warns(UserWarning, match="output 0 of the module is not the same for rows"):
        model.forward_backward(F.mse_loss, X[:, 0], X[:, 0])


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.LSTM(4, 3),
        lambda: nn.GRU(4, 3),
        lambda: nn.RNN(4, 3),
        lambda: nn.TransformerEncoderLayer(4, 2, 8),
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8), 1),
    ],
    ids=["LSTM", "GRU", "RNN", "layer", "encoder"],
)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_a_batch_in_another_dimension_is_told(spheres, make):
    torch.manual_seed(0)
    module = make()
    if isinstance(module, nn.RNNBase):  # whose state has no rows then
        with (
            pytest.warns(UserWarning, match="output 0 of the module is not the same for rows"),
            pytest.raises(ValueError, match=r"output 1 .* differs from .*batch_dim=1\) says so"),
        ):
            ts.SphereParallel(module, spheres)(X)
    else:
        assert len(told(ts.SphereParallel(module, spheres), X)) == 1
    assert told(ts.SphereParallel(module, spheres, batch_dim=1), X) == []


def test_attention_over_the_batch_is_told(spheres):
    attention = nn.MultiheadAttention(4, 2)
    assert len(told(ts.SphereParallel(attention, spheres), X, X, X, need_weights=False)) == 1


def test_an_argument_that_should_be_whole_is_told(spheres):
    """A table that has as many rows as the batch, by chance."""

    class Looks(nn.Module):
        def forward(self, ids, table):
            return table[5 * ids % len(table)]

    ids, table = torch.arange(26), X[:, 0]
    assert len(told(ts.SphereParallel(Looks(), spheres), ids, table)) == 1
    assert told(ts.SphereParallel(Looks(), spheres, whole=("table",)), ids, table) == []


def test_what_looks_across_rows_in_training_alone_is_told(spheres):
    def centred(s, x):
        y = s.layer(x)
        return y - y.mean(0) if s.training else y

    assert len(told(parallel(centred, spheres), X[:, 0])) == 1
    assert told(parallel(centred, spheres).eval(), X[:, 0]) == []


# ---- row by row ----

ROW_BY_ROW = {
    "deep": lambda s, x: _repeated(s, x, 30),
    "tiny": lambda s, x: s.layer(x) * 1e-20,
    "huge": lambda s, x: s.layer(x) * 1e20,
    "zero": lambda s, x: s.layer(x) * 0,
    "cancelled": lambda s, x: (s.layer(x) + 1000) - 1000,
    "not a number": lambda s, x: (s.layer(x) - 9).log(),
    "infinite": lambda s, x: s.layer(x) / 0,
    "classes": lambda s, x: s.layer(x).argmax(1),
    "complex": lambda s, x: torch.fft.fft(s.layer(x)),
    "a mean": lambda s, x: F.mse_loss(s.layer(x), x),
    "bfloat16": lambda s, x: (x.bfloat16() @ s.layer.weight.bfloat16()).softmax(1).argmax(1),
}


def _repeated(s, x, times):
    for _ in range(times):
        x = F.layer_norm(s.layer(x).tanh(), (4,))
    return x


@pytest.mark.parametrize("name", ROW_BY_ROW)
def test_what_is_row_wise_hears_nothing(spheres, name):
    assert told(parallel(ROW_BY_ROW[name], spheres), X[:, 0]) == []


@pytest.mark.parametrize("name", zoo.ZOO)
def test_ordinary_models_hear_nothing(spheres, name):
    (x, _), *_ = zoo.batches(50)
    assert told(ts.SphereParallel(zoo.make(name), spheres), x) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_rounding(spheres, dtype):
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Linear(32, 32) for _ in range(8)))
    with torch.autocast("cpu", dtype):
        assert told(ts.SphereParallel(module, spheres), torch.randn(240, 32)) == []


def test_what_draws_random_numbers_is_not_compared(spheres):
    for draw in (
        lambda x: torch.rand_like(x),
        lambda x: F.dropout(x, 0.5, training=True),
        lambda x: x + random.random(),
        lambda x: x + np.random.rand(),
    ):
        model = parallel(lambda s, x, draw=draw: (s.layer(x), draw(x).T), spheres)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", ".*each shard draws for itself")
            _, out = model(X[:, 0])
        assert out.shape == (4, 26), "but shapes are"


def test_what_cannot_run_so_is_not_compared(spheres):
    def fn(s, x):
        if not s.training or len(x) > 3:
            raise RuntimeError("only in training, only few rows")
        return s.layer(x)

    assert told(parallel(fn, spheres), X[:, 0]) == []


def test_what_a_forward_sets_does_not_reach_the_next_run(spheres):
    class Steps(nn.Linear):
        step = 0

        def forward(self, x):
            self.step = self.step + 1
            return super().forward(x) * self.step

    (only,) = told(ts.SphereParallel(Steps(4, 4), spheres), X[:24, 0])
    assert "changes attributes of the module" in str(only.message)
    assert "others: step." in str(only.message)


def test_threads_that_come_at_once_compare_once(spheres):
    calls = []

    def fn(s, x):
        calls.append(len(x))
        return s.layer(x)

    model = parallel(fn, spheres)
    meet = threading.Barrier(3)

    def run():
        meet.wait(20)
        model(X[:24, 0])

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(calls) == 3 * 12 + 6
    assert len(told(copy.deepcopy(model), X[:24, 0])) == 0
    assert len(calls) == 4 * 12 + 12, "a copy learns anew"


def test_one_shard_is_plain_torch():
    """With one leaf there is nothing to put together."""
    with ts.KissingSpheres(levels=1) as alone:
        for fn in (ACROSS["centred"], lambda s, x: x @ x.T, lambda s, x: x.mean(0)):
            model = parallel(fn, alone)
            assert told(model, X[:, 0]) == []
            torch.testing.assert_close(model(X[:, 0]), model.module(X[:, 0]))


# ---- what a first call does not show ----


@pytest.mark.parametrize("first", ["zeros", "ones", "a dispatch mode"])
def test_a_first_call_that_shows_nothing_is_not_the_last_to_be_compared(spheres, first):
    """Over rows that are all the same, attention over the batch is the same as well."""
    attention = nn.MultiheadAttention(32, 4)  # batch_first=False
    model = ts.SphereParallel(attention, spheres)
    x = torch.randn(24, 5, 32)
    if first == "a dispatch mode":
        with FlopCounterMode(display=False):
            assert told(model, x, x, x, need_weights=False) == []
    else:
        same = torch.zeros_like(x) if first == "zeros" else torch.ones_like(x)
        assert told(model, same, same, same, need_weights=False) == []
    assert len(told(model, x, x, x, need_weights=False)) == 1


def test_masked_logits_do_not_hide_what_looks_across_rows(spheres):
    def fn(s, x):
        logits = s.layer(x)
        mixed = logits[..., :2] - logits[..., :2].mean(0)
        return torch.cat([mixed, torch.full_like(logits[..., :2], -1e9)], -1)

    assert len(told(parallel(fn, spheres), X[:, 0])) == 1


class Mode(enum.Enum):
    ROWS, BATCH = range(2)


@pytest.mark.parametrize(("rows", "batch"), [(False, True), ("rows", "batch"), tuple(Mode)])
def test_a_way_that_an_attribute_chooses_is_compared_too(spheres, rows, batch):
    model = parallel(lambda s, x: s.layer(x) - s.layer(x).mean(0) * (s.how == batch), spheres)
    model.how = rows
    assert told(model, X[:, 0]) == []
    model.how = batch
    assert len(told(model, X[:, 0])) == 1


@pytest.mark.parametrize("across", [False, True])
def test_forwards_that_use_autograd_are_compared(spheres, across):
    """As forces are computed from an energy."""

    def fn(s, x):
        x = x.detach().requires_grad_()
        energy = s.layer(x).square().sum()
        (force,) = torch.autograd.grad(energy, x, create_graph=True)
        return force - force.mean(0) if across else force

    assert len(told(parallel(fn, spheres), X[:, 0])) == across
