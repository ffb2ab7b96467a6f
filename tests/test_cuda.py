"""On an accelerator: shards one after another, the sum on the device, the same bits."""

from __future__ import annotations

import copy

import pytest
import torch
import zoo
from reference import digest
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import torch_spheres as ts

needs_cuda = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def train(
    name: str, device: str, concurrency: int, levels: int = 2, **options: bool
) -> tuple[str, nn.Module]:
    model = zoo.make(name).to(device)
    torch.manual_seed(3)
    with ts.KissingSpheres(levels, concurrency=concurrency) as spheres:
        parallel = ts.SphereParallel(model, spheres, **options)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        losses = []
        for x, y in zoo.batches(50, 4):
            optimizer.zero_grad()
            loss = F.cross_entropy(parallel(x.to(device)), y.to(device))
            loss.backward()
            optimizer.step()
            losses.append(loss.detach().cpu())
        assert spheres.stats().items_run == 0 or device == "cpu"
    return digest([*losses, *(v.cpu() for v in model.state_dict().values())]), model


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=needs_cuda)
        for name in ("mlp with dropout", "cnn with batch norm", "transformer with dropout")
    ],
)
def test_bits_on_cuda_do_not_depend_on_concurrency(name):
    first, model = train(name, "cuda", 1)
    assert train(name, "cuda", 5)[0] == first
    assert all(p.grad.is_cuda for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("reproducible", [True, False])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_gradients_are_those_of_the_bare_module(device, reproducible):
    torch.manual_seed(0)
    bare = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double().to(device)
    x = torch.randn(30, 6, dtype=torch.float64, device=device, requires_grad=True)
    with ts.KissingSpheres(concurrency=2) as spheres:
        model = ts.SphereParallel(copy.deepcopy(bare), spheres, reproducible=reproducible)
        for _ in range(8):
            model.zero_grad()
            x.grad = None
            model(x).square().mean().backward()
        mine = x.grad.clone()
        x.grad = None
        bare(x).square().mean().backward()
        torch.testing.assert_close(mine, x.grad)
        for p, q in zip(model.parameters(), bare.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)


def test_devices_other_than_the_cpu_run_shards_in_turn():
    """The meta device stands for any other where there is none."""
    with ts.KissingSpheres(concurrency=2) as spheres:
        model = ts.SphereParallel(nn.Linear(6, 5, device="meta"), spheres)
        out = model(torch.randn(30, 6, device="meta"))
        assert out.shape == (30, 5) and out.is_meta
        out.sum().backward()
        assert model.module.weight.grad.is_meta
        assert model.plan == "12 shards in turn, intra-op threads"
        assert spheres.stats().items_run == 0


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=needs_cuda)])
def test_loaders_hand_over_batches_on_the_device(device, workers):
    dataset = [{"x": torch.full((3,), float(i)), "name": str(i)} for i in range(20)]
    plain = DataLoader(dataset, 4, num_workers=workers)
    with ts.KissingSpheres(concurrency=2) as spheres:
        batches = [*ts.wrap(plain, spheres, device=device)]
    assert [batch["name"] for batch in batches] == [batch["name"] for batch in plain]
    for batch, other in zip(batches, plain, strict=True):
        assert batch["x"].device.type == device and batch["x"].shape == other["x"].shape
        if device == "cuda":
            assert torch.equal(batch["x"].cpu(), other["x"])


@pytest.mark.parametrize("workers", [pytest.param(n, marks=needs_cuda) for n in (0, 2)])
def test_copies_are_done_when_the_loop_uses_them(workers):
    rows = torch.randn(64, 1 << 18)
    plain = DataLoader(TensorDataset(rows), 8, num_workers=workers)
    with ts.KissingSpheres(concurrency=2) as spheres:
        for _ in range(3):
            loader = ts.wrap(plain, spheres, device="cuda")
            sums = torch.cat([batch[0].double().sum(1) for batch in loader])
            torch.testing.assert_close(sums.cpu(), rows.double().sum(1))
