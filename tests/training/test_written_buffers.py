"""Forwards that write to buffers: merged over the shards, told of, or refused with advice."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loop_support import W
from reference import tree
from spheres_support import spheres_of
from torch import Tensor, nn
from torch.nn import functional as F

import torch_spheres as ts

X = torch.randn(48, 4, generator=torch.Generator().manual_seed(0))
LARGE = 20_000  # floats: more bytes than every shard has a copy of

spheres = spheres_of(1, 12)


class Table(nn.Module):
    """A large buffer, a small one, and a rule of what to write to them."""

    def __init__(self, write: Callable[[Any, Tensor], object] = lambda s, x: None) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(float(LARGE)))
        self.register_buffer("seen", torch.zeros(2))
        self.write = write
        self.addresses: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.write(self, x)
        self.addresses.append(self.table.data_ptr())
        return x * self.table[3]


@pytest.mark.usefixtures("no_comparison")
@pytest.mark.filterwarnings("ignore:the module's forward changes attributes.*addresses")
@pytest.mark.parametrize("way", ["forward", "forward_backward"])
def test_large_buffers_are_copied_once_to_find_out_whether_they_are_written(spheres, way):
    model = Table()
    parallel = ts.SphereParallel(nn.Sequential(nn.Linear(4, 4), model), spheres)
    parallel.eval()  # in training a few forward passes more find out what they cost
    for shards_with_copies in (1, 0, 0):
        model.addresses.clear()
        if way == "forward":
            parallel(X)
        else:
            parallel.forward_backward(F.mse_loss, X, X)
        own = [a for a in model.addresses if a != model.table.data_ptr()]
        assert len(model.addresses) == 12 and len(own) == shards_with_copies


@pytest.mark.usefixtures("no_comparison")  # it is no row-wise model
@pytest.mark.filterwarnings("ignore:the module's forward changes attributes.*addresses")
@pytest.mark.parametrize("in_place", [True, False])
def test_large_buffers_that_are_written_become_the_mean_of_the_shards(spheres, in_place):
    def write(s: Any, x: Tensor) -> None:
        if in_place:
            s.table.add_(x.detach().mean())
        else:
            s.table = s.table + x.detach().mean()

    model = Table(write)
    expected = model.table.clone()
    parallel = ts.SphereParallel(model, spheres)
    for _ in range(3):
        after = tree([expected + rows.mean() for rows in X.tensor_split(12)])
        assert after is not None
        expected = after / 12
        parallel(X)
        assert torch.equal(model.table, expected)


@pytest.mark.filterwarnings("ignore:the module's forward changes attributes.*addresses")
def test_a_large_buffer_that_is_written_for_the_first_time_later_is_refused_once(spheres):
    begins: list[bool] = []
    model = Table(lambda s, x: begins and s.table.add_(1))
    parallel = ts.SphereParallel(model, spheres)
    parallel(X)
    before = model.table.clone()
    begins.append(True)
    with pytest.raises(RuntimeError, match=r"buffers, \['table'\].*for the first time after many"):
        parallel(X)
    model.table.copy_(before)
    parallel(X)
    assert torch.equal(model.table, before + 1)


def test_a_buffer_under_two_names_is_one_in_a_shard(spheres):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("a", torch.zeros(2))
            self.register_buffer("b", self.a)

        def forward(self, x: Tensor) -> Tensor:
            self.a.add_(1)
            return x * self.b.sum()

    model = Tied()
    parallel = ts.SphereParallel(model, spheres)
    assert torch.equal(parallel(X), 2 * X)
    assert torch.equal(parallel(X), 4 * X)
    assert model.a is model.b and model.a.tolist() == [2.0, 2.0]


def test_buffers_of_layers_that_are_registered_nowhere(spheres):
    norm = nn.BatchNorm1d(4)
    model = W(lambda s, x: s.h[0](s.n(x)), h=[norm])
    parallel = ts.SphereParallel(model, spheres)
    with pytest.raises(RuntimeError, match="running_mean of a BatchNorm1d that is registered nowh"):
        parallel(X)
    norm.eval()
    torch.testing.assert_close(parallel(X), norm(model.n(X)))


def test_buffers_of_a_patched_original(spheres):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    old = model[1].forward
    model[1].forward = lambda x: 2 * old(x)
    with pytest.raises(RuntimeError, match=r"buffers, \['1\.running_mean'.*by way of self"):
        ts.SphereParallel(model, spheres)(X)


def test_buffers_that_grow_alike_in_all_shards_are_the_modules(spheres):
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.arange(2.0))

        def forward(self, x: Tensor) -> Tensor:
            if self.table.numel() < x.shape[1]:
                self.table = torch.arange(float(x.shape[1]))
            return x + self.table[: x.shape[1]]

    bare, model = Positions(), Positions()
    parallel = ts.SphereParallel(model, spheres)
    for length in (4, 2, 7):
        x = torch.randn(24, length)
        assert torch.equal(parallel(x), bare(x))
        assert torch.equal(model.table, bare.table)


def test_buffers_that_grow_differently_are_refused_with_advice(spheres):
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(0))

        def forward(self, x: Tensor) -> Tensor:
            self.seen = torch.cat([self.seen, x[:, 0].detach()])
            return x

    with pytest.raises(ValueError, match=r"'seen' of Rows, of shape \(0,\).*return from forward"):
        ts.SphereParallel(Rows(), spheres)(X)


QUEUE = 96


def enqueue(s: Any, x: Tensor) -> None:
    begin = int(s.b[-1, 0])
    s.b[begin : begin + len(x)] = x.detach()
    s.b[-1, 0] = begin + len(x)


@pytest.mark.parametrize(
    ("write", "make", "told"),
    [
        (lambda s, x: s.b.add_(x.detach().sum(0)), lambda: torch.zeros(4), True),
        (lambda s, x: s.b.add_(len(x)), lambda: torch.zeros((), dtype=torch.long), True),
        (lambda s, x: s.b.copy_(x.detach().amax(0)), lambda: torch.zeros(4), True),
        (enqueue, lambda: torch.zeros(QUEUE, 4), True),
        (lambda s, x: s.b.lerp_(x.detach().var(0), 0.1), lambda: torch.zeros(4), True),
        (lambda s, x: s.b.lerp_(x.detach().mean(0), 0.1), lambda: torch.zeros(4), False),
        (lambda s, x: s.b.add_(1), lambda: torch.zeros(()), False),
        (lambda s, x: s.b.add_(1), lambda: torch.zeros((), dtype=torch.long), False),
    ],
    ids=["sum", "count", "greatest", "queue", "variance", "mean", "calls", "calls, integer"],
)
def test_buffers_that_shards_make_something_else_of_are_told(spheres, recwarn, write, make, told):
    def forward(s: Any, x: Tensor) -> Tensor:
        write(s, x)
        return s.n(x)

    model = W(forward)
    model.register_buffer("b", make())
    parallel = ts.SphereParallel(model, spheres)
    for _ in range(3):
        parallel(X)
    texts = [
        text for w in recwarn if "in the buffer W.b something else" in (text := str(w.message))
    ]
    assert len(texts) == told


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.BatchNorm3d])
def test_batch_norm_of_maps_of_one_pixel_says_what_to_do(spheres, kind):
    x = torch.randn(13, 4, 1, 1, 1) if kind is nn.BatchNorm3d else torch.randn(13, 4, 1, 1)
    parallel = ts.SphereParallel(kind(4), spheres)
    with pytest.raises(ValueError, match="more than 1 value per channel") as caught:
        parallel(x)
    assert "two rows for each of the leaves" in "".join(caught.value.__notes__)
    parallel(x.repeat(2, 1, *(1,) * (x.dim() - 2)))


@pytest.mark.parametrize("rows", [2, 3, 13, 17, 23, 24, 25])
@pytest.mark.parametrize("way", ["forward", "forward_backward"])
def test_batch_norm_trains_on_a_last_batch_of_few_rows(spheres, rows, way):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).double()
    bare = copy.deepcopy(model)
    x = torch.randn(rows, 4, dtype=torch.float64)
    parallel = ts.SphereParallel(model, spheres)
    pieces = [*x.tensor_split(min(12, rows // 2))]
    if way == "forward":
        parallel(x).square().sum().backward()
        for piece in pieces:
            copy_ = copy.deepcopy(bare)
            copy_.zero_grad()
            copy_(piece).square().sum().backward()
            for p, q in zip(bare.parameters(), copy_.parameters(), strict=True):
                p.grad = q.grad if p.grad is None else p.grad + q.grad
        for p, q in zip(model.parameters(), bare.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-10)
    else:
        parallel.forward_backward(F.mse_loss, x, x)
    means = []
    for piece in pieces:
        shard = copy.deepcopy(bare)
        shard(piece)
        means.append(shard[1].running_mean)
    torch.testing.assert_close(model[1].running_mean, torch.stack(means).mean(0))
    assert model[1].num_batches_tracked == 1
    model.eval()
    assert parallel(x[:1]).shape == (1, 4)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max:UserWarning")
@pytest.mark.filterwarnings("ignore:the shards left different numbers.*zero_point:UserWarning")
def test_quantisation_aware_training(spheres):
    quantisation = pytest.importorskip("torch.ao.quantization")

    def observed() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        model.qconfig = quantisation.get_default_qat_qconfig("fbgemm")
        return quantisation.prepare_qat(model.train())

    bare, model = observed(), observed()
    parallel = ts.SphereParallel(model, spheres)
    for _ in range(3):
        outputs, buffers = [], []
        for rows in X.tensor_split(12):
            shard = copy.deepcopy(bare)
            outputs.append(shard(rows))
            buffers.append(dict(shard.named_buffers()))
        out = parallel(X)
        assert torch.equal(out, torch.cat(outputs))
        out.square().sum().backward()
        for name, buffer in bare.named_buffers():  # observers give some their shape
            values = [found[name] for found in buffers]
            mean = torch.stack(values).mean(0) if buffer.is_floating_point() else values[0]
            parent, _, last = name.rpartition(".")
            bare.get_submodule(parent)._buffers[last] = mean.clone()
        torch.testing.assert_close(dict(model.named_buffers()), dict(bare.named_buffers()))
        bare.load_state_dict(model.state_dict())
    assert all(p.grad is not None for p in model.parameters())
