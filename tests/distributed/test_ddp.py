"""Processes outside, spheres inside: `DistributedDataParallel(SphereParallel(model))` over gloo."""

from __future__ import annotations

from pathlib import Path

import fork_server
import pytest
import torch

RANK = """
import copy, os, sys, torch, zoo
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP
import torch_spheres as ts

folder, make = sys.argv[1], getattr(ts, sys.argv[2])
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
bare = zoo.make("tied, unused, frozen").double()
plain = DDP(copy.deepcopy(bare), find_unused_parameters=True)
with ts.KissingSpheres(concurrency=2) as spheres:
    model = DDP(make(bare, spheres, process_group=False), find_unused_parameters=True)
    both = (plain, model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in both]
    for step, (x, y) in enumerate(zoo.batches(50, 4)):
        x, y = x.double().tensor_split(world)[rank], y.tensor_split(world)[rank]
        for m, optimizer in zip(both, optimizers):
            if step == 2:  # accumulate, without talking to the others
                with m.no_sync():
                    F.cross_entropy(m(x), y).backward()
            F.cross_entropy(m(x), y).backward()
        for p, q in zip(plain.parameters(), model.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None)
            if p.grad is not None:
                torch.testing.assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-12)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    weights = [p.detach().clone() for p in model.parameters()]
torch.save(weights, f"{folder}/{rank}.pt")
dist.destroy_process_group()
sys.stdout.flush()
os._exit(0)  # with a DDP model about, gloo's thread can abort a process that ends as usual
"""


@pytest.mark.timeout(110)
@pytest.mark.parametrize("make", ["SphereParallel", "parallelize_"])
def test_gradients_and_weights_are_those_of_ddp(tmp_path, make):
    fork_server.run_ranks(
        2, RANK, tmp_path, make, env={"PYTHONPATH": str(Path(__file__).parents[1])}
    )
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
