"""What only a machine with many cores and a GPU can show, in eight minutes and one command.

    python tools/device_check.py [--seconds 480] [--output DIR] [--only SECTION ...] [--no-build]

Needs torch, pybind11, setuptools, pytest, hypothesis, rich and g++, no network. It builds the
checkout into a temporary folder. Each section is a process of its own, and each row is at once in
DIR/device_check.json and .md: a run that is cut off keeps what it has. Parts that need a GPU say so
where there is none; numbers of workers above the cores are left out.

The exit status is the number of rows that failed: bits that differ, tests, sections that broke.
Ratios fail nothing; they are the peer's time over ours, measured in the same rounds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from device_sections import SECTIONS

ROOT = Path(__file__).resolve().parent.parent
VERDICT = {None: "", True: "ok", False: "FAILED"}
LAST_ROW = "end of the section"  # a section that does not come to it was cut off


@dataclass
class Row:
    """One line of the table."""

    section: str
    what: str
    result: str
    ok: bool | None = None


class Table:
    """The rows so far, in files that are whole at any moment."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.rows: list[Row] = []
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, section: str, what: str, result: str, ok: bool | None = None) -> None:
        self.rows.append(Row(section, what, result, ok))
        print(f"[{section}] {what}: {result} {VERDICT[ok]}".rstrip(), flush=True)
        lines = ["| section | what | result | |", "| --- | --- | --- | --- |"]
        for row in self.rows:
            cells = [row.section, row.what, row.result, VERDICT[row.ok]]
            clean = (cell.replace("|", "/").replace("\n", " ") for cell in cells)
            lines.append(f"| {' | '.join(clean)} |")
        self._write("device_check.md", "\n".join(lines) + "\n")
        self._write("device_check.json", json.dumps([asdict(row) for row in self.rows], indent=1))

    def _write(self, name: str, text: str) -> None:
        beside = self._folder / f"{name}.new"
        beside.write_text(text, encoding="utf-8")
        beside.replace(self._folder / name)


def describe(table: Table) -> None:
    """The machine and the versions."""
    import torch

    models = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    cores, model = len(os.sched_getaffinity(0)), (models or [platform.machine()])[0]
    python = platform.python_version()
    table.add("machine", "processor", f"{cores} cores, {model}")
    table.add("machine", "versions", f"Python {python}, torch {torch.__version__}")
    for i in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(i)
        table.add("machine", f"GPU {i}", f"{found.name}, {found.total_memory / 2**30:.0f} GiB")


def build(folder: Path, limit: float, table: Table) -> bool:
    """Installs the checkout into a folder."""
    begin = time.monotonic()
    flags = ["--no-build-isolation", "--no-deps", "--no-index", "--no-cache-dir", "--quiet"]
    command = [sys.executable, "-m", "pip", "install", *flags, "--target", str(folder), str(ROOT)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit)
        ok, why = done.returncode == 0, done.stderr.strip()[-500:]
    except subprocess.TimeoutExpired:
        ok, why = False, f"cut off after {limit:.0f} s"
    table.add("build", "pip install", f"{time.monotonic() - begin:.0f} s" if ok else why, ok)
    return ok


def run_section(name: str, seconds: float, place: Path | None, table: Table) -> None:
    """In a process of its own, which is ended with all of its own when the time is over."""
    paths = [str(ROOT / folder) for folder in ("tools", "tests", "benchmarks")]
    known = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([*([str(place)] if place else []), *paths, *([known] if known else [])])
    command = [sys.executable, "-P", str(Path(__file__).resolve()), "--section", name]
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        with subprocess.Popen(
            [*command, "--until", str(time.monotonic() + seconds)],
            stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True,
            env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
        ) as process:  # fmt: skip
            limit = threading.Timer(seconds, os.killpg, (process.pid, signal.SIGKILL))
            limit.start()
            ended = False
            try:
                for line in process.stdout or ():
                    if not line.endswith("\n"):
                        break  # it was cut off while it wrote
                    what, result, ok = json.loads(line)
                    ended = what == LAST_ROW
                    if not ended:
                        table.add(name, what, result, ok)
                code = process.wait()
            finally:
                limit.cancel()
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
        if ended and code == 0:
            return
        errors.seek(0)
        why = f"cut off after {seconds:.0f} s" if code == -signal.SIGKILL else f"exit code {code}"
        table.add(name, "the section broke", f"{why}: {errors.read().strip()[-500:]}", ok=False)


def in_section(name: str, until: float) -> None:
    """Prints a section's rows, a line of JSON for each."""
    out = os.dup(1)  # what else is printed is not to come between them
    os.dup2(2, 1)
    check, _ = SECTIONS[name]
    with os.fdopen(out, "w") as file:
        for row in itertools.chain(check(until), [(LAST_ROW, "", None)]):
            file.write(json.dumps(row) + "\n")
            file.flush()


def main() -> int:
    """The number of rows that failed."""
    begin = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=480, help="in all; default: 480")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "device")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--no-build", action="store_true", help="use the installed torch_spheres")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)  # of time.monotonic()
    options = parser.parse_args()
    if options.section is not None:
        in_section(options.section, options.until)
        return 0
    table = Table(options.output)
    describe(table)
    with tempfile.TemporaryDirectory(prefix="device-check-") as folder:
        place = None if options.no_build else Path(folder)
        if place is None or build(place, options.seconds / 2, table):
            for name in options.only:
                left = options.seconds - (time.monotonic() - begin) - 5
                if left < 10:
                    table.add(name, "not begun", "no time was left")
                    continue
                run_section(name, min(left, SECTIONS[name][1]), place, table)
    failed = sum(row.ok is False for row in table.rows)
    took = time.monotonic() - begin
    print(f"{len(table.rows)} rows, {failed} failed, {took:.0f} s: {options.output}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
