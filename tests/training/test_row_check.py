"""Looking whether a model is row-wise: once for each form of call, a few rows, without a trace."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from judge import parallel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import torch_spheres as ts

X = torch.randn(26, 5, 4, generator=torch.Generator().manual_seed(0))


class Leaves(nn.Module):
    """What could leave a trace: buffers, random numbers of three kinds, hooks, gradients, modes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.norm, self.drop = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        self.steps += 1
        noise = torch.rand(()) + random.random() * 0 + np.random.rand() * 0
        return self.drop(self.norm(self.layer(x))) + noise


@pytest.mark.filterwarnings("ignore:.*each shard draws for itself:UserWarning")
def test_comparing_leaves_no_trace(spheres, monkeypatch):
    def run():
        module = Leaves()
        hooked = []
        module.layer.register_forward_hook(lambda *_: hooked.append(1))
        for seed in (torch.manual_seed, random.seed, np.random.seed):
            seed(1)
        model = ts.SphereParallel(module, spheres)
        x = X[:, 0].clone()
        loss = model(x).square().sum()
        loss.backward()
        return (
            len(hooked),
            [loss.detach(), *module.state_dict().values(), x],
            [p.grad for p in module.parameters()],
            [part.training for part in module.modules()],
            (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()),
        )

    found = run()
    with monkeypatch.context() as patch:
        patch.setattr(
            "torch_spheres.training.row_check._compare", lambda _c, _r, unknown, _o: unknown
        )
        expected = run()
    assert found[0] == expected[0] == 12
    for i in (1, 2):
        assert all(map(torch.equal, found[i], expected[i]))
    assert found[3] == expected[3]
    assert torch.equal(found[4][0], expected[4][0])
    assert found[4][1:] == expected[4][1:]


def test_each_form_is_compared_once(spheres):
    calls = []

    def fn(s, x, flag=False):
        calls.append(len(x))
        return s.layer(x)

    model = parallel(fn, spheres)
    x = X[:24, 0]
    for expected in (12 + 3 + 3, 12, 12):  # the model's first in training is looked at twice
        calls.clear()
        model(x)
        assert len(calls) == expected
    calls.clear()
    model(x[:13])
    model(X[:24, :2])
    assert len(calls) == 12 + 12 + 3, "other lengths are no other form, other dimensions are"
    for change in (lambda: model(x, flag=True), lambda: model.eval()(x)):
        calls.clear()
        change()
        assert len(calls) == 15
        calls.clear()
        change()
        assert len(calls) == 12
    assert sorted(set(calls)) == [2]


def test_flags_are_of_the_form_and_steps_are_not(spheres):
    """Numbers that change with every call, such as a time step, are not compared for ever."""
    calls = []

    def fn(s, x, how, step=0):
        calls.append(len(x))
        return s.layer(x) if how == "first" else s.layer(x).T

    model = parallel(fn, spheres)
    x = X[:24, 0]
    for how in ("first", "last", "first"):
        torch.testing.assert_close(model(x, how), model.module(x, how))
    calls.clear()
    for step in range(20):
        assert model(x, "last", step).shape == (4, 24)
    assert len(calls) < 20 * 12 + 3 * 10


def test_texts_in_lists_are_no_flags(spheres):
    calls = []

    class Texts(nn.Linear):
        def forward(self, x, texts):
            calls.append(len(x))
            return super().forward(x)

    model = ts.SphereParallel(Texts(4, 4), spheres, whole=("texts",))
    for n in range(1, 10):
        model(X[:24, 0], [f"text {n}"] * n)
    assert len(calls) == 9 * 12 + 6


def test_two_rows_of_shards_are_all_that_is_run(spheres):
    """Not the whole batch, which may not fit into memory."""
    most = []

    def fn(s, x):
        most.append(len(x))
        return s.layer(x)

    parallel(fn, spheres)(torch.randn(120, 4))
    assert max(most) == 20
    assert most.count(20) == 2  # in evaluation and in training


def test_a_counter_counts_the_call_alone(spheres):
    model = ts.SphereParallel(nn.Linear(4, 4), spheres)
    counted = []
    for _ in range(2):
        with FlopCounterMode(display=False) as counter:
            model(X[:24, 0])
        counted.append(counter.get_total_flops())
    assert counted == [2 * 24 * 4 * 4] * 2


def test_rows_that_are_always_the_same_are_compared_a_few_times(spheres):
    model = parallel(lambda s, x: s.layer(x), spheres)
    rows = []
    model.module.layer.forward_ = model.module.layer.forward
    model.module.layer.forward = lambda x: rows.append(len(x)) or model.module.layer.forward_(x)
    for _ in range(10):
        model(torch.ones(24, 4))
    assert len(rows) == 10 * 12 + 4 * 3 + 3  # four in evaluation mode, one in training


def test_texts_that_change_with_each_call_are_no_ways(spheres):
    rows = []
    model = parallel(lambda s, x: rows.append(len(x)) or s.layer(x), spheres)
    for step in range(40):
        model.name = f"step {step}"
        model(X[:24, 0])
    assert len(rows) < 40 * 12 + 10 * 6
