"""What batch norm over the whole batch costs: the same model converted, as it is, and in torch.

python benchmarks/bench_batch_norm.py [--quick] [--json PATH] [--concurrency N]
"""

from __future__ import annotations

import copy
import functools

import torch
from common import Report, Section, arguments, compare, race, timed
from torch import nn
from torch.nn import functional as F

import torch_spheres as ts

CONVERTED, OWN_ROWS, PLAIN = "converted", "statistics of a shard's rows", "plain torch"
MOST = 2.0  # times as long as without: what the whole batch's statistics may cost


def network() -> nn.Module:
    """Three convolutions with batch norm, for images of 28 x 28."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(512, 10))


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor
) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def section(spheres: ts.KissingSpheres, rows: int, rounds: int) -> Section:
    first = network()
    models = {
        CONVERTED: ts.SphereParallel(ts.convert_sync_batchnorm(copy.deepcopy(first)), spheres),
        OWN_ROWS: ts.SphereParallel(copy.deepcopy(first), spheres),
        PLAIN: copy.deepcopy(first),
    }
    x, y = torch.randn(rows, 1, 28, 28), torch.randint(0, 10, (rows,))
    calls = {
        name: functools.partial(
            timed,
            functools.partial(step, model, torch.optim.SGD(model.parameters(), 0.01), x, y),
        )
        for name, model in models.items()
    }
    race(calls, 3)  # the first steps look for more than later ones
    made = Section(
        f"A step on {rows} images, concurrency {spheres.concurrency}",
        f"time / time of the same model with {OWN_ROWS}; at most {MOST:g} is wanted",
    )
    seconds = race(calls, rounds)
    compare(made, seconds, OWN_ROWS, {})
    return made


def main() -> None:
    options = arguments("batch_norm", "Batch norm over the whole batch, in shards.")
    rounds = 2 if options.quick else 21
    torch.set_num_threads(options.concurrency)
    report = Report("bench_batch_norm", {"concurrency": options.concurrency, "rounds": rounds})
    with ts.KissingSpheres(2, concurrency=options.concurrency) as spheres:
        for rows in (96, 384):
            report.add(section(spheres, rows, rounds))
    report.save(options.json)


if __name__ == "__main__":
    main()
