"""What a trace costs while it is recorded, and what it costs when nobody records one.

python benchmarks/bench_trace.py [--quick] [--json PATH] [--concurrency N]
"""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from common import Ratio, Report, Row, Section, arguments, duration, nothing, race, timed
from torch import nn

import torch_spheres as ts
from torch_spheres import KissingSpheres

OFF, ON = "nobody traces", "traced"
NOTE_OFF = "one relaxed load and a branch for each chunk of items, message and change of state"


@dataclass(frozen=True)
class Sizes:
    rounds: int
    round_seconds: float  # of work that a round of timed items is to have
    tiny_items: int
    native_items: int
    steps: int


FULL = Sizes(81, 0.1, 20_000, 300_000, 4)
QUICK = Sizes(3, 0.01, 1_000, 10_000, 1)


def on_and_off(
    spheres: KissingSpheres, call: Callable[[], object], rounds: int
) -> dict[str, list[float]]:
    """Seconds of a call in each round, traced and not; begin and end of the trace do not count."""

    def traced() -> float:
        with spheres.trace():
            return timed(call)

    return race({OFF: lambda: timed(call), ON: traced}, rounds)


def cost(
    section: Section, name: str, samples: dict[str, list[float]], items: int, target: float | None
) -> None:
    """A row for the time without, and one for the ratio with, a trace."""
    for what in (OFF, ON):
        seconds = samples[what]
        section.samples[f"{name}, {what}"] = list(seconds)
        each = statistics.median(seconds) / items
        ratio, met = None, None
        if what == ON:
            ratio = Ratio.of(seconds, samples[OFF])
            met = None if target is None else ratio.median <= target
        section.add(
            Row(
                f"{name}, {what}",
                f"{each * 1e9:,.1f} ns" if each < 1e-6 else duration(each),
                ratio,
                "" if target is None or what == OFF else f"<= {target:g}",
                met,
            )
        )


def spinner(seconds: float) -> Callable[[int], object]:
    """Work without the GIL that takes about so long, in one thread of torch's."""
    torch.set_num_threads(1)
    for size in range(32, 2048, 16):
        a = torch.ones(size, size)
        call = lambda _, a=a: torch.mm(a, a)  # noqa: E731
        call(0)
        if min(timed(partial(call, 0)) for _ in range(5)) >= seconds:
            return call
    raise RuntimeError(f"no matrix product takes {seconds} s")


def long_items(spheres: KissingSpheres, sizes: Sizes) -> Section:
    section = Section(
        f"spheres.map of torch.mm, wall time / items, {spheres.concurrency} threads",
        "time with a trace / time without, in each round",
    )
    for name, seconds in (("1 ms", 1e-3), ("100 µs", 1e-4)):
        work = spinner(seconds)
        items = range(max(12, int(sizes.round_seconds / seconds)))
        samples = on_and_off(spheres, lambda w=work, i=items: spheres.map(w, i), sizes.rounds)
        cost(section, f"{name} items", samples, len(items), 1.02 if name == "1 ms" else None)
    return section


def short_items(spheres: KissingSpheres, sizes: Sizes) -> Section:
    section = Section(
        f"items that do nothing, wall time / items, {spheres.concurrency} threads",
        "time with a trace / time without, in each round",
    )
    python, native = range(sizes.tiny_items), range(sizes.native_items)
    noop = nothing()
    calls = {
        "Python items": (lambda: spheres.map(abs, python), len(python)),
        "native items": (lambda: spheres.distribute_work(native, noop).wait(), len(native)),
    }
    for name, (call, items) in calls.items():
        samples = on_and_off(spheres, call, sizes.rounds)
        cost(section, name, samples, items, None)
        more = [1e9 * (on - off) / items for on, off in zip(samples[ON], samples[OFF], strict=True)]
        # Of a thread's time, if they do not take turns at it.
        share = statistics.median(more) * spheres.concurrency / 1e6
        section.add(
            Row(
                f"{name}, what a trace adds",
                f"{statistics.median(more):,.1f} ns",
                note=f"at most {100 * share:.3f} % of an item of 1 ms",
            )
        )
    return section


def training(spheres: KissingSpheres, sizes: Sizes) -> Section:
    section = Section(
        f"a training step of a small CNN, 192 images in 12 shards, {spheres.concurrency} threads",
        "time with a trace / time without, in each round",
    )
    model = ts.SphereParallel(
        nn.Sequential(
            nn.Conv2d(1, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2704, 10)
        ),
        spheres,
    )
    x, y = torch.randn(192, 1, 28, 28), torch.randint(0, 10, (192,))
    criterion = nn.CrossEntropyLoss()
    # Whether this model is worth it is not the question here.
    warnings.filterwarnings("ignore", message="the shards of this model are so small")

    def steps() -> None:
        for _ in range(sizes.steps):
            criterion(model(x), y).backward()

    samples = on_and_off(spheres, steps, sizes.rounds)
    cost(section, "step", samples, sizes.steps, 1.02)
    return section


def afterwards(spheres: KissingSpheres, sizes: Sizes) -> Section:
    section = Section("before and after: begin, end (and read), save")
    start = time.perf_counter()
    with spheres.trace() as trace:
        begun = time.perf_counter()
        spheres.map(abs, range(sizes.tiny_items))
        before = time.perf_counter()
    ended = time.perf_counter()
    slices = len(trace.slices)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.json"
        trace.save(path)
        saved = time.perf_counter()
        size = path.stat().st_size
    section.add(Row("begin", duration(begun - start)))
    section.add(Row("end", f"{duration((ended - before) / slices)} a slice", note=f"{slices:,}"))
    section.add(
        Row("save", f"{duration((saved - ended) / slices)} a slice", note=f"{size / 1e6:.1f} MB")
    )
    return section


def main() -> None:
    options = arguments("trace", "What a trace costs.")
    sizes = QUICK if options.quick else FULL
    settings = {"concurrency": options.concurrency, "quick": options.quick, **vars(sizes)}
    report = Report("bench_trace", settings)
    report.console.print(f"{OFF}: {NOTE_OFF}", highlight=False)
    with ts.KissingSpheres(2, concurrency=options.concurrency) as spheres:
        report.add(long_items(spheres, sizes))
        report.add(short_items(spheres, sizes))
        report.add(training(spheres, sizes))
        report.add(afterwards(spheres, sizes))
    report.save(options.json)


if __name__ == "__main__":
    main()
