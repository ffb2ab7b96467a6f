"""Builds and tests torch_spheres with several versions of Python and torch, and prints a table.

    python tools/matrix.py python3.12:2.8.0 python3.11:2.14.1
    python tools/matrix.py env/bin/python:installed        # an environment that has torch already
    python tools/matrix.py python3.13:2.13.0 --tests tests/test_bits.py tests/reduction

Each pair gets a fresh virtual environment, which may take several gigabytes and is deleted before
the next one is made. The C++ core's own tests are left out, since they depend on neither version.
The table is printed, and written as it grows to --output with the names of tests that failed.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PROBE = (
    "import json, sys, torch, torch_spheres;"
    "gil = getattr(sys, '_is_gil_enabled', lambda: True)();"
    "print(json.dumps([sys.version.split()[0], torch.__version__, gil]))"
)
TEST_NEEDS = (
    "hypothesis", "matplotlib", "mlxtend", "prometheus_client", "pytest", "pytest-timeout",
    "pytest-xdist", "rich", "tensorboard", "tqdm",
)  # fmt: skip


def run(*command: str | Path, log: Any = None, check: bool = True) -> subprocess.CompletedProcess:
    """Without a shell; output goes to `log`, or is returned."""
    output = {"stdout": log, "stderr": log} if log else {"capture_output": True, "text": True}
    return subprocess.run([*map(str, command)], check=check, cwd=ROOT, **output)


def environment(python: str, torch: str, folder: Path, log: Any) -> Path:
    """The interpreter of an environment in which torch_spheres is built and installed."""
    if torch == "installed":
        made = Path(python).absolute()
    else:
        run(python, "-m", "venv", folder, log=log)
        made = folder / "bin" / "python"
        run(made, "-m", "pip", "install", "-q", "--upgrade", "pip", log=log)
        run(made, "-m", "pip", "install", "-q", f"torch=={torch}", *TEST_NEEDS, log=log)
    needs = ("setuptools>=77", "wheel", "pybind11>=3.1")
    run(made, "-m", "pip", "install", "-q", *needs, log=log)
    flags = ("--no-build-isolation", "--no-deps", "--force-reinstall")
    run(made, "-m", "pip", "install", "-q", *flags, ".", log=log)
    return made


def test(python: Path, tests: list[str], processes: int, log: Path) -> dict[str, Any]:
    """Runs the tests; counts, and the names of those that failed."""
    command = ["-P", "-m", "pytest", "-n", str(processes), "--dist", "worksteal", "-q", "-rfE"]
    if not tests:
        tests = ["tests", "--ignore", "tests/runtime/test_cpp_core.py"]
    begin = time.monotonic()
    with log.open("w") as file:
        run(python, *command, *tests, log=file, check=False)
    text = log.read_text()
    summaries = [line for line in text.splitlines() if re.search(r"\d+ \w+.* in [\d.]+s", line)]
    found = re.findall(r"(\d+) (passed|failed|skipped|error)", summaries[-1] if summaries else "")
    counts = {what: int(number) for number, what in found}
    return {
        "passed": counts.get("passed", 0),
        "failed": counts.get("failed", 0) + counts.get("error", 0),
        "skipped": counts.get("skipped", 0),
        "minutes": round((time.monotonic() - begin) / 60, 1),
        "failures": sorted(set(re.findall(r"^(?:FAILED|ERROR) (\S+)", text, re.MULTILINE))),
    }


def row_of(pair: str, options: argparse.Namespace) -> dict[str, Any]:
    """One pair's result; what could not be built or started is a result too."""
    python, _, torch = pair.rpartition(":")
    folder = Path(tempfile.mkdtemp(prefix="matrix-"))
    name = re.sub(r"\W+", "-", pair).strip("-")
    options.output.mkdir(parents=True, exist_ok=True)
    row: dict[str, Any] = {"pair": pair}
    try:
        with (options.output / f"{name}.build.log").open("w") as log:
            made = environment(python, torch, folder / "env", log)
        version, of_torch, gil = json.loads(run(made, "-P", "-W", "ignore", "-c", PROBE).stdout)
        row |= {"python": version, "torch": of_torch, "gil": gil}
        row |= test(made, options.tests, options.processes, options.output / f"{name}.log")
    except (subprocess.CalledProcessError, OSError) as error:
        row["error"] = f"{error}: {getattr(error, 'stderr', None) or ''}".strip(": \n")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown."""
    lines = ["| Python | torch | GIL | passed | failed | skipped | minutes |", "| --- " * 7 + "|"]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['pair']} | {row['error'].splitlines()[0]} | | | | | |")
            continue
        gil = "yes" if row["gil"] else "no"
        counts = " | ".join(str(row[k]) for k in ("passed", "failed", "skipped", "minutes"))
        lines.append(f"| {row['python']} | {row['torch']} | {gil} | {counts} |")
    return "\n".join(lines)


def main() -> int:
    """The number of pairs that did not pass."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pairs", nargs="+", metavar="PYTHON:TORCH")
    parser.add_argument("--tests", nargs="*", default=[], help="pytest's arguments; default: all")
    parser.add_argument("--processes", type=int, default=2, help="of pytest; default: 2")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "matrix")
    options = parser.parse_args()
    options.output = options.output.absolute()
    for pair in options.pairs:
        if not all(pair.rpartition(":")[::2]):
            parser.error(f"{pair!r} is not PYTHON:TORCH, as in python3.12:2.8.0")
    rows: list[dict[str, Any]] = []
    for pair in options.pairs:
        rows.append(row_of(pair, options))
        (options.output / "matrix.json").write_text(json.dumps(rows, indent=1))
        print(table(rows[-1:]).splitlines()[-1], *rows[-1].get("failures", []), sep="\n  ")
    print("\n" + table(rows))
    return sum("error" in row or row["failed"] > 0 or row["passed"] == 0 for row in rows)


if __name__ == "__main__":
    sys.exit(main())
