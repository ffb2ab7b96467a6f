"""Batch norm over the whole batch: plain torch is the judge, and the bits are the same for all."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from sync_batch_norm_support import batches, make, plain, trained
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import torch_spheres as ts
from torch_spheres.training.autotune import waiting_ways

KINDS = {nn.BatchNorm1d: (), nn.BatchNorm2d: (4, 3), nn.BatchNorm3d: (2, 3, 2)}


@pytest.fixture(autouse=True)
def no_advice() -> None:
    """These models are so small that plain torch would be faster, which users are told."""
    warnings.filterwarnings("ignore", "the shards of this model are so")


# ---- results ----


@pytest.mark.parametrize("way", ["loop", "lean"])
@pytest.mark.parametrize(
    ("levels", "rows"), [(1, 13), (2, 100), (2, 13), (2, 5), (2, 2), (3, 150), (3, 5)]
)
def test_training_is_that_of_plain_torch_with_the_same_bits(
    way: str, levels: int, rows: int
) -> None:
    expected, losses = plain(rows)
    digests = set()
    for concurrency in (1, 2, 3, 12) if rows < 150 else (2, 3):
        digest, model, found = trained(way, levels, rows, concurrency)
        digests.add(digest)
        torch.testing.assert_close(found, losses, rtol=1e-4, atol=1e-5)
        for name, value in model.state_dict().items():
            theirs = expected.state_dict()[name]
            torch.testing.assert_close(value, theirs, rtol=1e-3, atol=1e-4, msg=name)
    assert len(digests) == 1


def gradients(
    model: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor
) -> tuple[Tensor, list[Tensor | None], list[Tensor]]:
    """Outputs, gradients of the inputs and parameters, and buffers."""
    x = x.clone().requires_grad_()
    y = call(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    (y * weights).sum().backward()
    return y.detach(), [x.grad, *(p.grad for p in model.parameters())], [*model.buffers()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"momentum": None}, {"bias": False}])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_plain_torchs(kind, options, dtype) -> None:
    torch.manual_seed(0)
    layer = kind(6, **options, dtype=dtype)
    for p in layer.parameters():
        nn.init.uniform_(p)
    x = torch.randn(29, 6, *KINDS[kind], dtype=dtype) * 2 + 3
    mine = ts.convert_sync_batchnorm(copy.deepcopy(layer))
    with ts.KissingSpheres(concurrency=2) as spheres:
        parallel = ts.SphereParallel(mine, spheres)
        for _ in range(2):
            expected = gradients(layer, layer, x)
            found = gradients(mine, parallel, x)
            close = {
                torch.float32: {"rtol": 1e-4, "atol": 1e-4},
                torch.float64: {"rtol": 1e-9, "atol": 1e-9},
                torch.bfloat16: {"rtol": 0.05, "atol": 0.1},
            }[dtype]
            torch.testing.assert_close(found, expected, **close)


def test_shards_that_select_no_rows_take_part() -> None:
    class Selects(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x[x[:, 0] > 0]).square().sum()

    torch.manual_seed(0)
    x = torch.randn(30, 3)
    x[:10, 0] = -1
    model = Selects()
    mine = ts.convert_sync_batchnorm(copy.deepcopy(model))
    with ts.KissingSpheres(concurrency=2) as spheres:
        ts.SphereParallel(mine, spheres, scalars="sum")(x).backward()
    model(x).backward()
    torch.testing.assert_close(mine.norm.running_var, model.norm.running_var)
    torch.testing.assert_close(mine.norm.weight.grad, model.norm.weight.grad)


def test_a_mean_far_from_zero_costs_no_digits() -> None:
    x = torch.randn(100, 3, 8, 8, dtype=torch.float64) + 1e7
    with ts.KissingSpheres() as spheres:
        layers = nn.BatchNorm2d(3).double(), ts.convert_sync_batchnorm(nn.BatchNorm2d(3).double())
        ts.SphereParallel(layers[1], spheres)(x)
        layers[0](x)
    torch.testing.assert_close(layers[1].running_var, layers[0].running_var, rtol=1e-8, atol=0)


def test_other_layouts_and_autocast() -> None:
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(5)
    net = nn.Sequential(nn.Conv2d(2, 5, 3), layer)
    x = torch.randn(30, 2, 6, 6)
    mine = ts.convert_sync_batchnorm(copy.deepcopy(net))
    with ts.KissingSpheres(concurrency=2) as spheres:
        parallel = ts.SphereParallel(mine, spheres)
        for inputs in (x.to(memory_format=torch.channels_last), x.transpose(2, 3)):
            found, expected = gradients(mine, parallel, inputs), gradients(net, net, inputs)
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
        with torch.autocast("cpu", torch.bfloat16):
            found, expected = parallel(x), net(x)
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.1)


def test_the_rest_of_the_library_takes_it() -> None:
    """Optimizers and hooks, copies, pickles, state dicts, evaluation; without a warning."""
    model = ts.convert_sync_batchnorm(make())
    x, y = next(batches(50))
    with ts.KissingSpheres(concurrency=2) as spheres, warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "the shards of this model are so")
        parallel = ts.SphereParallel(model, spheres)
        optimizer = torch.optim.Adam(parallel.parameters())
        ts.GradientHook(optimizer, parallel)
        again = copy.deepcopy(parallel)
        F.cross_entropy(parallel(x), y).backward()
        optimizer.step()
        again.load_state_dict(parallel.state_dict())
        for p in parallel.parameters():
            p.grad = None
        outputs = [each(x) for each in (parallel, again, pickle.loads(pickle.dumps(model)))]
        assert torch.equal(outputs[0], outputs[1])
        torch.testing.assert_close(outputs[2], outputs[0], rtol=1e-4, atol=1e-4)
        assert parallel.state_dict().keys() == make().state_dict().keys()
        with torch.no_grad():
            assert not torch.equal(parallel(x)[:2], parallel(x[:2]))
        parallel.eval()
        with pytest.warns(UserWarning, match="looks across the rows"):  # without running statistics
            parallel(x)
        model.last = nn.Identity()
        parallel(x)


def test_without_gradients_and_partly_frozen() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    expected = copy.deepcopy(model)
    mine = ts.convert_sync_batchnorm(model)
    x = torch.randn(40, 4)
    with ts.KissingSpheres(concurrency=2) as spheres:
        parallel = ts.SphereParallel(mine, spheres)
        with torch.no_grad():
            torch.testing.assert_close(parallel(x), expected(x), rtol=1e-4, atol=1e-5)
        for each in (mine, expected):
            each[1].eval()
            each[0].requires_grad_(requires_grad=False)
            each[3].weight.requires_grad_(requires_grad=False)
        found, theirs = gradients(mine, parallel, x), gradients(expected, expected, x)
        torch.testing.assert_close(found, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_inside_a_checkpoint_of_activations(reentrant: bool) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU())

        def forward(self, x):
            return checkpoint(self.inner, x * 1, use_reentrant=reentrant)

    model = Block()
    mine = ts.convert_sync_batchnorm(copy.deepcopy(model))
    x = torch.randn(40, 4)
    with ts.KissingSpheres(concurrency=2) as spheres:
        found = gradients(mine, ts.SphereParallel(mine, spheres), x)
    torch.testing.assert_close(found[:2], gradients(model, model, x)[:2], rtol=1e-4, atol=1e-4)


def test_large_buffers_and_retained_graphs() -> None:
    model = nn.Sequential(nn.Linear(2, 40_000), nn.BatchNorm1d(40_000))
    mine = ts.convert_sync_batchnorm(copy.deepcopy(model))
    x = torch.randn(24, 2)
    with ts.KissingSpheres(concurrency=2) as spheres:
        parallel = ts.SphereParallel(mine, spheres)
        y = parallel(x)
        y.square().sum().backward(retain_graph=True)
        first = mine[0].weight.grad.clone()
        y.square().sum().backward()
        assert torch.equal(mine[0].weight.grad, first + first)
    model(x)
    torch.testing.assert_close(mine[1].running_var, model[1].running_var, rtol=1e-4, atol=1e-6)


def test_without_reproducible_shards_still_wait_for_each_other() -> None:
    model = ts.convert_sync_batchnorm(make())
    x, _ = next(batches(40))
    with ts.KissingSpheres(concurrency=2) as spheres:
        parallel = ts.SphereParallel(model, spheres, reproducible=False)
        (only,) = waiting_ways(12, 2)
        for _ in range(18):
            parallel(x).sum().backward()
            # There is nothing to choose from, so that nothing is measured.
            assert parallel.plan == only.name and parallel.plan_costs == {}


# ---- conversion ----


def test_conversion_keeps_what_the_layers_have() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ModuleDict({"deep": nn.BatchNorm1d(4)}))
    model.append(nn.Sequential(model[0]))  # the same layer under two names
    model[0].eval()
    called = []
    handle = model[0].register_forward_hook(lambda *_: called.append(1))
    before = model.state_dict(keep_vars=True)
    mine = ts.convert_sync_batchnorm(model)
    assert mine is model
    after = mine.state_dict(keep_vars=True)
    assert [*after] == [*before] and all(after[name] is before[name] for name in before)
    assert mine[0] is mine[2][0] and not mine[0].training and mine[1]["deep"].training
    mine[0](torch.randn(2, 3, 4, 4))
    handle.remove()
    mine[0](torch.randn(2, 3, 4, 4))
    assert called == [1]
    assert ts.convert_sync_batchnorm(mine)[0] is mine[0]
    one = nn.BatchNorm1d(3)
    assert ts.convert_sync_batchnorm(one) is not one
    torchs = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3)))
    assert not isinstance(ts.convert_sync_batchnorm(torchs)[0], nn.SyncBatchNorm)
    assert isinstance(mine[0], nn.BatchNorm2d)  # for those who ask, as for weight decay


@pytest.mark.parametrize("kind", KINDS)
def test_outside_of_shards_it_is_torchs(kind) -> None:
    layer = kind(6)
    mine = ts.convert_sync_batchnorm(copy.deepcopy(layer))
    x = torch.randn(7, 6, *KINDS[kind])
    for _ in range(2):
        torch.testing.assert_close(gradients(mine, mine, x), gradients(layer, layer, x))
    assert torch.equal(mine.eval()(x), layer.eval()(x))
    for each in (layer, mine):
        with pytest.raises(ValueError, match="expected"):
            each(torch.randn(2, 6, 1, 1, 1, 1))


def test_what_cannot_be_converted_is_refused() -> None:
    class Own(nn.BatchNorm1d):
        def forward(self, x):
            return super().forward(x) + 1

    with pytest.raises(TypeError, match=r"Own '1' has a forward of its own"):
        ts.convert_sync_batchnorm(nn.Sequential(nn.ReLU(), Own(3)))
    parametrized = nn.BatchNorm1d(3)
    parametrize.register_parametrization(parametrized, "weight", nn.Softplus())
    with pytest.raises(TypeError, match="is parametrized"):
        ts.convert_sync_batchnorm(parametrized)
    with pytest.raises(ValueError, match=r"LazyBatchNorm1d '0' has no shapes yet"):
        ts.convert_sync_batchnorm(nn.Sequential(nn.LazyBatchNorm1d()))
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module"):
        ts.convert_sync_batchnorm(3)  # type: ignore[arg-type]


def test_torchs_own_is_refused_with_the_way_out() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.SyncBatchNorm(2)))
    with pytest.raises(TypeError, match=r"SyncBatchNorm in it, '1\.0'.*convert_sync_batchnorm"):
        ts.SphereParallel(model)
    with pytest.raises(TypeError, match="convert_sync_batchnorm"):
        ts.parallelize_(model)
