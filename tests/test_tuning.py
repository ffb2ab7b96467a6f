"""`reproducible=False`: ways are measured while training goes on, and the fastest is kept."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import torch_spheres as ts
from torch_spheres.memory import keep_freed_memory
from torch_spheres.tuning import Tuner, candidates


def names(leaves, concurrency, whole=True):
    return [plan.name for plan in candidates(leaves, concurrency, whole)]


def test_ways_worth_trying():
    assert names(12, 2) == [
        "whole batch, intra-op threads",
        "12 shards in turn, intra-op threads",
        "2 shards on 2 spheres",
        "12 shards on 2 spheres",
    ]
    assert names(12, 12)[2:] == ["12 shards on 12 spheres"]
    assert names(1, 1) == ["whole batch, intra-op threads", "12 shards in turn, intra-op threads"]
    assert names(144, 2, whole=False) == [
        "144 shards in turn, intra-op threads",
        "144 shards on 2 spheres",
    ]


def tune(tuner, cost_of, limit=100):
    steps = []
    while (trial := tuner.trial(1)) is not None:
        assert len(steps) < limit
        steps.append(trial.plan.name)
        tuner.record(trial.plan, cost_of(trial.plan.name, len(steps)))
    return steps


@pytest.mark.parametrize("best", names(12, 2))
def test_the_fastest_is_chosen(best):
    tuner = Tuner(candidates(12, 2))
    steps = tune(tuner, lambda name, _: 1.0 if name == best else 1.5)
    assert tuner.chosen.name == best and len(steps) == 12  # one block each
    assert tuner.costs[best] == 1.0


def test_close_ones_are_measured_longer_and_slow_first_steps_do_not_count():
    plans = names(12, 2)
    tuner = Tuner(candidates(12, 2))
    previous = [None]

    def cost(name, step):
        first, previous[0] = previous[0] != name, name
        noise = 0.3 if step % 5 == 0 else 0.0  # another program, now and then
        return {plans[0]: 1.05, plans[1]: 1.0, plans[2]: 2.0, plans[3]: 9.0}[name] * (
            1.8 if first else 1.0 + noise
        )

    steps = tune(tuner, cost)
    assert tuner.chosen.name == plans[1]
    assert len(steps) == 4 * 3 + 2 * (3 + 3)  # two of four come to the final
    assert steps[-6:] == [plans[0]] * 3 + [plans[1]] * 3


def test_training_goes_on_while_ways_are_tried():
    torch.manual_seed(0)
    bare = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 3)).double()
    with ts.KissingSpheres(concurrency=2) as spheres:
        model = ts.SphereParallel(copy.deepcopy(bare), spheres, reproducible=False)
        assert model.plan is None and model.plan_costs == {}
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (bare, model)]
        seen = set()
        for step in range(50):
            x, y = torch.randn(40, 20).double(), torch.randint(0, 3, (40,))
            for m, optimizer in zip((bare, model), optimizers, strict=True):
                optimizer.zero_grad()
                F.cross_entropy(m(x), y).backward()
                optimizer.step()
            seen |= set(model.plan_costs)
            for p, q in zip(bare.parameters(), model.module.parameters(), strict=True):
                torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
            if step == 30:
                assert model.plan is not None, model.plan_costs
        assert model.plan in seen and seen <= set(names(12, 2))
        assert model.plan_costs[model.plan] == min(model.plan_costs.values())
        plan = model.plan
        model.eval()
        with torch.no_grad():  # tuned apart: another kind of call
            for _ in range(40):
                torch.testing.assert_close(model(x), bare(x))
        assert model.plan == plan
        other = copy.deepcopy(model)
        assert not other.reproducible and other.plan is None


def test_forward_backward_is_tuned_among_ways_that_save_memory():
    torch.manual_seed(0)
    bare = nn.Linear(5, 3).double()
    x, y = torch.randn(30, 5).double(), torch.randint(0, 3, (30,))
    F.cross_entropy(bare(x), y).backward()
    with ts.KissingSpheres(concurrency=2) as spheres:
        model = ts.SphereParallel(copy.deepcopy(bare), spheres, reproducible=False)
        for _ in range(20):
            model.zero_grad()
            loss = model.forward_backward(F.cross_entropy, x, y)
            torch.testing.assert_close(loss, F.cross_entropy(bare(x), y).detach())
            torch.testing.assert_close(model.module.weight.grad, bare.weight.grad)
        assert model.plan in names(12, 2, whole=False)


def test_reproducible_names_its_way():
    with ts.KissingSpheres(concurrency=3) as spheres:
        assert ts.SphereParallel(nn.Identity(), spheres).plan == "12 shards on 3 spheres"


def test_keeping_memory_can_be_declined(monkeypatch):
    keep_freed_memory.cache_clear()
    try:
        monkeypatch.setenv("TORCH_SPHERES_KEEP_MEMORY", "0")
        assert not keep_freed_memory()
        keep_freed_memory.cache_clear()
        monkeypatch.setenv("TORCH_SPHERES_KEEP_MEMORY", "yes")
        with pytest.raises(ValueError, match="must be 0 or 1, got 'yes'"):
            ts.SphereParallel(nn.Identity())
    finally:
        keep_freed_memory.cache_clear()
