"""Memory that training takes at its peak: plain torch, DDP, and the spheres.

python benchmarks/bench_memory.py [--quick] [--json PATH] [--concurrency N]
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from common import Ratio, Report, Row, Section, arguments
from contestants import DDP, FORWARD_BACKWARD, PLAIN, REPRODUCIBLE, Setup
from crews import Crews
from models import LARGE, TASKS

MIB = 1 << 20


@dataclass(frozen=True)
class Sizes:
    repeats: int
    steps: int
    """The optimizer's state is there after the first, so the second shows the peak."""
    task: str
    rows: int
    """Of a batch; at least 144, so that all leaves of three levels have some."""


FULL = Sizes(3, 2, LARGE.name, LARGE.small)
QUICK = Sizes(1, 2, "GPT-2, 4 layers", 144)


def contestants(sizes: Sizes, workers: int) -> dict[str, Setup]:
    def setup(way: str, count: int, levels: int = 2) -> Setup:
        return Setup(way, sizes.task, sizes.rows, count, "AdamW", levels)

    processes = max(2, workers)  # one would be plain torch
    return {
        f"plain, {workers} threads": setup(PLAIN, workers),
        f"DDP, {processes} processes": setup(DDP, processes),
        "SphereParallel, 2 levels, backward()": setup(REPRODUCIBLE, workers),
        "SphereParallel, 2 levels, forward_backward": setup(FORWARD_BACKWARD, workers),
        "SphereParallel, 3 levels, forward_backward": setup(FORWARD_BACKWARD, workers, 3),
    }


def train(setup: Setup, steps: int) -> list[dict[str, int]]:
    """What each process of a new crew has to say about its memory after some steps."""
    with Crews([setup], apart=True) as crews:
        (crew,) = crews.there
        crew.ask("run", steps)
        return list(crew.ask_all("memory"))


def peak(processes: Sequence[dict[str, int]]) -> float:
    """Bytes: the peaks added up, with what the processes share counted once.

    That is the pages of files, torch's libraries for the most part: each process has the same ones.
    The kernel's own count of shared pages (PSS) would depend on who else has torch loaded, this
    process for one.
    """
    own = sum(p["peak"] - p["files"] for p in processes)
    return own + max(p["files"] for p in processes)


def measure(sizes: Sizes, workers: int) -> Section:
    task = TASKS[sizes.task]
    with torch.device("meta"):
        parameters = sum(p.nbytes for p in task.make().parameters())
    section = Section(
        f"{task.name}, {sizes.rows} rows, AdamW: peak resident memory",
        "memory / memory of plain; no target",
    )
    setups = contestants(sizes, workers)
    found: dict[str, list[list[dict[str, int]]]] = {name: [] for name in setups}
    for _ in range(sizes.repeats):
        for name, setup in setups.items():
            found[name].append(train(setup, sizes.steps))
    peaks = {name: [peak(processes) for processes in runs] for name, runs in found.items()}
    plain, ddp, *_ = peaks
    section.samples = dict(found)
    for name, values in peaks.items():
        against_ddp = Ratio.of(values, peaks[ddp]).median
        section.add(
            Row(
                name,
                f"{statistics.median(values) / MIB:,.0f} MiB",
                Ratio.of(values, peaks[plain]),
                note="" if name == ddp else f"{against_ddp:.2f} of DDP",
            )
        )
    section.add(
        Row(
            "the parameters alone",
            f"{parameters / MIB:,.0f} MiB",
            note="their gradients take as much again, AdamW's state twice as much",
        )
    )
    return section


def main() -> None:
    options = arguments("memory", "Peak memory of training against plain torch and DDP.")
    sizes = QUICK if options.quick else FULL
    settings = {"concurrency": options.concurrency, "quick": options.quick, **vars(sizes)}
    report = Report("bench_memory", settings)
    report.add(measure(sizes, options.concurrency))
    report.save(options.json)


if __name__ == "__main__":
    main()
