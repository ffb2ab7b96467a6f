"""What both benchmarks share: interleaved rounds, ratios with their spread, table and JSON.

Every figure is a ratio against a peer that was measured in the same rounds: each round runs all
contestants once, in an order that rotates, so that a slow moment of the machine hits all of them
alike. A ratio is taken within each round; its median is reported, with the quartiles as its spread.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table

import torch_spheres as ts
from torch_spheres import _core

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from native_items import Tally as Tally
from native_items import nothing as nothing

T = TypeVar("T")

CXX = os.environ.get("CXX", "g++")


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call; as in `timeit`, the cyclic garbage collector rests meanwhile."""
    gc.disable()
    try:
        start = time.perf_counter()
        result = call()
        seconds = time.perf_counter() - start
    finally:
        gc.enable()
    del result  # freeing what was made is not part of the work
    return seconds


def race(contestants: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """What each contestant returns in each round; one round before the first does not count."""
    names = list(contestants)
    results: dict[str, list[T]] = {name: [] for name in names}
    for name in names:
        contestants[name]()
    for i in range(rounds):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            gc.collect()
            results[name].append(contestants[name]())
    return results


@dataclass(frozen=True)
class Ratio:
    """Median over the rounds, and the quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, numerators: Sequence[float], denominators: Sequence[float]) -> Ratio:
        ratios = [n / d for n, d in zip(numerators, denominators, strict=True)]
        if len(ratios) < 2:
            return cls(ratios[0], ratios[0], ratios[0])
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True)
class Row:
    name: str
    value: str
    ratio: Ratio | None = None
    target: str = ""
    met: bool | None = None
    note: str = ""


@dataclass
class Section:
    """A table; `ratio` says what its ratio column is."""

    title: str
    ratio: str = ""
    rows: list[Row] = field(default_factory=list)
    samples: dict[str, list[Any]] = field(default_factory=dict)

    def add(self, row: Row) -> None:
        self.rows.append(row)

    def table(self) -> Table:
        caption = f"ratio: {self.ratio}" if self.ratio else None
        table = Table(title=self.title, title_justify="left", caption=caption)
        table.caption_justify = "left"
        table.add_column("", overflow="fold")
        for heading in ("measured", "ratio", "quartiles"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("target", no_wrap=True)
        table.add_column("note", overflow="fold")
        for row in self.rows:
            verdict = {None: "", True: " [green]met[/]", False: " [red]missed[/]"}[row.met]
            ratio, spread = "", ""
            if row.ratio is not None:
                ratio = f"{row.ratio.median:.2f}"
                spread = f"{row.ratio.low:.2f} - {row.ratio.high:.2f}"
            table.add_row(row.name, row.value, ratio, spread, row.target + verdict, row.note)
        return table


def compare(
    section: Section,
    samples: Mapping[str, Sequence[float]],
    ours: str,
    targets: Mapping[str, float],
    notes: Mapping[str, str] | None = None,
) -> None:
    """A row for each contestant: its time, and how many times as long as `ours` it took.

    `targets` are the ratios that are aimed at, by the peer's name.
    """
    notes = notes or {}
    for name, seconds in samples.items():
        section.samples[name] = list(seconds)
        value = duration(statistics.median(seconds))
        if name == ours:
            section.add(Row(name, value, note=notes.get(name, "")))
            continue
        ratio = Ratio.of(seconds, samples[ours])
        target = targets.get(name)
        section.add(
            Row(
                name,
                value,
                ratio,
                "" if target is None else f">= {target:g}",
                None if target is None else ratio.median >= target,
                notes.get(name, ""),
            )
        )


def duration(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def best_of(samples: Mapping[str, Sequence[float]], names: Sequence[str]) -> str:
    """The contestant with the least median, of those that were measured."""
    there = [name for name in names if name in samples]
    return min(there, key=lambda name: statistics.median(samples[name]))


def compiler() -> str:
    if shutil.which(CXX) is None:
        return "none"
    shown = subprocess.run([CXX, "--version"], capture_output=True, text=True, check=True)
    return shown.stdout.splitlines()[0]


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not on Linux
        return platform.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def environment() -> dict[str, Any]:
    return {
        "cpu": cpu_model(),
        "cores": ts.usable_cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "free_threaded": not getattr(sys, "_is_gil_enabled", lambda: True)(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "torch_spheres": ts.__version__,
        "compiler": compiler(),
        "isa": _core.active_isa(),
        "load_before": os.getloadavg(),
    }


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=132)


@dataclass
class Report:
    """Prints each section when it is finished; `save` writes all of them."""

    name: str
    settings: dict[str, Any]
    environment: dict[str, Any] = field(default_factory=environment)
    sections: list[Section] = field(default_factory=list)
    console: Console = field(default_factory=_console)

    def __post_init__(self) -> None:
        facts = ", ".join(f"{key} {value}" for key, value in self.environment.items())
        self.console.print(f"[bold]{self.name}[/]: {facts}")
        cores, load = self.environment["cores"], self.environment["load_before"][0]
        if load > 0.25 * cores:
            self.console.print(f"[yellow]the machine is busy: load {load:.1f} on {cores} cores[/]")

    def add(self, section: Section) -> None:
        self.sections.append(section)
        self.console.print()
        self.console.print(section.table())

    def save(self, path: Path) -> None:
        self.environment["load_after"] = os.getloadavg()
        content = {
            "benchmark": self.name,
            "settings": self.settings,
            "environment": self.environment,
            "sections": [asdict(section) for section in self.sections],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        rows = [row for section in self.sections for row in section.rows if row.met is not None]
        met = sum(row.met is True for row in rows)
        self.console.print(f"\n{met} of {len(rows)} targets met; samples in {path}")


def arguments(
    name: str,
    about: str,
    more: Callable[[argparse.ArgumentParser], object] = lambda parser: None,
) -> argparse.Namespace:
    """`--quick`, `--json`, `--concurrency`; the same for every benchmark. `more` adds its own."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--quick", action="store_true", help="seconds, for a smoke test only")
    parser.add_argument("--json", type=Path, help="default: results/NAME.json beside this script")
    parser.add_argument("--concurrency", type=int, default=ts.usable_cores())
    more(parser)
    options = parser.parse_args()
    if options.json is None:
        # A smoke run must not replace a measurement.
        suffix = ".quick.json" if options.quick else ".json"
        options.json = Path(__file__).resolve().parent / "results" / f"{name}{suffix}"
    return options
