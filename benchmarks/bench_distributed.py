"""Several processes: `SphereParallel` over gloo against DDP, and the exact exchange against a ring.

Each run is of so many ranks on this machine, with one thread each. In every round DDP and ours
train a step on the same rows, one after the other in the same processes, and the slowest rank's
time counts.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import Report, Row, Section, arguments, compare, duration
from models import TASKS, Task
from torch.nn.parallel import DistributedDataParallel

import torch_spheres as ts
from torch_spheres.distributed.group import find_ranks
from torch_spheres.distributed.tree_all_reduce import BucketLayout, TreeAllReduce
from torch_spheres.errors import DeferredError

DDP, LOOP, BY_SHARD = "DDP", "the loop as it was", "forward_backward"
STEP_TARGET = 1 / 1.15  # DDP's time by ours
SIZES = (100_000, 1_000_000, 10_000_000)


# ---- a rank ----


def together(call: Callable[[], object]) -> float:
    """Seconds until the last rank is done."""
    dist.barrier()
    begin = time.perf_counter()
    call()
    seconds = torch.tensor(time.perf_counter() - begin)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return float(seconds)


def rounds(contestants: dict[str, Callable[[], object]], count: int) -> dict[str, list[float]]:
    """As `common.race`, but all ranks at once."""
    names = list(contestants)
    found: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        for _ in range(2):
            contestants[name]()
    for i in range(count):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(together(contestants[name]))
    return found


def steps(task: Task, rows: int, spheres: ts.KissingSpheres) -> dict[str, Callable[[], object]]:
    """A training step of each contestant."""
    generator = torch.Generator().manual_seed(1)
    inputs, targets = task.batch(rows, generator)
    mine = next(iter(ts.SphereBatchSampler(range(rows), rows, spheres=spheres)))
    inputs, targets = tuple(x[mine] for x in inputs), targets[mine]

    def stepping(model: torch.nn.Module, gradients: Callable[[], object]) -> Callable[[], object]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

        def step() -> None:
            optimizer.zero_grad()
            gradients()
            optimizer.step()

        return step

    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    peer = DistributedDataParallel(
        task.seeded(), gradient_as_bucket_view=True, forward_sync_buffers=False, static_graph=True
    )
    ours = ts.SphereParallel(task.seeded(), spheres)
    sharded = ts.SphereParallel(task.seeded(), spheres)
    return {
        DDP: stepping(peer, lambda: task.loss(peer(*inputs), targets).backward()),
        LOOP: stepping(ours, lambda: task.loss(ours(*inputs), targets).backward()),
        BY_SHARD: stepping(sharded, lambda: sharded.forward_backward(task.loss, inputs, targets)),
    }


def exchanges(count: int) -> tuple[dict[str, Callable[[], object]], Callable[[], int]]:
    """The sum of so many gradients over all ranks, both ways; and bytes that ours has sent."""
    ranks = find_ranks(None, 12)
    assert ranks is not None
    division = ranks.divide(12)
    parts = [[torch.randn(count)] for _ in division.parts[ranks.rank]]
    layout, whole = BucketLayout(parts[0]), torch.randn(count)

    def exact() -> None:
        exchange = TreeAllReduce(ranks, division, layout, "benchmark")
        for p, sums in enumerate(parts):
            exchange.add_part(p, [[total] for total in sums])
        exchange.finish(DeferredError())

    def sent() -> int:
        before = ranks.sent
        exact()
        return ranks.sent - before

    return {"all-reduce": lambda: dist.all_reduce(whole), "exact": exact}, sent


def rank_main(work: dict[str, Any], out: Path) -> None:
    """What one rank does."""
    warnings.simplefilter("ignore", FutureWarning)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    with ts.KissingSpheres(concurrency=1) as spheres:
        if "task" in work:
            contestants = steps(TASKS[work["task"]], work["rows"], spheres)
            found: Any = rounds(contestants, work["rounds"])
        else:
            contestants, sent = exchanges(work["count"])
            found = {"seconds": rounds(contestants, work["rounds"]), "sent": sent()}
        if dist.get_rank() == 0:
            out.write_text(json.dumps(found))
        dist.barrier()
    dist.destroy_process_group()


# ---- the benchmark ----


def run(world: int, **work: Any) -> Any:
    """What so many ranks found out."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(world), __file__, "--rank", json.dumps(work), str(out)]
        environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stderr}")
        return json.loads(out.read_text())


def step_section(world: int, count: int, quick: bool) -> Section:
    section = Section(
        f"A training step on {world} ranks", "DDP's time by ours: above 1 we are faster"
    )
    for name in ("MNIST CNN", "ResNet-18"):
        task = TASKS[name]
        for rows in (task.small,) if quick else (task.small, task.large):
            samples = run(world, task=name, rows=rows, rounds=count)
            section.samples |= {f"{name}, {rows}: {way}": s for way, s in samples.items()}
            peer = samples.pop(DDP)
            for way, seconds in samples.items():
                one = Section("")
                compare(one, {way: seconds, DDP: peer}, way, {DDP: STEP_TARGET})
                ratio, row = one.rows[1].ratio, one.rows[1]
                value = (
                    f"{duration(statistics.median(seconds))} ({duration(statistics.median(peer))})"
                )
                section.add(
                    Row(f"{name}, {rows} rows: {way}", value, ratio, row.target, row.met, "(DDP)")
                )
    return section


def exchange_section(count: int, quick: bool) -> Section:
    section = Section(
        "The exact exchange, float32", "gloo's all-reduce's time by ours: above 1 we are faster"
    )
    for world in (2,) if quick else (2, 3):
        for size in SIZES[:1] if quick else SIZES:
            found = run(world, count=size, rounds=count)
            seconds = found["seconds"]
            ring = 2 * (world - 1) / world * 4 * size
            one = Section("")
            compare(one, {"exact": seconds["exact"], "peer": seconds["all-reduce"]}, "exact", {})
            bytes_by_ring = found["sent"] / ring
            single = world == 3  # one part for each rank
            section.add(
                Row(
                    f"{size:,} parameters on {world} ranks",
                    duration(statistics.median(seconds["exact"])),
                    one.rows[1].ratio,
                    "bytes <= 2" if single else "",
                    bytes_by_ring <= 2 if single else None,
                    f"{bytes_by_ring:.2f} times the bytes of a ring",
                )
            )
            section.samples |= {f"{size}, {world}: {way}": s for way, s in seconds.items()}
    return section


def main() -> None:
    if "--rank" in sys.argv:
        work, out = sys.argv[-2:]
        rank_main(json.loads(work), Path(out))
        return

    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--world", type=int, default=2, help="ranks that train")

    options = arguments("distributed", __doc__ or "", more)
    rounds_ = 2 if options.quick else 15
    report = Report("bench_distributed", {"world": options.world, "rounds": rounds_})
    report.add(step_section(options.world, rounds_, options.quick))
    report.add(exchange_section(2 * rounds_, options.quick))
    report.save(options.json)


if __name__ == "__main__":
    main()
