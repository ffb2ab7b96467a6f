"""What goes into a model and comes out, however nested, and what cannot be split or gathered."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, UserDict, namedtuple
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import rnn
from torch.utils import _pytree as pytree

import torch_spheres as ts
from torch_spheres.training.pytree import flatten, unflatten

Point = namedtuple("Point", ["x", "y"])


@dataclasses.dataclass
class Batch:
    words: torch.Tensor
    lengths: torch.Tensor | None = None
    name: str = "none"
    extra: list[Any] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Frozen:
    a: torch.Tensor
    b: Any


class ModelOutput(OrderedDict):
    """As in the transformers library: an ordered dict, a dataclass and a tuple in one."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None:
                self[field.name] = value

    def __getitem__(self, k):
        return dict(self.items())[k] if isinstance(k, str) else self.to_tuple()[k]

    def __setattr__(self, name, value):
        if name in self.keys() and value is not None:
            super().__setitem__(name, value)
        super().__setattr__(name, value)

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def __reduce__(self):
        callable_, _, *rest = super().__reduce__()
        return callable_, tuple(getattr(self, f.name) for f in dataclasses.fields(self)), *rest

    def to_tuple(self):
        return tuple(self[k] for k in self.keys())


@dataclasses.dataclass
class CausalOutput(ModelOutput):
    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past: Any = None
    hidden: tuple[torch.Tensor, ...] | None = None


@dataclasses.dataclass
class RegisteredOutput(ModelOutput):
    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None


pytree.register_pytree_node(
    RegisteredOutput,
    lambda out: (list(out.values()), list(out.keys())),
    lambda values, keys: RegisteredOutput(**dict(zip(keys, values, strict=True))),
    serialized_type_name="tests.RegisteredOutput",
)


class Applies(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn
        self.w = nn.Parameter(torch.tensor(2.0))

    def forward(self, *args, **kwargs):
        return self.fn(self.w, *args, **kwargs)


def column(rows, start=0):
    return torch.arange(float(start), start + rows)[:, None]


@pytest.mark.parametrize(
    "value",
    [
        column(3),
        [column(3), {"a": (column(3), None)}],
        OrderedDict(b=column(3), a=[]),
        Point(column(3), Point(1, column(3))),
        Batch(column(3), None, "x", [column(3), "y"]),
        Frozen(column(3), {"k": Batch(column(3))}),
        UserDict(a=column(3), b=UserDict(c=column(3))),
        CausalOutput(logits=column(3), hidden=(column(3), column(3))),
        (Batch("no tensor", name="a leaf"), column(3)),
        rnn.pack_sequence([column(3)]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_flatten_is_undone_by_unflatten(value):
    leaves, nesting = flatten(value)
    again = unflatten(leaves, nesting)
    assert type(again) is type(value)
    assert nesting == flatten(again)[1]
    assert all(a is b for a, b in zip(leaves, flatten(again)[0], strict=True))
    others = [torch.tensor(i) for i in range(len(leaves))]
    assert all(a is b for a, b in zip(others, flatten(unflatten(others, nesting))[0], strict=True))
    assert all(a is b for a, b in zip(leaves, flatten(value)[0], strict=True)), "not changed"


@pytest.mark.usefixtures("no_comparison")
def test_inputs_of_every_nesting_are_split_and_the_rest_goes_to_every_shard(spheres):
    seen = []

    def fn(w, batch, *rest, point, options, **more):
        assert type(batch) is Batch and batch.name == "name" and batch.extra[1] == "y"
        assert type(point) is Point and options == {"flag": True, "none": None, "fn": print}
        assert more == {"number": 3} and rest[0] == "text"
        parts = [batch.words, batch.extra[0], point.x, point.y[0]["z"], rest[1]]
        assert batch.lengths is not None and batch.lengths.dim() == 0
        assert len({len(part) for part in parts}) == 1
        seen.append(len(parts[0]))
        return w * sum(parts)

    x = column(29)
    parallel = ts.SphereParallel(Applies(fn), spheres)
    out = parallel(
        Batch(x, torch.tensor(1), "name", [10 * x, "y"]),
        "text",
        1000 * x,
        point=Point(100 * x, [{"z": x}]),
        options={"flag": True, "none": None, "fn": print},
        number=3,
    )
    assert torch.equal(out, 2 * 1112 * x)
    assert sorted(seen) == [2] * 7 + [3] * 5


@pytest.mark.parametrize("rows", [1, 2, 11, 12, 13, 25])
def test_few_and_uneven_rows(spheres, rows):
    x = column(rows).requires_grad_()
    parallel = ts.SphereParallel(Applies(lambda w, x: (w * x, (w * x).mean())), spheres)
    out, mean = parallel(x)
    assert torch.equal(out, 2 * x)
    torch.testing.assert_close(mean, 2 * x.mean())
    (out.sum() + mean).backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 2 + 2 / rows))


def test_inputs_that_need_a_gradient(spheres):
    parallel = ts.SphereParallel(Applies(lambda w, a, b, c: w * a * b["b"] + c), spheres)
    first, x, c = nn.Linear(3, 3), torch.randn(30, 3), torch.randn(30, 3, requires_grad=True)
    scale = torch.tensor(3.0, requires_grad=True)
    h = first(x)  # not a leaf
    parallel(h, {"b": h}, c.T.contiguous().T).sum().backward()  # and one of them twice
    torch.testing.assert_close(c.grad, torch.ones(30, 3))
    grad = first.weight.grad.clone()
    first.zero_grad()
    (2 * first(x).square()).sum().backward()
    torch.testing.assert_close(grad, first.weight.grad)
    unused = torch.randn(30, 3, requires_grad=True)
    ts.SphereParallel(Applies(lambda w, a, b, s: w * a * s), spheres)(
        c, unused, scale
    ).sum().backward()
    torch.testing.assert_close(scale.grad, 2 * c.sum().detach())
    assert unused.grad is None


@pytest.mark.parametrize("view", ["transposed", "strided", "expanded", "misaligned"])
def test_inputs_of_every_layout(spheres, view):
    base = torch.arange(26 * 4.0).reshape(26, 4)
    x = {
        "transposed": base.reshape(4, 26).T,
        "strided": base[::2],
        "expanded": base[:1].expand(26, 4),
        "misaligned": base.flatten()[1:101].reshape(25, 4),
    }[view]
    parallel = ts.SphereParallel(Applies(lambda w, x: w * x), spheres)
    assert torch.equal(parallel(x), 2 * x)


def test_a_model_output_comes_back_as_one(spheres):
    def fn(w, x):
        logits = w * x
        hidden = (x + 1, logits.repeat_interleave(2, 0))
        return CausalOutput(loss=logits.mean(), logits=logits, hidden=hidden)

    x = column(29)
    out = ts.SphereParallel(Applies(fn), spheres)(x)
    assert type(out) is CausalOutput and list(out) == ["loss", "logits", "hidden"]
    assert out["logits"] is out.logits is out[1] and out.past is None
    torch.testing.assert_close(out.loss, 2 * x.mean())
    assert torch.equal(out.logits, 2 * x)
    assert torch.equal(out.hidden[1], 2 * x.repeat_interleave(2, 0))
    out.loss.backward()

    def registered(w, x):
        return RegisteredOutput(loss=(w * x).mean(), logits=w * x)

    out = ts.SphereParallel(Applies(registered), spheres)(x)
    assert type(out) is RegisteredOutput and torch.equal(out.logits, 2 * x)


def test_outputs_of_every_nesting(spheres):
    def fn(w, x):
        return Frozen([w * x, {"deep": Point(x, "text")}], Batch(2 * x, lengths=w * x.sum()))

    x = column(25)
    with pytest.warns(UserWarning, match="output 4 of the module has no dimensions and is a sum"):
        out = ts.SphereParallel(Applies(fn), spheres)(x)
    assert type(out) is Frozen and torch.equal(out.a[0], 2 * x)
    assert torch.equal(out.a[1]["deep"].x, x) and out.a[1]["deep"].y == "text"
    assert not out.a[1]["deep"].x.requires_grad
    assert type(out.b) is Batch and torch.equal(out.b.words, 2 * x)
    sums = torch.stack([part.sum() * len(part) / 25 for part in x.tensor_split(12)])
    torch.testing.assert_close(out.b.lengths, 2 * sums.sum())


def test_outputs_without_tensors_or_gradients(spheres):
    for value in (None, "text", 3, [], {"a": None}):
        parallel = ts.SphereParallel(Applies(lambda w, x, value=value: value), spheres)
        assert parallel(column(25)) == value
    labels = ts.SphereParallel(Applies(lambda w, x: (w * x).argmax(1)), spheres)(column(25))
    assert labels.dtype == torch.int64 and len(labels) == 25


def test_losses_inside_the_model_are_weighted_by_rows(spheres):
    x = column(31)
    module = Applies(lambda w, x: {"loss": ((w * x) ** 2).mean(), "mean": x.mean()})
    out = ts.SphereParallel(module, spheres)(x)
    out["loss"].backward()
    torch.testing.assert_close(out["loss"], (4 * x**2).mean())
    torch.testing.assert_close(module.w.grad, (4 * x**2).mean())
    torch.testing.assert_close(out["mean"], x.mean())


def test_a_gradient_that_only_some_shards_have(spheres):
    module = Applies(lambda w, x: (w * x, w * x if x[0, 0] == 5 else x.clone()))
    _, second = ts.SphereParallel(module, spheres)(column(12))
    second.sum().backward()
    assert module.w.grad == 5


PACKED = rnn.pack_sequence([torch.ones(3, 2), torch.ones(2, 2)])


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((PACKED,), TypeError, r"PackedSequence.*padded tensor and the lengths"),
        ((rnn.pack_sequence([torch.ones(3, 2)]),), TypeError, "PackedSequence"),
        (([{"a": torch.eye(3).to_sparse()}],), TypeError, r"layout torch\.sparse_coo"),
        ((torch.zeros(4, 2), Batch(torch.zeros(5))), ValueError, r"4 rows.*\(5,\), 5"),
        (("text", 3), ValueError, "no tensor with rows"),
        ((), ValueError, "no tensor with rows"),
    ],
)
def test_inputs_that_cannot_be_split(spheres, args, error, message):
    with pytest.raises(error, match=message):
        ts.SphereParallel(nn.Identity(), spheres)(*args)


def test_nested_tensors_cannot_be_split(spheres):
    nested = torch.nested.nested_tensor([torch.ones(3), torch.ones(2)], layout=torch.jagged)
    with pytest.raises(TypeError, match=r"\(nested\); convert it inside the module"):
        ts.SphereParallel(nn.Identity(), spheres)(nested)


def fifth(x, other, one):
    return other if x[0, 0] == 5 else one


@pytest.mark.parametrize(
    ("fn", "error", "message"),
    [
        (lambda w, x: x[x != 5], ValueError, "must be the batch's rows, .*transpose it inside"),
        (lambda w, x: x.new_zeros(len(x), int(x[0, 0]) + 1), ValueError, r"shape \(\d, \d\)"),
        (lambda w, x: fifth(x, None, w * x), ValueError, "None for shard"),
        (lambda w, x: fifth(x, w * x, None), ValueError, "None for shard 0"),
        (lambda w, x: fifth(x, w, w * x), ValueError, r"shape \(\) for shard"),
        (lambda w, x: fifth(x, w * x, w), ValueError, r"shape \(\) for shard 0"),
        (lambda w, x: fifth(x, [x, x], [x]), ValueError, "structure must not depend on the rows"),
        (lambda w, x: fifth(x, {"a": x}, {"b": x}), ValueError, "structure"),
        (lambda w, x: fifth(x, Batch(x, x), Batch(x)), ValueError, "must not depend on the rows"),
        (
            lambda w, x: rnn.pack_padded_sequence(x[..., None], [1] * len(x), batch_first=True),
            TypeError,
            "PackedSequence that the module returned",
        ),
    ],
)
def test_outputs_that_cannot_be_put_together(spheres, fn, error, message):
    parallel = ts.SphereParallel(Applies(fn), spheres)
    with pytest.raises(error, match=message):
        parallel(column(13))
    parallel.module.fn = lambda w, x: w * x
    assert torch.equal(parallel(column(13)), 2 * column(13))
