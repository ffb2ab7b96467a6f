"""Training steps on the spheres against plain torch, gradient accumulation and DDP.

python benchmarks/bench_training.py [--quick] [--json PATH] [--concurrency N] [--models NAME ...]
                                    [--workers-sweep 1,2,4,...] [--compile] [--chart PATH]
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from common import Ratio, Report, Row, Section, arguments, best_of, duration, race
from contestants import (
    DDP,
    EAGER,
    FEWER,
    FORWARD_BACKWARD,
    OURS,
    PEERS,
    PLAIN,
    REPRODUCIBLE,
    TUNED,
    Setup,
)
from crews import Crew, Crews
from models import ZOO, Task

import torch_spheres as ts

COMPILED_WAYS = (EAGER, PLAIN, TUNED, REPRODUCIBLE, FORWARD_BACKWARD)  # most compile for minutes
BEST_SHARDS = "reproducible=True with the best number of shards"
WAYS = (*(way for way in PEERS if way != EAGER), *OURS)
TOLERANCE = 1e-3  # of losses and gradients, between contestants
PATIENCE = 150  # warm-up steps, after which a way is measured whether it is ready or not


@dataclass(frozen=True)
class Sizes:
    rounds: tuple[int, int]
    """Least and most; fewer where steps are slow."""
    row_seconds: float
    """What a row's rounds may take, if the least number of rounds does."""
    sample_seconds: float
    """What a sample takes at least: as many steps as that needs."""
    large_models: int | None
    """How many models are trained on large batches; None means all."""


SIZES = ("small", "large")
FULL = Sizes((3, 7), 35.0, 0.25, None)
QUICK = Sizes((2, 2), 0.0, 0.0, 2)


@dataclass
class Outcome:
    """One model at one batch size: what was measured and noted, each under its `key`."""

    task: Task
    rows: int
    seconds: dict[str, list[float]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def of(self, workers: int) -> dict[str, list[float]]:
        """Each way's seconds of a step in each round; without the ways that are missing."""
        keys = {way: key(way, workers) for way in (*PEERS, *OURS)}
        return {way: self.seconds[k] for way, k in keys.items() if k in self.seconds}


def key(way: str, workers: int) -> str:
    return f"{way}, {counted(workers)}"


def counted(workers: int) -> str:
    return "1 worker" if workers == 1 else f"{workers} workers"


def joined(*notes: str) -> str:
    return "; ".join(filter(None, notes))


# ---- one model at one batch size ----


def measure(
    task: Task, rows: int, workers: Sequence[int], sizes: Sizes, compiled: bool = False
) -> Outcome:
    outcome = Outcome(task, rows)
    setups = [
        Setup(way, task.name, rows, n, compiled=compiled)
        for n in workers
        for way in (COMPILED_WAYS if compiled else WAYS)
    ]
    with Crews(setups) as crews:
        outcome.missing = {key(s.way, s.workers): why for s, why in crews.missing.items()}
        wrong = verify(crews.there)
        assert compiled or not wrong, f"{wrong}: nothing is worth timing"
        named = {key(crew.setup.way, crew.setup.workers): crew for crew in crews.there}
        once = []  # seconds of a step, roughly
        for name, crew in named.items():
            seconds, note = warm_up(crew)
            outcome.notes[name] = joined(note, wrong.get(name, ""))
            once.append(seconds)
        steps = max(1, math.ceil(sizes.sample_seconds / statistics.median(once)))
        least, most = sizes.rounds
        rounds = int(sizes.row_seconds / (steps * sum(once)))
        contestants = {name: partial(crew.ask, "run", steps) for name, crew in named.items()}
        outcome.seconds = race(contestants, min(most, max(least, rounds)))
    return outcome


def verify(crews: Sequence[Crew]) -> dict[str, str]:
    """What does not compute the first one's loss and gradient, up to rounding.

    (torch.compile has been seen to give a whole batch, cut into no shards, another gradient.)
    """
    wrong: dict[str, str] = {}
    first, *others = crews
    expected = first.ask("check")
    for crew in others:
        found = crew.ask("check")
        for a, b, what in zip(found, expected, ("loss", "gradient's norm"), strict=True):
            if not math.isclose(a, b, rel_tol=TOLERANCE):
                name = key(crew.setup.way, crew.setup.workers)
                wrong[name] = f"{what} is {a:.4g}, where {first.setup.way} has {b:.4g}"
    return wrong


def warm_up(crew: Crew) -> tuple[float, str]:
    """Steps until the contestant is at its best: the fastest one's seconds, what came of them."""
    seconds = []
    ready = False
    while not ready and len(seconds) < PATIENCE:
        start = time.perf_counter()
        ready = crew.ask("warm")
        seconds.append(time.perf_counter() - start)
    if crew.setup.way != TUNED:
        return min(seconds), ""
    plan = f"plan: {crew.ask('plan')}" if ready else f"still undecided after {PATIENCE} steps"
    return min(seconds), plan


# ---- tables ----


def table(outcomes: Sequence[Outcome], size: str, workers: int) -> Section:
    section = Section(
        f"{size} batches, {counted(workers)}: seconds of a training step",
        "time of the fastest of plain, accumulate and DDP / time of ours",
    )
    for outcome in outcomes:
        name = f"{outcome.task.name}, {outcome.rows} rows"
        samples = outcome.of(workers)
        notes = {way: outcome.notes.get(key(way, workers), "") for way in samples}
        peers = {way: samples[way] for way in PEERS if way in samples}
        best = best_of(peers, PEERS)
        section.samples |= {f"{name}: {way}": times for way, times in samples.items()}
        for way in peers:
            section.add(
                Row(
                    f"{name}: {way}",
                    median(peers[way]),
                    note=joined("fastest peer" if way == best else "", notes.get(way, "")),
                )
            )
        for way in OURS:
            if way not in samples:
                if why := outcome.missing.get(key(way, workers)):
                    section.add(Row(f"{name}: {way}", "not available", note=why))
                continue
            ratio = Ratio.of(peers[best], samples[way])
            against_ddp = "not measured"
            if DDP in peers:
                against_ddp = f"{Ratio.of(peers[DDP], samples[way]).median:.2f}"
            target = 0.97 if way == TUNED else None
            section.add(
                Row(
                    f"{name}: {way}",
                    median(samples[way]),
                    ratio,
                    "" if target is None else f">= {target:g}",
                    None if target is None else ratio.median >= target,
                    joined(f"DDP / ours {against_ddp}", notes[way]),
                )
            )
    return section


def median(seconds: Sequence[float]) -> str:
    return duration(statistics.median(seconds))


def summary(outcomes: dict[str, list[Outcome]], workers: int) -> Section:
    """Geometric means over rows, with the quartiles of the rows beside them."""
    section = Section(
        f"geometric means over the rows, {counted(workers)}",
        "time of the peer / time of ours; quartiles and least of the rows' medians",
    )
    every = [outcome for group in outcomes.values() for outcome in group]
    lines: list[tuple[str, Sequence[Outcome], str, str | None, float | None]] = [
        ("all rows", every, TUNED, None, 1.15),
        ("all rows", every, TUNED, DDP, 1.3),
        ("all rows", every, REPRODUCIBLE, None, None),
        ("all rows", every, BEST_SHARDS, None, 0.95),
        ("large batches", outcomes["large"], BEST_SHARDS, None, 1.0),
        ("all rows", every, FORWARD_BACKWARD, None, None),
        ("large batches", outcomes["large"], REPRODUCIBLE, DDP, 1.0),
        ("large batches", outcomes["large"], FORWARD_BACKWARD, DDP, None),
        ("small batches", outcomes["small"], REPRODUCIBLE, DDP, None),
    ]
    for rows, group, way, peer, target in lines:
        name = f"{way} against {peer or 'the fastest peer'}, {rows}"
        ratios = [advantage(outcome.of(workers), way, peer) for outcome in group]
        known = [ratio for ratio in ratios if ratio is not None]
        if not known:
            section.add(Row(name, "not available"))
            continue
        quartiles = Ratio.of(known, [1.0] * len(known))
        mean = math.exp(statistics.fmean(map(math.log, known)))
        section.add(
            Row(
                name,
                f"rows: {len(known)}",
                Ratio(mean, quartiles.low, quartiles.high),
                "" if target is None else f">= {target:g}",
                None if target is None else mean >= target,
                f"least {min(known):.2f}",
            )
        )
    return section


def advantage(samples: dict[str, list[float]], way: str, peer: str | None) -> float | None:
    """How many times as long as `way` the peer took, or the fastest peer."""
    if way == BEST_SHARDS:  # whoever trains can choose, by `suggest_shards`
        way = best_of(samples, (REPRODUCIBLE, *FEWER))
    if way not in samples or (peer is not None and peer not in samples):
        return None
    return Ratio.of(samples[peer or best_of(samples, PEERS)], samples[way]).median


def scaling(outcomes: Sequence[Outcome], size: str, workers: Sequence[int]) -> Section:
    fewest, *more = workers
    section = Section(
        f"{size} batches: speed-up of each way with more workers",
        f"time with {counted(fewest)} / time with {counted(more[-1])}",
    )
    for outcome in outcomes:
        for way in WAYS:
            if way not in outcome.of(fewest):
                continue
            base = outcome.of(fewest)[way]
            ratios = {count: Ratio.of(base, outcome.of(count)[way]) for count in more}
            section.add(
                Row(
                    f"{outcome.task.name}, {outcome.rows} rows: {way}",
                    f"{median(base)}, {counted(fewest)}",
                    ratios[more[-1]],
                    note=", ".join(f"{count}: {r.median:.2f}" for count, r in ratios.items()),
                )
            )
    return section


# ---- settings ----


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--models", nargs="+", metavar="NAME", help=f"parts of names of {[t.name for t in ZOO]}"
    )
    parser.add_argument(
        "--workers-sweep",
        metavar="N,N,...",
        type=lambda text: [int(part) for part in text.split(",")],
        help="measure with so many workers each; takes a multiple of the time and of the memory",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile all models, and measure plain torch and the main ways; takes an hour",
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=SIZES, help="of the batches")
    parser.add_argument("--chart", type=Path, help="draw a picture; needs matplotlib")


def chosen(names: Sequence[str] | None) -> list[Task]:
    wanted = [name.lower() for name in names or [""]]
    for name in wanted:
        if not any(name in task.name.lower() for task in ZOO):
            raise SystemExit(f"--models: {name} is in none of {[task.name for task in ZOO]}")
    return [task for task in ZOO if any(name in task.name.lower() for name in wanted)]


def counts(options: argparse.Namespace, report: Report) -> list[int]:
    """The numbers of workers to measure with, ascending."""
    if options.workers_sweep is None:
        return [options.concurrency]
    wanted = sorted({1, *options.workers_sweep})  # speed-ups are over one
    cores = ts.usable_cores()
    skipped = [count for count in wanted if count > cores]
    if skipped:
        report.console.print(f"[yellow]skipped, with {cores} cores: {skipped} workers[/]")
    return [count for count in wanted if 1 <= count <= cores]


def main() -> None:
    options = arguments("training", "Training steps against plain torch and DDP.", add_options)
    sizes = QUICK if options.quick else FULL
    tasks = chosen(options.models)
    settings = {
        "concurrency": options.concurrency,
        "quick": options.quick,
        "models": [task.name for task in tasks],
        "compile": options.compile,
        **vars(sizes),
    }
    report = Report("bench_training", settings)
    workers = counts(options, report)
    settings["workers"] = workers
    outcomes: dict[str, list[Outcome]] = {"small": [], "large": []}
    for size, group in outcomes.items():
        if size not in options.sizes:
            continue
        for task in tasks if size == "small" else tasks[: sizes.large_models]:
            rows = getattr(task, size)
            if options.quick:  # tiny, but something for everyone
                rows = {"small": 1, "large": 2}[size] * -(-24 // workers[-1]) * workers[-1]
            start = time.monotonic()
            group.append(measure(task, rows, workers, sizes, options.compile))
            rounds = len(next(iter(group[-1].seconds.values())))
            took = time.monotonic() - start
            report.console.print(f"{task.name}, {rows} rows: {rounds} rounds, {took:.0f} s in all")
        for count in workers:
            report.add(table(group, size, count))
        if len(workers) > 1:
            report.add(scaling(group, size, workers))
    for count in workers:
        report.add(summary(outcomes, count))
    report.save(options.json)
    if options.chart is not None:
        from chart import draw

        draw([asdict(section) for section in report.sections], options.chart)
        report.console.print(f"chart in {options.chart}")


if __name__ == "__main__":
    main()
