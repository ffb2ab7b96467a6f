"""Forwards that write to weights, or to what all shards reach: noticed however they write."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from loop_support import W, assert_same_weights
from spheres_support import spheres_of
from torch import Tensor, nn
from torch.nn import functional as F

import torch_spheres as ts

X = torch.randn(48, 4, generator=torch.Generator().manual_seed(0))

spheres = spheres_of(1, 12)


def by_data(s: Any) -> None:
    s.m.weight.data.lerp_(s.n.weight.data, 0.1)


def by_no_grad(s: Any) -> None:
    with torch.no_grad():
        s.m.weight.copy_(0.9 * s.m.weight + 0.1 * s.n.weight)


def by_numpy(s: Any) -> None:
    s.m.weight.detach().numpy()[:] += 1


def by_a_view(s: Any) -> None:
    s.m.weight.detach().view(-1)[3] = 5.0


def by_set_item(s: Any) -> None:
    s.m.weight.data[0, 0] = 7.0


def by_memory(s: Any) -> None:
    torch.frombuffer(s.m.weight.detach().numpy(), dtype=torch.float32).zero_()


def by_state_dict(s: Any) -> None:
    s.m.load_state_dict(s.n.state_dict())


def by_init(s: Any) -> None:
    nn.init.zeros_(s.m.weight)


@pytest.mark.parametrize(
    "write",
    [by_data, by_no_grad, by_numpy, by_a_view, by_set_item, by_memory, by_state_dict, by_init],
)
@pytest.mark.parametrize("way", ["forward", "evaluation", "forward_backward"])
def test_a_forward_that_writes_to_weights_is_refused(spheres, write, way):
    model = W(lambda s, x: (write(s), s.n(x) - s.m(x))[1], m=nn.Linear(4, 4))
    parallel = ts.SphereParallel(model, spheres)
    text = r"wrote to its parameters \['m\.weight'.*spoilt.*after optimizer\.step\(\).*buffers"
    with pytest.raises(RuntimeError, match=text):
        if way == "forward_backward":
            parallel.forward_backward(F.mse_loss, X, X)
        else:
            with torch.set_grad_enabled(way == "forward"):
                parallel(X)


def test_writing_that_begins_later_is_noticed(spheres):
    """Through torch at once; past it in a call whose number is a power of two."""
    for write, calls in ((by_no_grad, 1), (by_data, 3)):
        begins: list[bool] = []
        model = W(
            lambda s, x, write=write, begins=begins: (begins and write(s), s.n(x) - s.m(x))[1],
            m=nn.Linear(4, 4),
        )
        parallel = ts.SphereParallel(model, spheres)
        for _ in range(5):
            parallel(X)
        begins.append(True)
        for _ in range(calls - 1):
            parallel(X)
        with pytest.raises(RuntimeError, match="wrote to its parameters"):
            parallel(X)


def test_parameters_that_get_other_data_are_refused(spheres):
    model = W(lambda s, x: (setattr(s.n.weight, "data", 2 * s.n.weight.data), s.n(x))[1])
    with pytest.raises(RuntimeError, match=r"gave its parameters \['n\.weight'\] new data"):
        ts.SphereParallel(model, spheres)(X)


def test_parameters_that_are_replaced_are_reported(spheres):
    def forward(s: Any, x: Tensor) -> Tensor:
        s.n.weight = nn.Parameter(torch.ones(4, 4))
        return s.n(x)

    model = W(forward)
    weight = model.n.weight
    with pytest.warns(UserWarning, match=r"changes attributes of the module.*: n\.weight\."):
        ts.SphereParallel(model, spheres)(X)
    assert model.n.weight is weight


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_an_embedding_with_a_greatest_norm_has_advice_that_works(spheres, kind):
    def model(max_norm: float | None) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(kind(10, 4, max_norm=max_norm), nn.Linear(4, 2))

    words = torch.arange(48).reshape(24, 2) % 10
    with pytest.raises(RuntimeError, match=rf"{kind.__name__}\(max_norm=.*set max_norm=None"):
        ts.SphereParallel(model(0.5), spheres)(words)
    bare, mine = model(0.5), model(None)
    parallel = ts.SphereParallel(mine, spheres)
    with torch.no_grad():  # as the advice says
        mine[0].weight.copy_(torch.renorm(mine[0].weight, 2, 0, 0.5))
    torch.testing.assert_close(parallel(words), bare(words))


@pytest.mark.parametrize("where", ["list", "frozen, in a list", "closure", "attribute"])
def test_weights_that_are_registered_nowhere_are_watched_too(spheres, where):
    teacher = nn.Linear(4, 4)

    def forward(s: Any, x: Tensor) -> Tensor:
        other = teacher if where == "closure" else s.m if where == "attribute" else s.h[0]
        with torch.no_grad():
            other.weight.lerp_(s.n.weight, 0.1)
        return s.n(x) - other(x)

    teacher.requires_grad_(where != "frozen, in a list")
    model = W(forward, h=[] if where == "closure" else [teacher])
    if where == "attribute":
        object.__setattr__(model, "m", teacher)
    parallel = ts.SphereParallel(model, spheres)
    match = r"\['f\.teacher\.weight'\]" if where == "closure" else r"its parameters .*spoilt"
    with pytest.raises(RuntimeError, match=match):
        parallel(X)


class Memory:
    """A queue of features, as contrastive learning keeps."""

    def __init__(self) -> None:
        self.features = [torch.zeros(8, 4)]

    def push(self, x: Tensor) -> None:
        self.features[0][: len(x)] = x.detach()


class Slots:
    __slots__ = ("features",)

    def __init__(self) -> None:
        self.features = torch.zeros(8, 4)

    def push(self, x: Tensor) -> None:
        self.features[: len(x)] = x.detach()


TOTAL = torch.zeros(4)


def add_to_total(x: Tensor) -> None:
    TOTAL.add_(x.detach().sum(0))


def hook_that_writes(to: Tensor) -> Any:
    def hook(module: nn.Module, args: Any, out: Tensor) -> None:
        to.lerp_(out.detach().mean(0), 0.1)

    return hook


def written(where: str) -> tuple[nn.Module, str]:
    """A model, and how what it writes to is called."""
    table = torch.zeros(4)
    if where in ("an object", "slots"):
        memory = Memory() if where == "an object" else Slots()
        name = "memory.features[0]" if where == "an object" else "memory.features"
        return W(lambda s, x: (s.memory.push(x), s.n(x))[1], memory=memory), name
    if where == "a closure":
        return W(lambda s, x: (table.add_(x.detach().sum(0)), s.n(x))[1]), "f.table"
    if where == "a global name":
        return W(lambda s, x: (add_to_total(x), s.n(x))[1]), "f.add_to_total.TOTAL"
    if where == "a hook":
        model = W(lambda s, x: s.n(x))
        model.n.register_forward_hook(hook_that_writes(table))
        return model, "n._forward_hooks.to"
    if where == "a patched forward":
        model = W(lambda s, x: s.n(x))
        old = model.n.forward

        def patched(x: Tensor) -> Tensor:
            table.copy_(x.detach().mean(0))
            return old(x)

        model.n.forward = patched
        return model, "n.forward.table"

    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            table.data.add_(1)
            return super().forward(x)

    return Own(4, 4), "forward.table"


@pytest.mark.parametrize(
    "where",
    ["an object", "slots", "a closure", "a global name", "a hook", "a patched forward", "a class"],
)
def test_tensors_that_all_shards_reach_and_write_to_are_refused(spheres, where):
    model, name = written(where)
    parallel = ts.SphereParallel(model, spheres)
    with pytest.raises(RuntimeError, match=f"wrote in place.*{re.escape(name)}.*make them buffers"):
        parallel(X)
    with pytest.raises(RuntimeError, match="wrote in place"):
        parallel.forward_backward(lambda out, y: (out - y).square().mean(), X, X)


def test_objects_with_tensors_that_are_only_read(spheres):
    memory = Memory()
    model = W(lambda s, x: s.n(x) + s.memory.features[0].sum(), memory=memory)
    parallel = ts.SphereParallel(model, spheres)
    for _ in range(5):
        memory.push(X[:8])  # by the loop
        torch.testing.assert_close(parallel(X), model(X))


def test_a_forward_that_freezes_parameters_is_refused(spheres):
    model = W(lambda s, x: (s.n.weight.requires_grad_(False), s.n(x))[1])
    with pytest.raises(RuntimeError, match=r"requires_grad of its parameters \['n.weight'\]"):
        ts.SphereParallel(model, spheres)(X)


@pytest.mark.parametrize("rows", [36, 48])
def test_a_forward_that_writes_to_its_arguments_is_refused(spheres, rows):
    for fn in (lambda s, x: s.n(x.mul_(2)), lambda s, x: s.n(x.clone()) + x.zero_()):
        x = torch.ones(rows, 4)
        with pytest.raises(RuntimeError, match=r"wrote in place to its arguments.*x\.clone"):
            ts.SphereParallel(W(fn), spheres)(x)


def test_a_momentum_encoder_as_the_advice_says(spheres):
    def both() -> nn.ModuleDict:
        torch.manual_seed(0)
        layers = nn.ModuleDict({"n": nn.Linear(4, 4), "m": nn.Linear(4, 4)})
        layers["m"].requires_grad_(False)
        return layers

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = both()

        def forward(self, x: Tensor) -> Tensor:
            return self.layers["n"](x) - self.layers["m"](x)

    parallel, bare = ts.SphereParallel(Encoder().double(), spheres), Encoder().double()
    for model, module in ((parallel, parallel.module), (bare, bare)):
        optimizer = torch.optim.SGD(module.layers["n"].parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(X.double()).square().mean().backward()
            optimizer.step()
            by_data(type("_", (), {"m": module.layers["m"], "n": module.layers["n"]}))
    assert_same_weights(parallel, bare)


@pytest.mark.parametrize("way", ["data", "numpy"])
def test_a_forward_that_writes_to_its_arguments_past_torch_is_refused(spheres, way):
    """Where a shard's part is the caller's own memory, half of the caller's rows would change."""

    def forward(s: Any, x: Tensor) -> Tensor:
        if way == "data":
            x.data.clamp_(0, 1)
        else:
            x.numpy()[:] = 0
        return s.n(x)

    with pytest.raises(RuntimeError, match="wrote in place to its arguments"):
        ts.SphereParallel(W(forward), spheres)(torch.randn(48, 4))
