"""Gradients of what a forward computes with past the module's own parameters.

Plain torch gives them to whatever the graph reaches: a layer in a list, the original that a patched
forward holds, a tensor on an attribute or in a closure.
"""

from __future__ import annotations

import collections
import copy
import functools
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from loop_support import W
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import torch_spheres as ts

X = torch.randn(48, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Case = tuple[nn.Module, Sequence[Tensor]]  # a model, and the tensors that shall have gradients


def linear(*size: int) -> nn.Linear:
    return nn.Linear(*(size or (4, 4))).double()


def leaf(*size: int) -> Tensor:
    return torch.randn(*(size or (4, 4)), dtype=torch.float64, requires_grad=True)


def patched_forward() -> Case:
    model = nn.Sequential(linear(), nn.ReLU(), linear())
    old = model[0].forward
    model[0].forward = lambda x: 2 * old(x)
    return model, [*model.parameters()]


def patched_by_method() -> Case:
    model = nn.Sequential(linear(), linear())

    def forward(self: nn.Linear, x: Tensor) -> Tensor:
        return F.linear(x, 2 * self.weight)

    model[1].forward = types.MethodType(forward, model[1])
    return model, [*model.parameters()]


def patched_with_low_rank_matrices() -> Case:
    model = nn.Sequential(linear(), linear())
    a, b = leaf(2, 4), leaf(4, 2)
    old = model[0].forward
    model[0].forward = lambda x: old(x) + x @ a.T @ b.T
    model[0].weight.requires_grad_(False)
    return model, [a, b, *model.parameters()]


def layers_in_a_list() -> Case:
    layers = [linear(), linear()]
    model = W(lambda s, x: s.h[1](s.h[0](s.n(x)).tanh()), h=layers)
    return model, [*model.parameters(), *layers[0].parameters(), *layers[1].parameters()]


def layers_in_a_dict_of_tuples() -> Case:
    layer = linear()
    model = W(lambda s, x: s.h["a"][0](s.n(x)), h={"a": (layer,)})
    return model, [*model.parameters(), *layer.parameters()]


def layers_of_a_helper() -> Case:
    helper = types.SimpleNamespace(layer=linear())
    model = W(lambda s, x: s.h.layer(s.n(x)), h=helper)
    return model, [*model.parameters(), *helper.layer.parameters()]


def registered_layers_in_a_list_as_well() -> Case:
    model = W(lambda s, x: s.h[0](x) * s.n(x))
    model.h = [model.n]
    return model, [*model.parameters()]


def a_registered_layer_under_another_name() -> Case:
    model = W(lambda s, x: s.other(x) * s.n(x))
    object.__setattr__(model, "other", model.n)
    return model, [*model.parameters()]


def a_bound_method_on_an_attribute() -> Case:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.n = linear()
            self.call = self.twice
            self.later = functools.partial(self.scaled, 3)
            self.by_name = {"twice": self.twice}
            self.me = weakref.ref(self.n.weight)

        def twice(self, x: Tensor) -> Tensor:
            return 2 * self.n(x)

        def scaled(self, by: int, x: Tensor) -> Tensor:
            return by * self.n(x)

        def forward(self, x: Tensor) -> Tensor:
            return self.call(x) + self.later(x) + self.by_name["twice"](x) + self.me().sum()

    model = Own()
    return model, [*model.parameters()]


def tensors_on_attributes() -> Case:
    w = leaf()
    model = W(lambda s, x: s.n(x) @ s.w, w=w)
    return model, [w, *model.parameters()]


def tensors_in_containers() -> Case:
    w, v = leaf(), leaf(4)
    Pair = collections.namedtuple("Pair", "first second")
    model = W(lambda s, x: s.n(x) @ s.w[0] + s.p.second, w=collections.deque([w]), p=Pair(1, v))
    return model, [w, v, *model.parameters()]


def a_tensor_computed_outside_on_an_attribute() -> Case:
    w = leaf()
    model = W(lambda s, x: s.n(x) @ s.w, w=w * 3)
    return model, [w, *model.parameters()]


def a_tensor_in_a_closure() -> Case:
    w = leaf()
    model = W(lambda s, x: s.n(x) @ w)
    return model, [w, *model.parameters()]


def routing_to_layers_in_a_list() -> Case:
    """Each shard uses what its rows ask for."""
    layers = [linear() for _ in range(4)]

    def forward(s: Any, x: Tensor) -> Tensor:
        which = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
        out = s.n(x)
        for i in which.unique().tolist():
            out = out.index_add(0, (which == i).nonzero()[:, 0], s.h[i](x[which == i]))
        return out

    model = W(forward, h=layers)
    return model, [*model.parameters(), *(p for layer in layers for p in layer.parameters())]


CASES = [
    patched_forward, patched_by_method, patched_with_low_rank_matrices, layers_in_a_list,
    layers_in_a_dict_of_tuples, layers_of_a_helper, registered_layers_in_a_list_as_well,
    a_registered_layer_under_another_name, a_bound_method_on_an_attribute, tensors_on_attributes,
    tensors_in_containers, a_tensor_computed_outside_on_an_attribute, a_tensor_in_a_closure,
    routing_to_layers_in_a_list,
]  # fmt: skip


def made(make: Callable[[], Case]) -> Case:
    torch.manual_seed(0)
    model, tensors = make()
    return model.double(), tensors


@pytest.mark.parametrize("make", CASES)
@pytest.mark.parametrize("concurrency", [1, 12])
def test_gradients_are_those_of_plain_torch(make, concurrency):
    (model, mine), (bare, other) = made(make), made(make)
    with ts.KissingSpheres(concurrency=concurrency) as spheres:
        parallel = ts.SphereParallel(model, spheres)
        for _ in range(2):
            graph = {"retain_graph": True}  # (of what was computed outside)
            parallel(X).square().sum().backward(**graph)
            bare(X).square().sum().backward(**graph)
    for p, q in zip(mine, other, strict=True):
        assert (p.grad is None) == (q.grad is None)
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make", CASES)
def test_forward_backward_gives_them_too(make, spheres):
    (model, mine), (bare, other) = made(make), made(make)
    parallel = ts.SphereParallel(model, spheres)
    parallel.forward_backward(lambda out, y: F.mse_loss(out, y), X, 2 * X)
    F.mse_loss(bare(X), 2 * X).backward()
    for p, q in zip(mine, other, strict=True):
        assert (p.grad is None) == (q.grad is None)
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)


def test_the_bits_do_not_depend_on_the_concurrency():
    found = []
    for concurrency in (1, 3, 12):
        model, tensors = made(patched_with_low_rank_matrices)
        with ts.KissingSpheres(concurrency=concurrency) as spheres:
            ts.SphereParallel(model, spheres)(X).square().sum().backward()
        found.append([t.grad for t in tensors])
    for grads in found[1:]:
        for a, b in zip(grads, found[0], strict=True):
            assert (a is None) == (b is None) and (a is None or torch.equal(a, b))


def test_layers_and_functions_that_are_put_on_attributes_later(spheres):
    model = W(lambda s, x: s.n(x) + sum(layer(x) for layer in s.h), h=[])
    parallel = ts.SphereParallel(model.double(), spheres)
    for _ in range(5):
        parallel(X).sum().backward()
    layer, w, once = linear(), leaf(4), torch.full((4,), 48.0, dtype=torch.float64)
    model.h.append(layer)
    parallel(X).sum().backward()
    assert torch.equal(layer.bias.grad, once)
    model.h.clear()
    inner, model.f = model.f, lambda s, x: inner(s, x) + w
    parallel(X).sum().backward()
    assert torch.equal(w.grad, once)


@pytest.mark.parametrize("calls", [0, 1, 3, 4, 10])
def test_what_comes_into_use_by_itself_later(spheres, calls):
    w, uses = leaf(4), []
    model = W(lambda s, x: s.n(x) + w if uses else s.n(x)).double()
    parallel = ts.SphereParallel(model, spheres)
    for _ in range(calls):
        parallel(X).sum().backward()
    uses.append(True)
    parallel(X).sum().backward()
    parallel(X).sum().backward()
    assert torch.equal(w.grad, torch.full((4,), 96.0, dtype=torch.float64))


def test_what_one_shard_alone_reaches_later(spheres):
    """One shard is searched in each call, in turn; so one of the next calls finds it."""
    layer, uses = linear(), []

    def forward(s: nn.Module, x: Tensor) -> Tensor:
        return layer(s.n(x)) if uses and torch.equal(x, X[:4]) else s.n(x)

    parallel = ts.SphereParallel(W(forward).double(), spheres)
    for _ in range(16):
        parallel(X).sum().backward()
    uses.append(True)
    for _ in range(12):
        parallel(X).sum().backward()
    assert layer.bias.grad is not None


@pytest.mark.parametrize("calls", [0, 3, 4, 10])
def test_a_loss_that_has_weights(spheres, calls):
    w, uses = leaf(4), []

    def loss(out: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(out * w if uses else out, y)

    model = linear()
    parallel = ts.SphereParallel(model, spheres)
    for _ in range(calls):
        parallel.forward_backward(loss, X, 2 * X)
    uses.append(True)
    if calls not in (0, 3):  # the fourth call is searched as the first ones are
        with pytest.raises(RuntimeError, match=r"shape \(4,\).*or in the loss.*the next call on"):
            parallel.forward_backward(loss, X, 2 * X)
    parallel.forward_backward(loss, X, 2 * X)
    (expected,) = torch.autograd.grad(loss(model(X), 2 * X), w)
    torch.testing.assert_close(w.grad, expected)


def test_a_loss_with_a_graph_that_all_shards_would_share(spheres):
    scale = (leaf(4) * 2).sum()
    parallel = ts.SphereParallel(linear(), spheres)
    with pytest.raises(RuntimeError, match="a second time") as caught:
        parallel.forward_backward(lambda out, y: (out - y).mean() + scale**2, X, X)
    assert "computed outside of it" in caught.value.__notes__[0]


@pytest.mark.parametrize("how", ["inside", "beside", "nested"])
@pytest.mark.parametrize("by_shard", [False, True])
def test_checkpoints_that_run_backward_for_what_shards_share_are_refused(spheres, how, by_shard):
    """With use_reentrant=True they add to .grad of all that they reach, each shard by itself."""
    layer = linear()
    again = functools.partial(checkpoint, use_reentrant=True)

    def forward(s: nn.Module, x: Tensor) -> Tensor:
        x = s.n(x)
        if how == "nested":
            return again(lambda z: again(layer, z), x)
        return again(layer, x) if how == "inside" else again(s.n, x) + layer(x)

    parallel = ts.SphereParallel(W(forward).double(), spheres)
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="Use use_reentrant=False, or register the layer"):
        if by_shard:
            parallel.forward_backward(F.mse_loss, X, X)
        else:
            parallel(X).sum().backward()
    if not by_shard:  # no shard has begun a backward that would have written there
        assert all(torch.equal(p.grad, torch.ones_like(p)) for p in layer.parameters())


def test_hooks_on_tensors_on_attributes_run_once(spheres):
    model, (w, *_) = made(tensors_on_attributes)
    seen = []
    w.register_hook(lambda g: seen.append(g.clone()))
    ts.SphereParallel(model, spheres)(X).sum().backward()
    assert len(seen) == 1 and torch.equal(seen[0], w.grad)


def test_a_hook_that_would_run_for_each_shard_is_refused(spheres):
    model, (weight, *_) = made(patched_forward)
    weight.register_hook(lambda g: g)
    with pytest.raises(RuntimeError, match=r"shape \(4, 4\) has a hook.*Register the layer"):
        ts.SphereParallel(model, spheres)(X)


def test_a_graph_that_all_shards_would_share_is_refused(spheres):
    computed = leaf() * 3
    model = W(lambda s, x: s.n(x) @ computed).double()
    with pytest.raises(RuntimeError, match=r"computed outside.*MulBackward0.*an attribute"):
        ts.SphereParallel(model, spheres)(X)


@pytest.mark.usefixtures("no_comparison")
@pytest.mark.parametrize("how", ["hook", "attribute"])
def test_a_loss_of_what_a_shard_left_behind_is_refused(how, spheres):
    """A tensor of one shard, that a hook has caught: its gradient would go to a replica."""
    kept: list[Tensor] = []
    model = nn.Sequential(linear(), nn.ReLU(), linear())
    if how == "hook":
        model[1].register_forward_hook(lambda m, args, out: kept.append(out))
    else:
        model = W(lambda s, x: kept.append(s.n(x)) or s.n(x)).double()
    parallel = ts.SphereParallel(model, spheres)
    parallel(X).sum().backward()
    assert len(kept) == 12
    name = r"1\._forward_hooks\.kept" if how == "hook" else r"f\.kept"
    with pytest.warns(UserWarning, match=name):
        parallel(X)
    with pytest.raises(RuntimeError, match="a shard of SphereParallel made inside the model"):
        kept[-1].square().mean().backward()
    assert model.get_parameter("0.weight" if how == "hook" else "n.weight").grad is not None


@pytest.mark.parametrize("in_place", [False, True])
def test_freezing_between_forward_and_backward(spheres, in_place):
    """As a loop of two networks against each other does."""
    model, bare = linear(), linear()
    bare.load_state_dict(model.state_dict())
    parallel = ts.parallelize_(model, spheres) if in_place else ts.SphereParallel(model, spheres)
    for net in (parallel, bare):
        real = net(X)
        net.requires_grad_(False)
        fake = net(2 * X)
        net.requires_grad_(True)
        (real.square().mean() + fake.mean()).backward()
    torch.testing.assert_close(model.weight.grad, bare.weight.grad)


def test_unfreezing_a_layer_that_is_reached_by_a_patched_forward(spheres):
    model, (weight, *_) = made(patched_forward)
    model[0].requires_grad_(False)
    parallel = ts.SphereParallel(model, spheres)
    for _ in range(4):
        parallel(X).sum().backward()
    model[0].requires_grad_(True)
    parallel(X).sum().backward()
    assert weight.grad is not None


def test_hooks_on_layers_that_are_not_reached_are_no_matter(spheres):
    other = linear()
    other.weight.register_hook(lambda g: g)
    model = W(lambda s, x: s.n(x), h=[other]).double()
    ts.SphereParallel(model, spheres)(X).sum().backward()
    assert model.n.weight.grad is not None


def test_attributes_of_parameters_are_there(spheres):
    model = W(lambda s, x: s.n(x) * s.n.weight.factor).double()
    model.n.weight.factor = 3
    other = copy.deepcopy(model.n)
    torch.testing.assert_close(ts.SphereParallel(model, spheres)(X), 3 * other(X))
