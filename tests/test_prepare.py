"""`prepare`: four lines in one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import torch_spheres as ts


def parts():
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    dataset = TensorDataset(torch.randn(60, 4), torch.randint(0, 3, (60,)))
    return model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(dataset, 24)


def train(model, optimizer, loader):
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def test_the_loop_stays_and_so_do_the_parameters():
    model, optimizer, loader = parts()
    weight, plain = model.weight, copy.deepcopy(model)
    parallel, same_optimizer, wrapped = ts.prepare(model, optimizer, loader)
    assert same_optimizer is optimizer and isinstance(wrapped, ts.SphereLoader)
    assert wrapped.spheres is parallel.spheres and wrapped.dataset is loader.dataset
    assert parallel.module is model and parallel.module.weight is weight
    train(parallel, optimizer, wrapped)
    train(plain, torch.optim.SGD(plain.parameters(), lr=0.1), loader)
    torch.testing.assert_close(model.weight, plain.weight)
    parallel.spheres.stop()


def test_spheres_and_mode_are_passed_on():
    with ts.KissingSpheres(concurrency=2) as spheres:
        model, optimizer, loader = parts()
        loader = ts.wrap(loader, spheres, copy_dataset=True)
        prepared = ts.prepare(model, optimizer, loader, spheres, reproducible=False)
        parallel, optimizer, same_loader = prepared
        assert same_loader is loader
        assert parallel.spheres is spheres and not parallel.reproducible
        assert len(optimizer._optimizer_step_pre_hooks) == 1


def test_mistakes():
    model, optimizer, loader = parts()
    with pytest.raises(
        TypeError, match=r"loader must be a torch\.utils\.data\.DataLoader, got list;"
    ):
        ts.prepare(model, optimizer, [1])
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer, got Linear"):
        ts.prepare(model, model, loader)
    with pytest.raises(ValueError, match="none of the model's parameters"):
        ts.prepare(copy.deepcopy(model), optimizer, loader)
    assert not optimizer._optimizer_step_pre_hooks
