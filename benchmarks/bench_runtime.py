"""The C++ runtime against ThreadPoolExecutor and oneTBB.

python benchmarks/bench_runtime.py [--quick] [--json PATH] [--concurrency N]
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

import tbb
import torch
from common import (
    Ratio,
    Report,
    Row,
    Section,
    Tally,
    arguments,
    compare,
    duration,
    nothing,
    race,
    timed,
)
from torch import nn

import torch_spheres as ts
from torch_spheres import KissingSpheres

# What a thief may take while the rest of the batch runs, for each of the ways to call oneTBB.
TBB_GRANULARITY = {
    "task_group": "each item is a task of its own",
    "simple_1": "parallel_for, simple_partitioner, grain 1: each item is a task of its own",
    "simple_64": "parallel_for, simple_partitioner, grain 64: pieces of 32 to 64 items",
    "parallel_for_each": "ranges, split when threads ask; no item of a running range",
    "auto": "parallel_for, auto_partitioner: ranges, split when threads ask",
    "static": "parallel_for, static_partitioner: one range a thread, nothing to steal",
}
OURS_GRANULARITY = "any item that is not in a running chunk of at most 256"
TBB_TARGETS = {"task_group": 18.0, "simple_1": 18.0, "parallel_for_each": 1.0, "auto": 1.0}


@dataclass(frozen=True)
class Sizes:
    rounds: int
    python_items: int
    native_items: int
    forks: int
    idle_seconds: float
    levels: tuple[int, ...]


FULL = Sizes(11, 100_000, 1_000_000, 200, 5.0, (1, 2, 3, 4))
QUICK = Sizes(3, 2_000, 20_000, 10, 0.2, (1, 2, 4))


def identity(x: int) -> int:
    return x


def python_items(spheres: KissingSpheres, sizes: Sizes) -> Section:
    n, workers = sizes.python_items, spheres.concurrency
    section = Section(
        f"map of a trivial Python function over {n:,} items, {workers} workers",
        "time of the peer / time of spheres.map",
    )
    items = range(n)
    with ThreadPoolExecutor(workers) as executor, ThreadPool(workers) as pool:
        assert spheres.map(identity, items) == list(items)
        samples = race(
            {
                "spheres.map": lambda: timed(lambda: spheres.map(identity, items)),
                "ThreadPoolExecutor.map": lambda: timed(
                    lambda: list(executor.map(identity, items))
                ),
                "ThreadPool.map": lambda: timed(lambda: pool.map(identity, items)),
                "map, no threads": lambda: timed(lambda: list(map(identity, items))),
            },
            sizes.rounds,
        )
    notes = {
        "ThreadPoolExecutor.map": "its chunksize is for processes only; it has no effect here",
        "ThreadPool.map": "of multiprocessing.pool; cuts the items into chunks, its own default",
        "map, no threads": "the floor: what the calls alone cost",
    }
    compare(section, samples, "spheres.map", {"ThreadPoolExecutor.map": 250}, notes)
    return section


def native_items(spheres: KissingSpheres, peer: tbb.Peer | None, sizes: Sizes) -> Section:
    n = sizes.native_items
    section = Section(
        f"{n:,} empty native items, each a call through a pointer, {spheres.concurrency} threads",
        "throughput of spheres / throughput of oneTBB",
    )
    tally = Tally()
    spheres.distribute_work(range(n), tally.function()).wait()
    assert (tally.count, tally.sum) == (n, n * (n - 1) // 2)

    noop, items = nothing(), range(n)
    contestants: dict[str, Callable[[], float]] = {
        "spheres": lambda: timed(lambda: spheres.distribute_work(items, noop).wait())
    }
    if peer is not None:
        for variant in TBB_GRANULARITY:
            contestants[f"oneTBB {variant}"] = partial(peer.time, variant, n)
    samples = race(contestants, 2 * sizes.rounds)
    notes = {f"oneTBB {name}": what for name, what in TBB_GRANULARITY.items()}
    notes["spheres"] = OURS_GRANULARITY
    targets = {f"oneTBB {name}": target for name, target in TBB_TARGETS.items()}
    compare(section, samples, "spheres", targets, notes)
    if peer is None:
        section.add(Row("oneTBB", "skipped", note="not installed, or no compiler"))
    return section


def fork_join(
    spheres: KissingSpheres, peer: tbb.Peer | None, sizes: Sizes, pause_us: int
) -> Section:
    rest = f"after {pause_us / 1000:g} ms of rest" if pause_us else "one right after the other"
    section = Section(
        f"fork-join of 12 empty items, {spheres.concurrency} threads, {rest}",
        "median time of the peer / median time of spheres, in each round",
    )
    most = {} if pause_us else {"spheres, native": 5, "spheres.map(abs)": 15}  # microseconds

    def repeat(call: Callable[[], object]) -> list[float]:
        times = []
        for _ in range(sizes.forks):
            if pause_us:
                time.sleep(pause_us / 1e6)
            times.append(timed(call))
        return times

    noop, items = nothing(), range(12)
    with ThreadPoolExecutor(spheres.concurrency) as executor:
        contestants: dict[str, Callable[[], list[float]]] = {
            "spheres, native": lambda: repeat(lambda: spheres.distribute_work(items, noop).wait()),
            "spheres.map(abs)": lambda: repeat(lambda: spheres.map(abs, items)),
            "ThreadPoolExecutor.map(abs)": lambda: repeat(lambda: list(executor.map(abs, items))),
        }
        if peer is not None:
            for v in ("simple_1", "task_group"):
                contestants[f"oneTBB {v}"] = partial(peer.times, v, 12, sizes.forks, pause_us)
        samples = race(contestants, sizes.rounds)
    medians = {name: [statistics.median(r) for r in runs] for name, runs in samples.items()}
    for name, runs in samples.items():
        times = sorted(t for run in runs for t in run)
        section.samples[name] = times
        against = "spheres.map(abs)" if name.endswith("(abs)") else "spheres, native"
        micros = statistics.median(times) * 1e6
        ratio = None if name == against else Ratio.of(medians[name], medians[against])
        target, met = "", None
        if name in most:
            target, met = f"<= {most[name]} µs", micros <= most[name]
        elif pause_us and name == "oneTBB simple_1" and ratio is not None:
            target, met = ">= 0.5", ratio.median >= 0.5
        section.add(
            Row(
                name,
                f"{micros:.1f} µs",
                ratio,
                target,
                met,
                note=f"90 % within {times[int(0.9 * len(times))] * 1e6:.1f} µs"
                + ("" if name == against else f"; against {against}"),
            )
        )
    return section


def sleeps(spheres: KissingSpheres, sizes: Sizes) -> Section:
    """How often a thread goes to sleep in a fork-join; Linux counts them for each thread."""
    section = Section(f"fork-join of 12 empty native items, {spheres.concurrency} threads: sleeps")
    noop, items, forks = nothing(), range(12), 10 * sizes.forks

    def counts() -> dict[str, int]:
        found = {}
        for status in Path("/proc/self/task").glob("*/status"):
            fields = dict(line.split(":\t", 1) for line in status.read_text().splitlines())
            who = "the caller" if fields["Pid"] == fields["Tgid"] else fields["Name"]
            found[who] = int(fields["voluntary_ctxt_switches"])
        return {k: n for k, n in found.items() if k == "the caller" or k.startswith("sphere")}

    for pause_us in (0, 1000):
        before = counts()
        for _ in range(forks):
            if pause_us:
                time.sleep(pause_us / 1e6)
            spheres.distribute_work(items, noop).wait()
        slept = {k: (n - before.get(k, 0)) / forks for k, n in counts().items()}
        slept["the caller"] -= bool(pause_us)  # its own rest
        rest = f"after {pause_us / 1000:g} ms of rest" if pause_us else "one after the other"
        each = ", ".join(f"{name} {n:.2f}" for name, n in slept.items() if n >= 0.005)
        section.add(Row(rest, f"{sum(slept.values()):.2f}", note=each))
        section.samples[rest] = [slept]
    return section


def life(sizes: Sizes) -> Section:
    section = Section("start and stop together, and what the spheres cost when idle")

    def start_stop(levels: int) -> tuple[float, float]:
        spheres = KissingSpheres(levels)
        return timed(spheres.start), timed(spheres.stop)

    samples = race(
        {f"{levels}": partial(start_stop, levels) for levels in sizes.levels}, sizes.rounds
    )
    for levels in sizes.levels:
        times = samples[f"{levels}"]
        total = KissingSpheres(levels).total_spheres
        median = statistics.median(a + b for a, b in times)
        section.samples[f"start+stop of {total}"] = [list(pair) for pair in times]
        start, stop = (statistics.median(part) for part in zip(*times, strict=True))
        worst = max(a + b for a, b in times)
        section.add(
            Row(
                "1 sphere" if total == 1 else f"{total} spheres",
                duration(median),
                None,
                "< 150 ms" if levels == 4 else "",
                median < 0.15 if levels == 4 else None,
                f"start {duration(start)}, stop {duration(stop)}; slowest {duration(worst)}",
            )
        )
    spawn = multiprocessing.get_context("spawn")  # a fresh process: nothing else in its memory
    with ProcessPoolExecutor(1, mp_context=spawn) as process:
        idle, used, percent = process.submit(footprint, 4, sizes.idle_seconds).result()
    section.samples |= {"added MiB": [idle, used], "idle CPU %": [percent]}
    mib = "resident memory of 1885 spheres"
    section.add(Row(f"{mib}, started", f"{idle:.1f} MiB", None, "< 80 MiB", idle < 80))
    note = "a map, a native batch and an epoch that woke every sphere"
    section.add(Row(f"{mib}, used", f"{used:.1f} MiB", None, "< 80 MiB", used < 80, note))
    note = f"CPU time of the whole process over {sizes.idle_seconds:g} s"
    section.add(Row("idle", f"{percent:.3f} % CPU", None, "< 0.1 %", percent < 0.1, note))
    return section


def footprint(levels: int, seconds: float) -> tuple[float, float, float]:
    """MiB added by starting spheres, the same after using them, and % CPU when idle."""
    before = resident_mib()
    with KissingSpheres(levels) as spheres:
        started = resident_mib() - before
        spheres.map(identity, range(10_000))
        spheres.distribute_work(range(10_000), nothing())
        spheres.epoch()
        used = resident_mib() - before
        time.sleep(1)  # for the last sphere to fall asleep
        cpu = time.process_time()
        time.sleep(seconds)
        percent = 100 * (time.process_time() - cpu) / seconds
    return started, used, percent


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def stealing(sizes: Sizes) -> Section:
    slow, items = 0.02, range(48)

    def uneven(item: int) -> None:
        if item % 12 == 0:  # all of these belong to the first of twelve spheres
            time.sleep(slow)

    total = slow * sum(item % 12 == 0 for item in items)
    section = Section(
        f"stealing: 48 items, of which the first sphere's four sleep {slow * 1e3:g} ms each",
        "time that the first sphere would need alone / wall time",
    )
    with ExitStack() as stack:
        systems = {c: stack.enter_context(KissingSpheres(2, concurrency=c)) for c in (1, 2, 12)}
        given = {c: spheres.stats()[1].items_given for c, spheres in systems.items()}
        calls = {f"{c}": partial(spheres.map, uneven, items) for c, spheres in systems.items()}
        walls = race({c: partial(timed, call) for c, call in calls.items()}, sizes.rounds)
        for c, spheres in systems.items():
            seconds = walls[f"{c}"]
            section.samples[f"concurrency={c}"] = seconds
            stats = spheres.stats()
            taken = (stats[1].items_given - given[c]) / (sizes.rounds + 1)
            section.add(
                Row(
                    f"concurrency={c}",
                    duration(statistics.median(seconds)),
                    Ratio.of([total] * len(seconds), seconds),
                    note=f"{taken:.1f} of the first sphere's 4 items run by siblings, on average",
                )
            )
    return section


def training_step(spheres: KissingSpheres, sizes: Sizes) -> Section:
    """The same twelve shards, their gradients summed, on spheres and on two bare threads."""
    section = Section(
        f"a training step of an MLP 784-128-10, 768 rows in 12 shards, {spheres.concurrency} cores",
        "time of spheres / time of bare threads that do the same",
    )
    x, y = torch.randn(768, 784), torch.randint(0, 10, (768,))
    loss = nn.functional.cross_entropy
    bare, wrapped = (
        nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10)) for _ in range(2)
    )
    parallel = ts.SphereParallel(wrapped, spheres)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (bare, wrapped)]
    parameters = list(bare.parameters())
    shards = list(zip(torch.tensor_split(x, 12), torch.tensor_split(y, 12), strict=True))

    def some(first: int) -> list[tuple[torch.Tensor, ...]]:
        return [
            torch.autograd.grad(loss(bare(rows), labels) * (len(rows) / len(x)), parameters)
            for rows, labels in shards[first :: spheres.concurrency]
        ]

    def on_threads() -> None:
        parts = list(executor.map(some, range(spheres.concurrency)))
        for parameter, *grads in zip(parameters, *itertools.chain(*parts), strict=True):
            parameter.grad = torch.stack(grads).sum(0)
        optimizers[0].step()
        optimizers[0].zero_grad()

    def on_spheres() -> None:
        parallel.forward_backward(loss, x, y)
        optimizers[1].step()
        optimizers[1].zero_grad()

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with ThreadPoolExecutor(spheres.concurrency) as executor:
        samples = race(
            {"bare threads": lambda: timed(on_threads), "spheres": lambda: timed(on_spheres)},
            5 * sizes.rounds,
        )
    torch.set_num_threads(threads)
    section.samples |= samples
    ratio = Ratio.of(samples["spheres"], samples["bare threads"])
    for name, seconds in samples.items():
        value = duration(statistics.median(seconds))
        if name == "spheres":
            section.add(Row(name, value, ratio, "<= 1.15", ratio.median <= 1.15))
        else:
            section.add(Row(name, value, note="an executor's; sums in any order"))
    return section


def main() -> None:
    options = arguments("runtime", "The runtime against ThreadPoolExecutor and oneTBB.")
    sizes = QUICK if options.quick else FULL
    settings = {"concurrency": options.concurrency, "quick": options.quick, **vars(sizes)}
    report = Report("bench_runtime", settings)
    with ExitStack() as stack:
        peer = None
        try:
            peer = stack.enter_context(tbb.peer(options.concurrency))
            report.environment["tbb"] = peer.version
        except tbb.NotInstalledError as reason:
            report.environment["tbb"] = f"skipped: {reason}"
        report.console.print(f"oneTBB: {report.environment['tbb']}", highlight=False)
        spheres = stack.enter_context(ts.KissingSpheres(2, concurrency=options.concurrency))
        report.add(python_items(spheres, sizes))
        report.add(native_items(spheres, peer, sizes))
        report.add(fork_join(spheres, peer, sizes, pause_us=0))
        report.add(fork_join(spheres, peer, sizes, pause_us=1000))
        if Path("/proc/self/task").exists():
            report.add(sleeps(spheres, sizes))
        report.add(training_step(spheres, sizes))
    report.add(life(sizes))
    report.add(stealing(sizes))
    report.save(options.json)


if __name__ == "__main__":
    main()
