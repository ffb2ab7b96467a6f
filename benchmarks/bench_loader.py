"""`wrap(loader)` against the DataLoader that it was given, SPDL and torchdata.nodes.

python benchmarks/bench_loader.py [--quick] [--json PATH] [--concurrency N] [--chart PATH]
                                  [--only {tensors,waiting,jpegs,python,mnist,shared} ...]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import statistics
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from common import Ratio, Report, Row, Section, arguments, best_of, compare, race
from crews import Crews
from loader_contestants import (
    FORKSERVER,
    NO_WORKERS,
    NODES,
    OURS,
    OURS_NO_WORKERS,
    OURS_PROCESS,
    PERSISTENT,
    PLAIN,
    PREFETCH,
    PROCESSES,
    SPDL,
    WHOLE,
    Epoch,
    setup,
)
from loader_datasets import (
    CROP,
    JPEGS,
    LOOP,
    MNIST,
    MNIST_WHOLE,
    PYTHON,
    SIDE,
    SMALL_TENSORS,
    TENSORS,
    TURNED,
    WAIT,
    WAITING,
    WORKLOADS,
)  # fmt: skip
from serving import kibibytes

SCRIPT = "loader_contestants.py"
MIB = 1 << 20
PARTS = ("tensors", "waiting", "jpegs", "python", "mnist", "shared")
LOOK = 0.01  # seconds between two looks at memory


@dataclass(frozen=True)
class Sizes:
    rounds: int
    tensors: int
    jpegs: int
    python: int
    mnist: int
    first_times: int
    memory_repeats: int
    memory_jpegs: int
    waiting: tuple[int, ...]
    """Numbers of workers, each of which loads eight batches."""


FULL = Sizes(7, 60_000, 1024, 2048, 4000, 3, 2, 1024, (8, 16, 32, 64))
QUICK = Sizes(2, 6_000, 96, 256, 480, 1, 1, 96, (8,))


@dataclass(frozen=True)
class Run:
    """What all sections are measured with."""

    sizes: Sizes
    workers: int
    concurrency: int

    def ask(
        self, workload: str, samples: int, names: Sequence[str], command: str, *more: object
    ) -> Answers:
        """All contestants' answers in each round, in processes of their own."""
        setups = {
            setup(name, workload, samples, self.workers, self.concurrency): name for name in names
        }
        with Crews(list(setups), script=SCRIPT) as crews:
            asked = {setups[crew.setup]: crew for crew in crews.there}
            calls = {name: partial(crew.ask, command, *more) for name, crew in asked.items()}
            return Answers(
                race(calls, self.sizes.rounds),
                {name: how for name, crew in asked.items() if (how := crew.ask("how"))},
                {setups[absent]: why for absent, why in crews.missing.items()},
            )


@dataclass(frozen=True)
class Answers:
    rounds: dict[str, list[Any]]
    notes: dict[str, str]
    missing: dict[str, str]

    def seconds(self) -> dict[str, list[float]]:
        """Of answers that are epochs, which have to be the same work."""
        epochs = {name: [Epoch(**e) for e in answers] for name, answers in self.rounds.items()}
        work = {epoch.work for those in epochs.values() for epoch in those}
        assert len(work) == 1, f"not all contestants did the same: {work}"
        assert next(iter(work))[0] > 0
        # Persistent workers draw no seed at their second epoch, which makes other shuffles of it.
        alike = [those for name, those in epochs.items() if name not in (PERSISTENT, PREFETCH)]
        for round_ in zip(*alike, strict=True):
            losses = [epoch.loss for epoch in round_]
            assert max(losses) - min(losses) < 0.01, losses
        return {name: [epoch.seconds for epoch in those] for name, those in epochs.items()}


def fill(
    section: Section,
    answers: Answers,
    seconds: Mapping[str, Sequence[float]],
    ours: str,
    targets: Mapping[str, float],
    samples: int = 0,
) -> None:
    """A row for each contestant; its note says how many samples a second it loaded, and how."""
    notes = {}
    for name, times in seconds.items():
        rate = f"{samples / statistics.median(times):,.0f} samples/s" if samples else ""
        notes[name] = "; ".join(part for part in (rate, answers.notes.get(name)) if part)
    compare(section, seconds, ours, targets, notes)
    for name, why in answers.missing.items():
        section.add(Row(name, "skipped", note=why))


def in_memory(run: Run, workload: str = TENSORS) -> Section:
    n, batch = run.sizes.tensors, WORKLOADS[workload].batch
    section = Section(
        f"{workload}, steady: an epoch of {n:,} x 784 float32 in memory, shuffled, "
        f"batches of {batch}, {run.workers} workers",
        f"time of the peer / time of {OURS_NO_WORKERS}; the target is for the best DataLoader",
    )
    names = [OURS_NO_WORKERS, OURS, *PLAIN]
    if workload == TENSORS:
        names += [WHOLE, SPDL, NODES]
    answers = run.ask(workload, n, names, "epoch")
    seconds = answers.seconds()
    fill(section, answers, seconds, OURS_NO_WORKERS, {best_of(seconds, PLAIN): 8}, n)
    return section


def waiting(run: Run, workers: int) -> Section:
    batches, batch = 8, WORKLOADS[WAITING].batch  # of a worker; samples
    n, alone = workers * batches * batch, batches * batch * WAIT
    section = Section(
        f"Waiting, {workers} workers: an epoch of {n:,} samples that take {WAIT * 1000:.0f} ms to "
        f"come, batches of {batch}: {alone * 1000:.0f} ms of waiting",
        f"time of the peer / time of {OURS}; {PROCESSES} start anew with each epoch",
    )
    names = [OURS, PROCESSES, PERSISTENT]
    answers = replace(run, workers=workers).ask(WAITING, n, names, "epoch")
    fill(section, answers, answers.seconds(), OURS, {PROCESSES: 1.5, PERSISTENT: 1}, n)
    return section


def decoding(run: Run) -> Section:
    n, batch = run.sizes.jpegs, WORKLOADS[JPEGS].batch
    section = Section(
        f"JPEGs, steady: an epoch of {n:,} of {SIDE} x {SIDE}, decoded and resized to {CROP} x "
        f"{CROP}, batches of {batch}, {run.workers} workers",
        f"time of the peer / time of {OURS}; no target",
    )
    names = [OURS, OURS_NO_WORKERS, *PLAIN, SPDL, NODES]
    answers = run.ask(JPEGS, n, names, "epoch")
    fill(section, answers, answers.seconds(), OURS, {}, n)
    return section


def first_batch(run: Run, workload: str, samples: int) -> Section:
    names = [OURS, OURS_NO_WORKERS, NO_WORKERS, PROCESSES, FORKSERVER, SPDL, NODES]
    if workload == TENSORS:
        names.remove(FORKSERVER)  # it would measure how long pickling the dataset takes
    section = Section(
        f"{workload}, first batch: from iter() until the first of a new iterator is there, "
        f"batches of {WORKLOADS[workload].batch}, {run.workers} workers",
        f"time of the peer / time of {OURS}",
    )
    answers = run.ask(workload, samples, names, "first", run.sizes.first_times)
    fill(section, answers, answers.rounds, OURS, {PROCESSES: 10})
    for i, row in enumerate(section.rows):
        if row.name == FORKSERVER:
            section.rows[i] = Row(row.name, row.value, row.ratio, note="Python 3.14's default")
    return section


def in_python(run: Run) -> Section:
    n, batch = run.sizes.python, WORKLOADS[PYTHON].batch
    section = Section(
        f"Pure Python: an epoch of {n:,} samples, a loop of {LOOP:,} rounds each, batches of "
        f"{batch}, {run.workers} workers",
        f"time of the peer / time of {OURS}; no target: with a GIL, threads take turns",
    )
    names = [OURS, OURS_NO_WORKERS, OURS_PROCESS, NO_WORKERS, PERSISTENT, SPDL, NODES]
    answers = run.ask(PYTHON, n, names, "epoch")
    fill(section, answers, answers.seconds(), OURS, {}, n)
    return section


def training(run: Run, workload: str) -> Section:
    n, batch = run.sizes.mnist, WORKLOADS[workload].batch
    how = {
        MNIST: "its TensorDataset",
        MNIST_WHOLE: "a dataset with __getitems__, written by hand",
    }
    section = Section(
        f"{workload}: an epoch of examples/mnist.py on the plain model, {n:,} digits, "
        f"batches of {batch}; {how[workload]}",
        f"time of the peer / time of {OURS_NO_WORKERS}; no target",
    )
    names = [OURS_NO_WORKERS, OURS, NO_WORKERS, PERSISTENT]
    answers = run.ask(workload, n, names, "train")
    fill(section, answers, answers.seconds(), OURS_NO_WORKERS, {}, n)
    return section


def shared(run: Run) -> Section:
    n, batch = run.sizes.mnist, WORKLOADS[TURNED].batch
    section = Section(
        f"Shared spheres: an epoch of examples/mnist.py with SphereParallel, {n:,} digits that "
        f"Pillow turns, batches of {batch}; the loader's workers beside the model's shards",
        f"time of the peer / time of {OURS}",
    )
    names = [OURS, OURS_NO_WORKERS, NO_WORKERS, PROCESSES, PERSISTENT]
    answers = run.ask(TURNED, n, names, "train_on_spheres")
    fill(section, answers, answers.seconds(), OURS, {PERSISTENT: 1}, n)
    return section


# ---- memory ----


def family(pid: int) -> list[int]:
    """The process, its children, theirs and so on."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*"):
            with suppress(OSError):
                found += map(int, (task / "children").read_text(encoding="ascii").split())
    return found


def resident(pid: int) -> float:
    """Bytes of a process and its children, with what they share counted once.

    Of the pages of files, libraries for the most part, all have the same; the kernel's share of
    them (PSS) would depend on who else has torch loaded. Pages that were there before a fork, and
    memory that is shared to hand batches over, are nobody else's, and PSS is right.
    """
    own, files = 0, 0
    for member in family(pid):
        with suppress(OSError, KeyError):  # it has ended
            parts = kibibytes(f"/proc/{member}/smaps_rollup")
            own += parts["Pss_Anon"] + parts["Pss_Shmem"]
            files = max(files, kibibytes(f"/proc/{member}/status")["RssFile"])
    return own + files


class Watch:
    """The most that was resident inside the block."""

    def __init__(self, pid: int) -> None:
        self.pid, self.peak = pid, 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self._over.wait(LOOK):
            self.peak = max(self.peak, resident(self.pid))

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()


def peak(run: Run, name: str) -> tuple[float, float, tuple[int, ...]]:
    """Bytes before the first epoch, the most during the first two, and what an epoch was."""
    one = setup(name, JPEGS, run.sizes.memory_jpegs, run.workers, run.concurrency)
    with Crews([one], apart=True, script=SCRIPT) as crews:
        (crew,), (pid,) = crews.there, crews.pids
        before = resident(pid)
        with Watch(pid) as watch:
            epochs = [Epoch(**crew.ask("epoch")) for _ in range(2)]
        return before, watch.peak, epochs[0].work


def memory(run: Run) -> Section:
    names = [OURS, OURS_NO_WORKERS, NO_WORKERS, PROCESSES, PERSISTENT, FORKSERVER]
    section = Section(
        f"JPEGs, memory: resident at the peak of two epochs of {run.sizes.memory_jpegs:,}, "
        f"{run.workers} workers, with all child processes",
        f"memory of the peer / memory of {OURS}",
    )
    peaks: dict[str, list[float]] = {name: [] for name in names}
    before: dict[str, list[float]] = {name: [] for name in names}
    work = set()
    for _ in range(run.sizes.memory_repeats):
        for name in names:
            start, most, epoch = peak(run, name)
            peaks[name].append(most)
            before[name].append(start)
            work.add(epoch)
    assert len(work) == 1, f"not all contestants did the same: {work}"
    section.samples = {name: list(values) for name, values in peaks.items()}
    for name, values in peaks.items():
        most, start = (statistics.median(found[name]) / MIB for found in (peaks, before))
        ratio = None if name == OURS else Ratio.of(values, peaks[OURS])
        aim = 2 if name == PROCESSES else None
        met = None if aim is None or ratio is None else ratio.median >= aim
        note = f"{most - start:,.0f} MiB more than before the epochs"
        target = "" if aim is None else f">= {aim}"
        section.add(Row(name, f"{most:,.0f} MiB", ratio, target, met, note))
    return section


# ---- all of it ----


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--chart", type=Path, help="draw a picture; needs matplotlib")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="default: all")


def main() -> None:
    options = arguments("loader", "Wrapped loaders against DataLoader and others.", add_options)
    sizes = QUICK if options.quick else FULL
    run = Run(sizes, max(2, options.concurrency), options.concurrency)
    settings = {
        "concurrency": options.concurrency,
        "workers": run.workers,
        "quick": options.quick,
        **vars(sizes),
    }
    report = Report("bench_loader", settings)
    for package in ("pillow", "spdl-core", "torchdata"):
        report.environment[package] = version(package)
        report.console.print(f"{package}: {report.environment[package]}")
    if "tensors" in options.only:
        report.add(in_memory(run))
        report.add(in_memory(run, SMALL_TENSORS))
        report.add(first_batch(run, TENSORS, sizes.tensors))
    if "waiting" in options.only:
        for workers in sizes.waiting:
            report.add(waiting(run, workers))
    if "jpegs" in options.only and report.environment["pillow"] == "not installed":
        report.console.print("[yellow]JPEGs: skipped, pillow is not installed[/]")
    elif "jpegs" in options.only:
        report.add(decoding(run))
        report.add(first_batch(run, JPEGS, sizes.jpegs))
        report.add(memory(run))
    if "python" in options.only:
        report.add(in_python(run))
    if "mnist" in options.only:
        report.add(training(run, MNIST))
        report.add(training(run, MNIST_WHOLE))
    if "shared" in options.only:
        report.add(shared(run))
    report.save(options.json)
    if options.chart is not None:
        from loader_chart import draw

        draw([asdict(section) for section in report.sections], options.chart)
        report.console.print(f"chart in {options.chart}")


if __name__ == "__main__":
    main()
