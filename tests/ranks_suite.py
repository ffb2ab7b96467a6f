"""What each rank of test_ranks.py runs: trains, and writes digests."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import zoo
from torch.nn import functional as F
from torch.utils.data import DataLoader

import torch_spheres as ts
from torch_spheres.distributed import tree_all_reduce
from torch_spheres.distributed.group import Ranks


def rows_of(rows: int, spheres: ts.KissingSpheres) -> list[int]:
    """This rank's rows of a batch: a sampler's, which are a wrapped loader's."""
    mine = next(iter(ts.SphereBatchSampler(range(rows), rows, spheres=spheres)))
    if spheres.levels == 3:
        with torch.random.fork_rng(devices=[]):  # an epoch draws a seed
            (loaded,) = ts.wrap(DataLoader(range(rows), rows), spheres)
        assert loaded.tolist() == mine
    return mine


def sum_and_count(output, target):
    return F.cross_entropy(output, target, reduction="sum"), len(target)


def trained(name, kind, way, rows, spheres):
    model = zoo.make(name)
    if dist.get_rank() > 0:  # rank 0's weights are everybody's
        for p in model.parameters():
            p.data.add_(1)
    parallel = ts.SphereParallel(model, spheres)
    optimizers = zoo.optimizer_of(model, kind)
    for optimizer in optimizers.each:
        ts.GradientHook(optimizer, parallel)
    mine = rows_of(rows, spheres)
    losses = []
    for x, y in zoo.batches(rows):
        x, y = x[mine], y[mine]
        optimizers.zero_grad()
        if way == "loop":
            with parallel.no_sync():  # changes nothing
                loss = F.cross_entropy(parallel.gather(parallel(x)), parallel.gather(y))
                loss.backward()
        elif way == "mean":
            loss = parallel.forward_backward(F.cross_entropy, x, y)
        else:
            loss = parallel.forward_backward(sum_and_count, x, y)
        optimizers.step()
        losses.append(loss.detach())
    return zoo.fingerprint(model, optimizers, losses)


def in_small_buckets() -> list[int]:
    """Has all models sent in many buckets, as large ones are; counts them."""
    tree_all_reduce._BUCKET, tree_all_reduce._SMALL = 1 << 10, 0
    sent, scatter = [0], Ranks.scatter_async

    def counting(*args):
        sent[0] += 1
        return scatter(*args)

    Ranks.scatter_async = counting
    return sent


def main() -> None:
    cases, out = json.loads(sys.argv[1]), Path(sys.argv[2])
    sent, backend = [0], ["gloo"]
    if "small buckets" in sys.argv[3:]:
        sent, backend = in_small_buckets(), []  # torch chooses: gloo for what is on the CPU
    warnings.simplefilter("ignore", FutureWarning)
    dist.init_process_group(*backend)
    torch.set_num_threads(1)
    found = {}
    for case in cases:
        name, kind, way, levels, rows, concurrency = case
        with ts.KissingSpheres(levels, concurrency=concurrency) as spheres:
            found[json.dumps(case)] = trained(name, kind, way, rows, spheres)
    found["buckets"] = sent[0]
    (out / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
