"""What each rank of test_shards.py runs: trains with a number of shards, and writes a digest."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import zoo
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import torch_spheres as ts


def loaders(dataset: TensorDataset, way: str, spheres: ts.KissingSpheres, shards: int):
    """Batches of 50 rows and a last one of 20, divided by `wrap` or by the batch sampler."""
    if way == "wrap":
        return ts.wrap(DataLoader(dataset, 50, shuffle=True), spheres, shards=shards)
    batches = ts.SphereBatchSampler(RandomSampler(dataset), 50, spheres=spheres, shards=shards)
    return DataLoader(dataset, batch_sampler=batches)


def trained(way: str, name: str, levels: int, shards: int) -> str:
    torch.manual_seed(3)
    dataset = TensorDataset(torch.randn(120, 1, 12, 12), torch.randint(10, (120,)))
    model = zoo.make(name)
    optimizers = zoo.optimizer_of(model, "sgd")
    losses = []
    with ts.KissingSpheres(levels, concurrency=2) as spheres:
        torch.manual_seed(4)
        if way == "prepare":
            loader = DataLoader(dataset, 50, shuffle=True)
            (first, *_) = optimizers.each
            parallel, _, loader = ts.prepare(model, first, loader, spheres, shards=shards)
        else:
            parallel = ts.SphereParallel(model, spheres, shards=shards)
            loader = loaders(dataset, way, spheres, shards)
        for _ in range(2):
            for x, y in loader:
                optimizers.zero_grad()
                losses.append(parallel.forward_backward(F.cross_entropy, x, y))
                optimizers.step()
    return zoo.fingerprint(model, optimizers, losses)


def main() -> None:
    way, name, levels, shards, folder = sys.argv[1:]
    dist.init_process_group("gloo")
    (Path(folder) / str(dist.get_rank())).write_text(trained(way, name, int(levels), int(shards)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
