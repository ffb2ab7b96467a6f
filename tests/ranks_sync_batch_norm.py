"""What each rank of test_sync_batch_norm_ranks.py runs: trains, and writes digests."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from ranks_suite import in_small_buckets
from sync_batch_norm_support import trained
from torch import nn

import torch_spheres as ts


def digests(cases: list[list[object]]) -> dict[str, str]:
    found = {}
    for case in cases:
        way, levels, rows, concurrency = case
        found[json.dumps(case[:3])] = trained(way, levels, rows, concurrency)[0]
    return found


class Fails(nn.Module):
    """Fails for the rows of one rank, in the forward or in the backward, before a batch norm."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where, self.norm = where, nn.BatchNorm1d(3)
        self.first = nn.Linear(3, 3)

    def forward(self, x):
        y = self.first(x)
        if dist.get_rank() == 1:
            if self.where == "forward":
                raise ZeroDivisionError("of the user's")
            if self.where == "backward":
                z = self.norm(y)
                z.register_hook(self.fail)
                return z
        return self.norm(y)

    def fail(self, _grad):
        raise ZeroDivisionError("of the user's")


def failures() -> dict[str, str]:
    """What each rank is told of an error on one of them; and that all can go on."""
    found = {}
    torch.manual_seed(0)
    with ts.KissingSpheres(concurrency=2) as spheres:
        for where in ("forward", "backward", "nowhere"):
            model = ts.SphereParallel(ts.convert_sync_batchnorm(Fails(where)), spheres)
            try:
                model(torch.randn(12 // dist.get_world_size(), 3)).sum().backward()
            except Exception as error:
                found[where] = f"{type(error).__name__}: {error}"
            else:
                found[where] = ""
        # One row for two ranks or more.
        model = ts.SphereParallel(ts.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3))))
        try:
            model(torch.randn(1 if dist.get_rank() == 0 else 0, 3))
        except ValueError as error:
            found["rows"] = str(error)
        model.eval()
        with torch.no_grad():
            model(torch.randn(1, 3))
    return found


def main() -> None:
    cases, out = json.loads(sys.argv[1]), Path(sys.argv[2])
    sent = in_small_buckets() if "small buckets" in sys.argv[3:] else [1]
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    found: dict[str, object] = {"digests": digests(cases)}
    assert sent[0] > 0
    if "failures" in sys.argv[3:]:
        found["failures"] = failures()
    (out / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
