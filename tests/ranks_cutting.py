"""What each rank of test_cutting_ranks.py runs: what goes in and comes out, in two ranks."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from judge import Calls
from torch import nn
from torch.nn import functional as F

import torch_spheres as ts


def mine(rows, spheres):
    return next(iter(ts.SphereBatchSampler(range(rows), rows, spheres=spheres)))


def time_major(spheres, rows):
    """An LSTM whose batch is dimension 1, with carried states; 5 rows leave a rank few shards."""
    torch.manual_seed(0)
    plain = nn.LSTM(4, 3, 2)
    model = ts.SphereParallel(nn.LSTM(4, 3, 2), spheres, batch_dim=1)
    model.module.load_state_dict(plain.state_dict())
    x, hidden = torch.randn(5, rows, 4), torch.randn(2, rows, 3)
    own = mine(rows, spheres)
    given = x[:, own].clone().requires_grad_()
    y, (h, c) = model(given, (hidden[:, own], hidden[:, own]))
    assert y.shape == (5, len(own), 3) and h.shape == c.shape == (2, len(own), 3)
    expected_x = x.clone().requires_grad_()
    expected, (eh, ec) = plain(expected_x, (hidden, hidden))
    for found, wanted in ((y, expected), (h, eh), (c, ec)):
        torch.testing.assert_close(found, wanted[:, own])
    if not own:
        y.sum().backward()
    else:
        (y.square().mean() + h.square().mean()).backward()  # of this rank's rows
    (expected.square().mean() + eh.square().mean()).backward()
    for a, b in zip(model.module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    target = torch.randn(5, rows, 3, generator=torch.Generator().manual_seed(2))
    plain.zero_grad()
    model.zero_grad()
    whole = model.gather(model(x[:, own], (hidden[:, own],) * 2)[0])
    torch.testing.assert_close(whole, plain(x, (hidden, hidden))[0])
    F.mse_loss(whole, target).backward()
    F.mse_loss(plain(x, (hidden, hidden))[0], target).backward()
    for a, b in zip(model.module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    model.zero_grad()
    loss = model.forward_backward(
        lambda out, t: F.mse_loss(out[0], t), (x[:, own], (hidden[:, own],) * 2), target[:, own]
    )
    torch.testing.assert_close(loss, F.mse_loss(plain(x, (hidden, hidden))[0], target).detach())


def scalars_and_constants(spheres, rows):
    def fn(s, x, scale):
        y = s.layer(x) * scale
        texts = [f"{v:.3f}" for v in x[:, 0].tolist()]
        return {"sum": y.square().sum(), "weights": s.matrix, "y": y.T, "texts": texts}

    torch.manual_seed(1)
    x, scale, own = torch.randn(rows, 4), torch.rand(4) + 0.5, mine(rows, spheres)

    class Scaled(Calls):
        def forward(self, x, scale):
            return super().forward(x, scale)

    plain = Scaled(fn)
    model = ts.SphereParallel(Scaled(fn), spheres, scalars="sum", whole=("scale",))
    ours, theirs = scale.clone().requires_grad_(), scale.clone().requires_grad_()
    out, expected = model(x[own], ours), plain(x, theirs)
    torch.testing.assert_close(out["sum"], expected["sum"])
    assert torch.equal(out["weights"], plain.matrix)
    torch.testing.assert_close(out["y"], expected["y"][:, own])
    assert out["texts"] == [expected["texts"][i] for i in own]
    (out["sum"] + out["weights"].square().sum()).backward()
    (expected["sum"] + expected["weights"].square().sum()).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    for a, b in zip(model.module.parameters(), plain.parameters(), strict=True):
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad)


def everybody_is_told(spheres):
    rows = 24
    own = mine(rows, spheres)
    x = torch.arange(rows * 4.0).view(rows, 4)[own]
    for fn, message in (
        (lambda s, x: x @ x.T, "depends on pairs of rows"),
        (lambda s, x: s.layer(x.mean(0)), "has no rows and differs"),
        (lambda s, x: (s.layer(x), dist.get_rank()), "differs between the ranks: 0 on rank 0, 1"),
        (lambda s, x: (s.layer(x), float(x[0, 0])), "is no tensor and differs from shard to"),
    ):
        with pytest.raises(ValueError, match=message):
            ts.SphereParallel(Calls(fn), spheres)(x)
    # Of one rank alone: it has its own error, and the other is told.
    second = dist.get_rank() == 1
    model = ts.SphereParallel(Calls(lambda s, x, c: s.layer(x)), spheres)
    kind = ValueError if second else ts.RankError
    with pytest.raises(kind, match="elements, as many as the batch has rows"):
        model(x, ["a"] * (len(own) if second else 3))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ts.SphereParallel(Calls(lambda s, x: s.layer(x) - x.mean(0)), spheres)(x)
    assert sum("is not the same for rows" in str(w.message) for w in caught) == 1
    assert model(x, [1, 2]).shape == x.shape


def one_shard_each(spheres):
    """Its halves are compared: what it returns depends on no other shard, but on all its rows."""
    x = torch.randn(24, 4)[mine(24, spheres)]
    with pytest.raises(ValueError, match="depends on pairs of rows"):
        ts.SphereParallel(Calls(lambda s, x: s.layer(x) @ x.T), spheres)(x)
    with pytest.warns(UserWarning, match="is not the same for rows that are alone"):
        ts.SphereParallel(Calls(lambda s, x: s.layer(x) - x.mean(0)), spheres)(x)
    model = ts.SphereParallel(Calls(lambda s, x: (s.layer(x).T, s.matrix)), spheres)
    y, matrix = model(x)
    torch.testing.assert_close(y, model.module.layer(x).T)
    (y.mean() + matrix.sum()).backward()
    torch.testing.assert_close(model.module.matrix.grad, torch.ones(4, 4))


def main() -> None:
    warnings.simplefilter("ignore", FutureWarning)
    dist.init_process_group("gloo")
    with ts.KissingSpheres(concurrency=2) as spheres:
        if dist.get_world_size() == 12:
            one_shard_each(spheres)
        for rows in (26, 12, 5, 1) if dist.get_world_size() == 2 else ():
            time_major(spheres, rows)
            scalars_and_constants(spheres, rows) if rows > 1 else None
        if dist.get_world_size() == 2:
            everybody_is_told(spheres)
    Path(sys.argv[1], str(dist.get_rank())).write_text("done")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
