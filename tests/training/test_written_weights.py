"""Forwards that write to weights and buffers: merged, or noticed however they write."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loop_support import W, assert_same_weights
from reference import tree
from torch import Tensor, nn
from torch.nn import functional as F

import torch_spheres as ts

X = torch.randn(48, 4, generator=torch.Generator().manual_seed(0))
LARGE = 20_000  # floats: more bytes than every shard has a copy of


@pytest.fixture(params=[1, 12], scope="module")
def spheres(request):
    with ts.KissingSpheres(concurrency=request.param) as running:
        yield running


# ---- parameters ----


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


# ---- buffers ----


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
