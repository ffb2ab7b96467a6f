"""The bits of one process, whatever number of processes shares the batch."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import reference
import zoo
from torch.nn import functional as F

HERE = Path(__file__).parent
WAYS = ("loop", "mean", "count")


def torchrun(world: int, script: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """`script` on so many ranks of this machine."""
    environment = os.environ | {
        "PYTHONPATH": f"{HERE}:{HERE.parent / 'examples'}",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    command = [
        *(sys.executable, "-P", "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(world), str(script), *map(str, arguments)),
    ]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)


@functools.cache
def expected(name: str, kind: str, way: str, levels: int, rows: int) -> str:
    """In plain torch: shard after shard, in one process."""
    model = zoo.make(name)
    optimizers = zoo.optimizer_of(model, kind)
    losses = []
    for x, y in zoo.batches(rows):
        optimizers.zero_grad()
        leaves = 12 ** (levels - 1)
        if way == "loop":
            losses.append(reference.train_step(model, x, y, F.cross_entropy, leaves))
        else:
            loss_fn = F.cross_entropy if way == "mean" else sum_and_count
            losses.append(reference.train_step_by_shard(model, x, y, loss_fn, leaves))
        optimizers.step()
    return zoo.fingerprint(model, optimizers, losses)


def sum_and_count(output, target):
    return F.cross_entropy(output, target, reduction="sum"), len(target)


# name, optimizer, way, levels, rows, concurrency. 50 rows are uneven shards, 5 leave ranks empty.
SUITE = [
    *([name, "sgd", "loop", 2, 50, 1] for name in zoo.ZOO),
    *([name, "adamw", "mean", 2, 50, 2] for name in zoo.ZOO),
    *([name, "adamw", "count", 2, 50, 3] for name in list(zoo.ZOO)[:2]),
    *(["mlp with dropout", "adamw", way, 2, 5, 1] for way in WAYS),
    *([name, "sgd", "loop", 2, 5, 1] for name in ("residual net", "sparse embedding")),
    *(["transformer with dropout", "sgd", way, 3, 150, 2] for way in ("loop", "mean")),
    *(["cnn with batch norm", "sgd", way, 3, 20, 1] for way in ("loop", "mean")),
]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("world", [1, 2, 3, 4, 6])
def test_the_bits_of_one_process(world, tmp_path):
    done = torchrun(world, HERE / "ranks_suite.py", json.dumps(SUITE), tmp_path)
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / f"{r}.json").read_text()) for r in range(world)]
    for case in SUITE:
        name, kind, way, levels, rows, _ = case
        for rank, digests in enumerate(found):
            assert digests[json.dumps(case)] == expected(name, kind, way, levels, rows), (
                case,
                rank,
            )
