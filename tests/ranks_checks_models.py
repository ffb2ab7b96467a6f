"""What ranks of test_rank_checks.py run: mistakes with calls, weights, losses, checkpoints."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist
from rank_checks_support import (
    BATCH,
    DATA,
    Shuffled,
    X,
    Y,
    model_on,
    part,
    rank,
    run,
    step,
)
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader

import torch_spheres as ts


def calls(spheres):
    """What the model is called with, beside its rows."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.1))

        def forward(self, x, scale=1.0, flag=False):
            return self.layers(x) * scale

    second = rank() == 1
    x = part(X[:48])
    for how, match in (
        (lambda m: m(x, 1.0 + second), "different arguments that are no tensors"),
        (lambda m: m(x, flag=second), "different arguments that are no tensors"),
        (lambda m: m.module.layers[1].train(not second) and m(x), "different modes in parts"),
    ):
        model, _ = model_on(spheres, Scaled)
        model(x).sum()
        with pytest.raises(ValueError, match=match):
            how(model)
    model, _ = model_on(spheres, Scaled)
    with (
        pytest.raises(ValueError, match="different settings of autocast"),
        torch.autocast("cpu", enabled=second),
    ):
        model(x)
    # One of two equal blocks is frozen, another on each rank.
    blocks = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model, _ = model_on(spheres, lambda: blocks)
    blocks[rank()].requires_grad_(False)
    with pytest.raises(ValueError, match=r"weight .* does on rank ., and does not on rank ."):
        model(x)
    model, _ = model_on(spheres, lambda: nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)))
    with pytest.raises(ValueError, match=r"a batch of 17 rows over 12 shards .* BatchNorm1d"):
        model(part(X[:17]))
    model(part(X[:24]))


# ---- loops that compute gradients themselves, and other models ----


def by_hand(spheres):
    second = rank() == 1

    def loop(loader, change=lambda model, optimizer, n: None):
        torch.manual_seed(0)
        model = nn.Linear(6, 5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        hook = ts.GradientHook(optimizer, spheres)
        for n, (x, y) in enumerate(loader):
            sampler = ts.SphereBatchSampler(range(BATCH), BATCH, spheres=spheres)
            first = 0
            for shard, rows in sampler.own_shards(range(len(x))).items():
                part_x, part_y = x[first : first + len(rows)], y[first : first + len(rows)]
                first += len(rows)
                loss = F.cross_entropy(model(part_x), part_y, reduction="sum") / BATCH
                hook.add(shard, torch.autograd.grad(loss, list(model.parameters())))
            optimizer.step()
            change(model, optimizer, n)

    def loader(sampler=None):
        return ts.wrap(DataLoader(DATA, BATCH, sampler=sampler), spheres)

    loop(loader())
    with pytest.raises(ValueError, match="index lists of batch 0"):
        loop(loader(Shuffled("by rank")))

    def rate(model, optimizer, n):
        optimizer.param_groups[0]["lr"] = 0.1 + second

    with pytest.raises(ValueError, match=r"lr of SGD, group 0 is 0\.1 on rank 0, 1\.1 on rank 1"):
        loop(loader(), rate)

    def weight(model, optimizer, n):
        with torch.no_grad():
            model.bias[0] += second

    with pytest.raises(ValueError, match=r"'parameter 1 of shape \(5,\)' is not the same"):
        loop(loader(), weight)


# ---- what drifts ----


def drift(spheres):
    second = rank() == 1

    def rates(model, optimizer, n, loss):
        optimizer.param_groups[0]["lr"] = 0.1 + 0.1 * second

    plateau = {}

    def schedule(model, optimizer, n, loss):
        if optimizer not in plateau:
            plateau[optimizer] = ReduceLROnPlateau(optimizer, patience=0, threshold=1e9)
        plateau[optimizer].step(loss + n * second)

    def by_loss(model, optimizer, n, loss):
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + loss)

    def weight(model, optimizer, n, loss):
        if second and n == 1:
            with torch.no_grad():
                model.module[0].weight[0, 0] += 1

    def swapped(model, optimizer, n, loss):
        if second and n == 1:
            with torch.no_grad():
                model.module[0].weight.copy_(model.module[0].weight.flip(0))

    def momentum(model, optimizer, n, loss):
        if second and n == 1:
            optimizer.state.clear()

    def frozen(model, optimizer, n, loss):
        model.module[2].bias.requires_grad_(not second)

    cases = [
        (rates, "lr of SGD, group 0 is 0.1 on rank 0, 0.2 on rank 1"),
        (by_loss, "lr of SGD, group 0 is"),
        (weight, "'0.weight' is not the same on ranks"),
        (swapped, "'0.weight' is not the same on ranks"),
        (momentum, "'0.weight' is not the same on ranks"),
        (frozen, r"2.bias \(5,\) does on rank 0, and does not on rank 1"),
    ]
    for mistake, match in cases:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 5))
        model = ts.SphereParallel(module, spheres)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        x, y = part(X[:48]), part(Y[:48])
        steps = 0
        with pytest.raises(ValueError, match=match):
            for n in range(66):
                loss = step(model, optimizer, x, y)
                mistake(model, optimizer, n, loss)
                steps += 1
        assert steps <= 8
        # From here on with rank 0's values.
        model = ts.SphereParallel(module.requires_grad_(True), spheres)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            step(model, optimizer, x, y)

    # Long after the beginning.
    model, optimizer = model_on(spheres)
    x, y = part(X[:48]), part(Y[:48])
    for _ in range(70):
        step(model, optimizer, x, y)
    if second:
        with torch.no_grad():
            model.module.bias[0] = 9.0
    with pytest.raises(ValueError, match="'bias' is not the same"):
        for _ in range(64):
            step(model, optimizer, x, y)


# ---- losses ----


def losses(spheres):
    x, y = part(X[:100]), part(Y[:100])
    t = part(torch.randn(100, 5, generator=torch.Generator().manual_seed(2)))
    n = len(x)
    some = y.clone()
    some[::3] = -100
    w = torch.arange(1.0, 6)
    wrong = {
        "ce sum": lambda o: F.cross_entropy(o, y, reduction="sum"),
        "ce sum / 100": lambda o: F.cross_entropy(o, y, reduction="sum") / 100,
        "ce sum / 120": lambda o: F.cross_entropy(o, y, reduction="sum") / 120,
        "ce sum * 0.01": lambda o: F.cross_entropy(o, y, reduction="sum") * 0.01,
        "nll sum": lambda o: F.nll_loss(o.log_softmax(1), y, reduction="sum") / 100,
        "ignored": lambda o: F.cross_entropy(o, some),
        "mse sum": lambda o: F.mse_loss(o, t, reduction="sum"),
        "mse sum / 100": lambda o: F.mse_loss(o, t, reduction="sum") / 100,
        "bce sum": lambda o: F.binary_cross_entropy_with_logits(
            o, t.sign().relu(), reduction="sum"
        ),
        "l1 sum": lambda o: F.l1_loss(o, t, reduction="sum") / 100,
        "hinge sum": lambda o: F.multi_margin_loss(o, y, reduction="sum"),
        "sum": lambda o: o.sum(),
        "sum of sums": lambda o: (o - t).square().sum(1).sum(),
        "one of two": lambda o: F.cross_entropy(o, y) + o.square().sum(),
    }
    right = {
        "ce": lambda o: F.cross_entropy(o, y),
        "ce / 4": lambda o: F.cross_entropy(o, y) / 4,
        "2 ce": lambda o: 2 * F.cross_entropy(o, y),
        "ce / 2": lambda o: F.cross_entropy(o, y) / 2,
        "ce sum / n": lambda o: F.cross_entropy(o, y, reduction="sum") / n,
        "ce none": lambda o: F.cross_entropy(o, y, reduction="none").mean(),
        "smoothed": lambda o: F.cross_entropy(o, y, label_smoothing=0.15),
        "probabilities": lambda o: F.cross_entropy(o, t.softmax(1)),
        "mse": lambda o: F.mse_loss(o, t),
        "bce": lambda o: F.binary_cross_entropy_with_logits(o, t.sign().relu()),
        "huber": lambda o: F.huber_loss(o, t),
        "kl": lambda o: F.kl_div(o.log_softmax(1), t.softmax(1), reduction="batchmean"),
        "mean": lambda o: o.mean(),
        "sum then mean": lambda o: (o - t).square().sum(1).mean(),
        "ce sum / n / 2": lambda o: F.cross_entropy(o, y, reduction="sum") / n / 2,
        "0.3 ce sum / n": lambda o: 0.3 * F.cross_entropy(o, y, reduction="sum") / n,
        "scaled": lambda o: F.cross_entropy(o, y, reduction="sum") / n * 65536.0,
        "bfloat16": lambda o: F.cross_entropy(o.bfloat16(), y, reduction="sum") / n,
        "means of columns": lambda o: (o - t).square().mean(0).sum(),
        "tasks": lambda o: torch.stack([F.cross_entropy(o, y), o.square().mean()]).sum(),
        "mean then sum": lambda o: (o - t).square().mean(1).sum() / n,
        "two": lambda o: F.cross_entropy(o, y) + 0.1 * o.square().mean(),
        "whole": lambda o: F.cross_entropy(now.gather(o), now.gather(y), reduction="sum"),
        "weights": lambda o: F.cross_entropy(now.gather(o), now.gather(y), weight=w),
    }
    for name, loss in {**wrong, **right}.items():
        now, _ = model_on(spheres)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                loss(now(x)).backward()
        told = [str(w.message) for w in caught if "rank's own rows, and" in str(w.message)]
        assert len(told) == (name in wrong), (name, told)
    # Where all ranks have as many rows, the rows of all of them are a multiple of their own.
    now, _ = model_on(spheres)
    x, y = part(X[:96]), part(Y[:96])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "the shards of this model are so")
        (F.cross_entropy(now(x), y, reduction="sum") / len(x) / 2).backward()
    now, _ = model_on(spheres)
    with pytest.warns(UserWarning, match="a sum divided by 96, not a mean over the rank's 48 rows"):
        (F.cross_entropy(now(x), y, reduction="sum") / 96).backward()
    # A penalty on the weights does not go through the outputs.
    now, _ = model_on(spheres)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "the shards of this model are so")
        penalty = sum(p.square().sum() for p in now.parameters())
        (F.cross_entropy(now(x), y) + penalty).backward()


# ---- checkpoints ----


def checkpoints(spheres, folder):
    second = rank() == 1
    x, y = part(X[:48]), part(Y[:48])

    def made():
        model, _ = model_on(spheres, lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)))
        optimizer = torch.optim.Adam(model.parameters())
        scheduler = ReduceLROnPlateau(optimizer)
        step(model, optimizer, x, y)
        return {"model": model, "optimizer": optimizer, "scheduler": scheduler}

    def rate(parts):
        parts["optimizer"].param_groups[0]["lr"] = 0.5

    def weight(parts):
        parts["model"].module[0].bias.data[0] = 4

    def state(parts):
        next(iter(parts["optimizer"].state.values()))["exp_avg"] += 1

    def schedule(parts):
        parts["scheduler"].step(1.0 + second)

    path = folder / "checkpoint.pt"
    ts.save_checkpoint(path, step=1, **made())
    kept = path.read_bytes()
    for mistake, match in (
        (rate, r"optimizer: lr of Adam, group 0 .*0.001 on rank 0, 0.5 on rank 1"),
        (weight, r"model\.0\.bias"),
        (state, r"optimizer\.state\[0\]\.exp_avg"),
        (schedule, r"scheduler\.best .*1.0 on rank 0, 2.0 on rank 1"),
    ):
        parts = made()
        if second or mistake is schedule:
            mistake(parts)
        with pytest.raises(ts.RankError, match=f"{match}.* is not the same|{match}"):
            ts.save_checkpoint(path, step=2, **parts)
        assert path.read_bytes() == kept
    dist.barrier()
    if second:
        ts.save_checkpoint(folder / "alone.pt", process_group=False, **parts)
    ts.save_checkpoint(path, step=3, **made())


if __name__ == "__main__":
    run(globals())
