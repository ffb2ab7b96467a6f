"""What each rank of test_rank_advice.py runs: small shards, and shards that pay."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from paid import Paid, heard
from torch.nn import functional as F

import torch_spheres as ts

STEPS = 40


def messages(spheres, module, way, late):
    """What this rank is told; rank 1 comes `late` to each step, in seconds."""
    x = torch.ones(24, 3)[next(iter(ts.SphereBatchSampler(range(24), 24, spheres=spheres)))]
    model = ts.SphereParallel(module, spheres, reproducible=way != "fast")
    with heard() as found:
        for _ in range(STEPS):
            time.sleep(late * dist.get_rank())
            if way == "forward_backward":
                model.forward_backward(F.mse_loss, x, x)
            else:
                model(x).sum().backward()
    return found


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo")
    with ts.KissingSpheres(concurrency=1) as spheres:
        for way in ("backward", "fast", "forward_backward"):
            (message,) = messages(spheres, Paid(0.005, 0.0), way, 0.0)
            assert "a forward of this rank's rows takes" in message, message
            assert "in 6 shards and" in message, message
            assert "DistributedDataParallel runs a rank's rows" in message, message
            assert re.search("; shards=[24] would take", message), message
    with ts.KissingSpheres(concurrency=6) as spheres:
        # Who waits for another rank has shards that take no longer for it.
        assert messages(spheres, Paid(0.0, 0.005), "backward", 0.05) == []
    Path(sys.argv[1], str(dist.get_rank())).write_text("done")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
