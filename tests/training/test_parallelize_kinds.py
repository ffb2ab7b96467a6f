"""`parallelize_` of other kinds of models: lazy, parametrized, pruned, with a call of their own."""

from __future__ import annotations

import pytest
import torch
from loop_support import assert_same_gradients
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import torch_spheres as ts

X = torch.randn(24, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_a_lazy_model(spheres):
    model = ts.parallelize_(nn.LazyLinear(3), spheres)
    x = X.float()
    model(x).sum().backward()
    assert type(model) is nn.Linear and model.weight.grad is not None
    torch.testing.assert_close(model(x), F.linear(x, model.weight, model.bias))


def test_a_parametrization_of_the_model_itself(spheres):
    model = ts.parallelize_(nn.Linear(6, 4).double(), spheres)
    model(X)
    parametrizations.weight_norm(model)
    bare = nn.Linear(6, 4).double()
    parametrizations.weight_norm(bare)
    bare.load_state_dict(model.state_dict())
    for net in (model, bare):
        net(X).square().sum().backward()
    assert_same_gradients(model, bare)


def test_methods_of_the_model_on_its_attributes(spheres):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm, self.count = nn.Linear(6, 4), nn.BatchNorm1d(4), 0
            self.go = self.work
            self.layer.weight.register_hook(lambda g: g)

        def work(self, x):
            self.count += 1
            return self.norm(self.layer(x)) * self.count

        def forward(self, x):
            return self.go(x)

    model = ts.parallelize_(Own(), spheres)
    x = torch.randn(48, 6)
    with pytest.warns(UserWarning, match="changes attributes of the module.*: count"):
        first = model(x)
    assert torch.equal(model(x), first) and model.count == 0
    first.sum().backward()
    assert model.layer.bias.grad is not None


def test_pruning_of_the_model_itself_is_right_or_refused(spheres):
    """Its hook sets a tensor on the module that has a graph, once for the whole batch."""
    model, bare = ts.parallelize_(nn.Linear(6, 4).double(), spheres), nn.Linear(6, 4).double()
    bare.load_state_dict(model.state_dict())
    for net in (model, bare):
        prune.l1_unstructured(net, "weight", 0.5)
    bare(X).square().sum().backward()
    try:
        model(X).square().sum().backward()
    except (RuntimeError, ValueError, TypeError):
        return
    torch.testing.assert_close(model.weight_orig.grad, bare.weight_orig.grad)


class Doubles(nn.Module):
    def __init__(self):
        super().__init__()
        self.n = nn.Linear(6, 6)

    def forward(self, x):
        return self.n(x)

    def __call__(self, x):
        return 2 * super().__call__(x)


def test_what_is_around_the_forward_runs_once(spheres):
    """An overridden call, and hooks of all modules."""
    model = Doubles().to(X.dtype)
    expected = model(X)
    torch.testing.assert_close(ts.parallelize_(model, spheres)(X), expected)

    def on_doubles(module, args, out):
        return out + 1 if type(module) is Doubles else None

    handle = nn.modules.module.register_module_forward_hook(on_doubles)
    try:
        torch.testing.assert_close(model(X), expected + 2)
    finally:
        handle.remove()


def test_a_container_is_one(spheres):
    inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    parallel = ts.SphereParallel(inner, spheres)
    assert len(parallel) == 2 and parallel[0] is inner[0] and [*parallel] == [*inner]
    assert inner[1] in parallel and parallel
    single = ts.SphereParallel(Doubles(), spheres)
    assert single
    with pytest.raises(TypeError, match="Doubles"):
        single[0]
