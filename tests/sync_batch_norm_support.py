"""A model with several batch norms, trained in plain torch and on the spheres."""

from __future__ import annotations

from collections.abc import Iterator

import reference
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import torch_spheres as ts


class Net(nn.Module):
    """Batch norms of all kinds; one of them is called twice, and gets the inputs themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(2)
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.again = nn.Conv2d(4, 4, 3, padding=1)
        self.volume = nn.BatchNorm3d(2, momentum=None)
        self.line = nn.BatchNorm1d(4, affine=False)
        self.out = nn.Linear(64, 5)
        self.last = nn.BatchNorm1d(5, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(self.first(x))))
        x = x + self.norm(self.again(x))
        x = self.volume(x.view(len(x), 2, 2, 4, 4)).view(len(x), 4, 16)
        return self.last(self.out(self.line(x).flatten(1)))


def make() -> nn.Module:
    torch.manual_seed(1)
    return Net()


def batches(rows: int, steps: int = 3) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        x = torch.randn(rows, 2, 6, 6, generator=generator) * 3 + 5
        yield x, torch.randint(0, 5, (rows,), generator=generator)


def plain(rows: int) -> tuple[nn.Module, list[Tensor]]:
    """The model and the losses, in plain torch."""
    model, losses = make(), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for x, y in batches(rows):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return model, losses


def trained(
    way: str, levels: int, rows: int, concurrency: int
) -> tuple[str, nn.Module, list[Tensor]]:
    """A digest of weights, buffers and losses; the model and the losses.

    Args:
        way: "loop", or "lean" for `forward_backward`.
        levels: of the spheres.
        rows: of each batch, of all ranks.
        concurrency: of the spheres.
    """
    model, losses = ts.convert_sync_batchnorm(make()), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with ts.KissingSpheres(levels, concurrency=concurrency) as spheres:
        parallel = ts.SphereParallel(model, spheres)
        mine = [*range(rows)]
        if dist.is_initialized():
            mine = next(iter(ts.SphereBatchSampler(range(rows), rows, spheres=spheres)))
        for x, y in batches(rows):
            x, y = x[mine], y[mine]
            optimizer.zero_grad()
            if way == "lean":
                loss = parallel.forward_backward(F.cross_entropy, x, y)
            else:
                loss = F.cross_entropy(parallel.gather(parallel(x)), parallel.gather(y))
                loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    return reference.digest([*model.state_dict().values(), *losses]), model, losses
