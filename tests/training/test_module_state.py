"""What a forward finds on its module, and what becomes of what it sets there."""

from __future__ import annotations

import collections
import copy
import re
import types
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from loop_support import W
from spheres_support import spheres_of
from torch import Tensor, nn

import torch_spheres as ts

X = torch.randn(48, 4, generator=torch.Generator().manual_seed(0))

spheres = spheres_of(1, 12)


def shard_by_shard(model: nn.Module, x: Tensor = X) -> Tensor:
    """Plain torch, with a module as it is for each shard."""
    return torch.cat([copy.deepcopy(model)(rows) for rows in x.tensor_split(12) if len(rows)])


def changes(*names: str) -> str:
    return "the module's forward changes attributes.*: " + re.escape(f"{', '.join(names)}.")


# ---- what a forward sets ----


def count(s: Any, x: Tensor) -> Tensor:
    s.step += 1
    return s.n(x) * s.step


def remember(s: Any, x: Tensor) -> Tensor:
    s.h = s.n(x) if s.h is None else s.n(x) + s.h
    return s.h


def make_cache(s: Any, x: Tensor) -> Tensor:
    if not hasattr(s, "cache"):
        s.cache = torch.arange(4.0)
    return s.n(x) + s.cache


def forget(s: Any, x: Tensor) -> Tensor:
    if hasattr(s, "first"):
        del s.first
        return s.n(x) * 2
    return s.n(x)


def set_deep(s: Any, x: Tensor) -> Tensor:
    s.n.scale = getattr(s.n, "scale", 0) + 1
    return s.n(x) * s.n.scale


def register_buffer(s: Any, x: Tensor) -> Tensor:
    s.register_buffer("late", torch.ones(4), persistent=False)
    return s.n(x) + s.late


def register_layer(s: Any, x: Tensor) -> Tensor:
    s.act = nn.Tanh()
    return s.act(s.n(x))


def drop_buffer(s: Any, x: Tensor) -> Tensor:
    scale = 1 if s.b is None else 2
    s.b = None
    return s.n(x) * scale


@pytest.mark.parametrize(
    ("forward", "attributes", "name"),
    [
        (count, {"step": 0}, "step"),
        (remember, {"h": None}, "h"),
        (make_cache, {}, "cache"),
        (forget, {"first": True}, "first"),
        (set_deep, {}, "n.scale"),
        (register_buffer, {}, "late"),
        (register_layer, {}, "act"),
        (drop_buffer, {}, "b"),
    ],
)
def test_what_a_forward_sets_reaches_nobody_and_is_reported_once(
    spheres, forward, attributes, name
):
    model = W(forward, **attributes)
    if forward is drop_buffer:
        model.register_buffer("b", torch.ones(4))
    expected = shard_by_shard(model)
    before = [*vars(model)], copy.deepcopy(model.state_dict())
    parallel = ts.SphereParallel(model, spheres)
    with pytest.warns(UserWarning, match=changes(name)) as told:
        out = parallel(X)
    assert "Return what the loop needs from forward, or make it a buffer" in str(told[0].message)
    assert told[0].filename == __file__
    assert torch.equal(out, expected)
    for _ in range(3):  # and there is no second warning
        assert torch.equal(parallel(X), expected)
    with torch.no_grad():
        assert torch.equal(parallel(X), expected)
    assert [*vars(model)] == before[0]
    torch.testing.assert_close(model.state_dict(), before[1], rtol=0, atol=0)
    for attribute, value in attributes.items():
        assert getattr(model, attribute) == value


def test_each_name_is_reported_when_it_comes(spheres):
    model = W(lambda s, x: setattr(s, s.which, 1) or s.n(x), which="a")
    parallel = ts.SphereParallel(model, spheres)
    for which in ("a", "b"):
        model.which = which
        with pytest.warns(UserWarning, match=changes(which)):
            parallel(X)
    parallel(X)


def test_forward_backward_reports_too(spheres):
    parallel = ts.SphereParallel(W(count, step=0), spheres)
    with pytest.warns(UserWarning, match=changes("step")):
        parallel.forward_backward(nn.functional.mse_loss, X, X)
    parallel.forward_backward(nn.functional.mse_loss, X, X)


@pytest.mark.parametrize(
    ("make", "change"),
    [
        (list, lambda v: v.append(1)),
        (dict, lambda v: v.update({len(v): 1})),
        (set, lambda v: v.add(len(v))),
        (collections.deque, lambda v: v.append(1)),
        (types.SimpleNamespace, lambda v: setattr(v, "a", getattr(v, "a", 0) + 1)),
        (lambda: np.zeros(3), lambda v: np.add(v, 1, out=v) is None),
        (lambda: {"a": []}, lambda v: v["a"].append(1)),
    ],
    ids=["list", "dict", "set", "deque", "object", "array", "deep"],
)
def test_what_a_forward_changes_in_place_is_reported(spheres, make, change):
    model = W(lambda s, x: change(s.seen) or s.n(x), seen=make())
    parallel = ts.SphereParallel(model, spheres)
    with pytest.warns(UserWarning, match=changes("seen")):
        parallel(X)
    parallel(X)


def test_what_a_first_forward_sets_up_in_place_is_no_change(spheres):
    model = W(lambda s, x: s.cache.setdefault(x.shape[1], 2.0) * s.n(x), cache={})
    parallel = ts.SphereParallel(model, spheres)
    for _ in range(4):
        torch.testing.assert_close(parallel(X), 2 * model.n(X))
    assert model.cache == {4: 2.0}


def test_tensors_on_attributes_that_a_forward_writes_to_are_refused(spheres):
    """As the state of a metric is, which all shards would add to at once."""
    for write in (
        lambda s, x: s.total.add_(x.detach().sum()),
        lambda s, x: s.total.data.add_(1),
        lambda s, x: s.total.numpy().__iadd__(1),
        lambda s, x: setattr(s, "total", s.total.add_(1)),
    ):
        model = W(lambda s, x, write=write: (write(s, x), s.n(x))[1], total=torch.zeros(()))
        parallel = ts.SphereParallel(model, spheres)
        with pytest.raises(RuntimeError, match=r"in place to tensors .*\['total'\].*buffers"):
            parallel(X)


def test_methods_that_are_put_back_are_no_change(spheres):
    def forward(s: Any, x: Tensor) -> Tensor:
        plain = s.n.forward
        s.n.forward = lambda x: 2 * plain(x)
        try:
            return s.n(x)
        finally:
            s.n.forward = plain

    model = W(forward)
    expected = 2 * model.n(X)
    torch.testing.assert_close(ts.SphereParallel(model, spheres)(X), expected)


def test_a_metric_of_torchmetrics_inside_the_model(spheres):
    """Its state would be added to by all shards at once: that is said. In the loop it counts."""
    torchmetrics = pytest.importorskip("torchmetrics", reason="not there for every Python")
    classes = torch.arange(48) % 4

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.accuracy = torchmetrics.classification.MulticlassAccuracy(4, average="micro")

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            out = self.layer(x)
            self.accuracy(out.detach(), y)
            return out

    model = Counts()
    parallel = ts.SphereParallel(model, spheres)
    with pytest.warns(UserWarning, match=r"changes attributes of the module.*: accuracy\..*Return"):
        out = parallel(X, classes)
    torch.testing.assert_close(out, model.layer(X))
    metric = torchmetrics.classification.MulticlassAccuracy(4, average="micro")
    metric.update(out.detach(), classes)
    assert metric.compute() == (out.argmax(1) == classes).float().mean()


def test_what_a_function_sets_on_the_original_is_reported(spheres):
    model = W(lambda s, x: setattr(model, "step", model.step + 1) or s.n(x), step=0)
    with pytest.warns(UserWarning, match=changes("step")):
        ts.SphereParallel(model, spheres)(X)


def test_containers_that_hold_parts_begin_anew_with_each_shard(spheres):
    def forward(s: Any, x: Tensor) -> Tensor:
        s.state["count"] += 1
        s.cells.append(None)
        return s.state["n"](x) * s.state["count"] * len(s.cells)

    model = W(forward)
    model.state, model.cells = {"n": model.n, "count": 0}, [model.n]
    parallel = ts.SphereParallel(model, spheres)
    with pytest.warns(UserWarning, match=changes("state", "cells")):
        torch.testing.assert_close(parallel(X), 2 * model.n(X))
    torch.testing.assert_close(parallel(X), 2 * model.n(X))
    assert model.state["count"] == 0 and model.cells == [model.n]


# ---- hooks ----


def test_hooks_that_are_methods_of_the_model_are_those_of_the_replica(spheres):
    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.n, self.found = nn.Linear(4, 4), None
            self.n.register_forward_hook(self.keep)

        def keep(self, module: nn.Module, args: Any, out: Tensor) -> None:
            self.found = out

        def forward(self, x: Tensor) -> Tensor:
            self.n(x)
            assert self.found is not None
            return 2 * self.found

    model = Features()
    parallel = ts.SphereParallel(model, spheres)
    with pytest.warns(UserWarning, match=changes("found")):
        torch.testing.assert_close(parallel(X), 2 * nn.functional.linear(X, *model.n.parameters()))
    assert model.found is None


@pytest.mark.usefixtures("no_comparison")
def test_hooks_that_a_forward_installs_are_a_shards_own(spheres):
    calls: list[int] = []

    def forward(s: Any, x: Tensor) -> Tensor:
        s.n.register_forward_hook(lambda m, args, out: calls.append(len(out)))
        handle = s.register_forward_pre_hook(lambda m, args: None)
        out = s.n(x)
        handle.remove()
        return out

    model = W(forward)
    model.n.register_forward_hook(lambda m, args, out: 2 * out)  # the user's own stays
    expected = model.n(X)
    parallel = ts.SphereParallel(model, spheres)
    with pytest.warns(UserWarning, match=changes("n._forward_hooks")):
        torch.testing.assert_close(parallel(X), expected)
    assert calls == [4] * 12
    torch.testing.assert_close(parallel(X), expected)
    assert calls == [4] * 24
    assert len(model.n._forward_hooks) == 1 and not model._forward_pre_hooks


def test_what_functions_keep_of_tensors_is_reported(spheres):
    """A hidden state in a closure mixes the rows of all shards; a count of calls is no matter."""
    state: dict[str, Tensor] = {}
    counted: list[int] = []

    def forward(s: Any, x: Tensor) -> Tensor:
        counted.append(len(x))
        state["h"] = s.n(x).detach()
        return s.n(x)

    parallel = ts.SphereParallel(W(forward), spheres)
    parallel(X)  # (a first one may set up a cache)
    with pytest.warns(UserWarning, match=changes("f.state")):
        parallel(X)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the module's forward")
        parallel(X)


class SlottedCounter:
    __slots__ = ("n",)

    def __init__(self) -> None:
        self.n = 0


class Meter:
    """May be called."""

    n = 0

    def __call__(self, x: Tensor) -> None:
        self.n += len(x)


@pytest.mark.parametrize(
    ("make", "change"),
    [
        (SlottedCounter, lambda s, x: setattr(s.value, "n", s.value.n + 1)),
        (Meter, lambda s, x: s.value(x)),
        (lambda: np.zeros(5000), lambda s, x: s.value.__setitem__(3, s.value[3] + 1)),
        (lambda: bytearray(4), lambda s, x: s.value.extend(b"x")),
    ],
    ids=["slots", "callable", "large array", "bytes"],
)
def test_other_objects_that_a_forward_changes(spheres, make, change):
    model = W(lambda s, x: (change(s, x), s.n(x))[1])
    model.value = make()
    parallel = ts.SphereParallel(model, spheres)
    with pytest.warns(UserWarning, match=changes("value")):
        torch.stack([parallel(X) for _ in range(2)])


def test_looking_at_large_objects_takes_no_time(spheres):
    """Some million elements are not looked through, whatever they are inside of."""
    looks = []

    class Counted(list):
        def __iter__(self):
            looks.append(1)
            return super().__iter__()

    rows = [[*range(100)] for _ in range(100)]
    table = [Counted(rows) for _ in range(1000)]
    closed = dict.fromkeys(range(50), table)

    def forward(s: Any, x: Tensor) -> Tensor:
        return s.n(x) + len(closed) * 0 + len(s.table) * 0

    model = W(forward)
    model.table, model.holder = table, types.SimpleNamespace(inner=[table] * 100)
    parallel = ts.SphereParallel(model, spheres)
    for _ in range(4):
        parallel(X)
    assert len(looks) < 20_000


def test_nothing_is_reported_of_a_forward_that_changes_nothing(spheres):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the module's forward changes attributes")
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.1))
        parallel = ts.SphereParallel(model, spheres)
        for _ in range(3):
            parallel(X).sum().backward()
        lstm = W(lambda s, x: s.lstm(s.n(x)[:, None])[0], lstm=nn.LSTM(4, 4, batch_first=True))
        ts.SphereParallel(lstm, spheres)(X).sum().backward()
