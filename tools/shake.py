"""Runs tests again and again on a machine that is never quiet, and counts what fails how often.

    python tools/shake.py                                   # the whole suite, once
    python tools/shake.py --rounds 50 tests/observe/test_trace.py   # what follows is pytest's
    python tools/shake.py --minutes 120 tests -k "not cpp"

Other programs take the cores in bursts of random length, and Python switches between threads every
20 microseconds instead of every 5 milliseconds. A test that fails here assumes something about when
things happen. The output of rounds in which something failed is kept in --output.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SWITCH_INTERVAL = 20e-6  # seconds
HANG = 900  # seconds that one test may take: everything is slow here
BURSTS = """
import os, random, sys, time
random.seed(int(sys.argv[1]))
parent = os.getppid()
while os.getppid() == parent:
    end = time.perf_counter() + random.choice((0.002, 0.02, 0.2)) * random.random()
    while time.perf_counter() < end:
        pass
    time.sleep(random.choice((0.002, 0.02, 0.2)) * random.random())
"""


def pytest_configure() -> None:
    """pytest imports this file as a plugin too, in each of its processes."""
    sys.setswitchinterval(SWITCH_INTERVAL)


@contextlib.contextmanager
def other_programs(count: int) -> Iterator[None]:
    """So many processes that compute in bursts; they end with this one, however that ends."""
    command = (sys.executable, "-I", "-c", BURSTS)
    running = [subprocess.Popen([*command, str(seed)]) for seed in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def failures(report: Path) -> list[str]:
    """Names of the tests that a JUnit report says have failed."""
    return [
        f"{case.get('classname')}::{case.get('name')}"
        for case in ElementTree.parse(report).iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]


def one_round(options: argparse.Namespace, number: int) -> list[str]:
    """Runs pytest once; the names of tests that failed."""
    report, log = options.output / f"{number}.xml", options.output / f"{number}.log"
    report.unlink(missing_ok=True)
    command = [
        *(sys.executable, "-P", "-m", "pytest", "-q", "-p", "shake", "-p", "no:cacheprovider"),
        *("-n", str(options.processes), "--dist", "worksteal", "-o", f"timeout={HANG}"),
        *(f"--junitxml={report}", *options.pytest),
    ]
    path = os.pathsep.join(filter(None, [str(ROOT / "tools"), os.environ.get("PYTHONPATH")]))
    with log.open("w") as output:
        status = subprocess.run(
            command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, stdout=output, stderr=output
        ).returncode
    if not report.exists() or status not in (0, 1):
        sys.exit(f"pytest ended with status {status}, see {log}")
    failed = failures(report)
    if not failed:
        log.unlink()
    report.unlink()
    return failed


def main() -> int:
    """1 if a test failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, help="how often; default: once, or for --minutes")
    parser.add_argument("--minutes", type=float, help="begin no new round after so many")
    parser.add_argument("--processes", type=int, default=2, help="of pytest; default: 2")
    parser.add_argument("--others", type=int, help="other programs; default: one for each core")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "shake")
    options, options.pytest = parser.parse_known_args()
    options.output = options.output.absolute()
    options.output.mkdir(parents=True, exist_ok=True)
    others = options.others if options.others is not None else len(os.sched_getaffinity(0))
    rounds = options.rounds or (1 if options.minutes is None else sys.maxsize)
    end = time.monotonic() + 60 * (options.minutes if options.minutes is not None else 1e9)
    often: collections.Counter[str] = collections.Counter()
    done = 0
    with contextlib.suppress(KeyboardInterrupt), other_programs(others):
        while done < rounds and (done == 0 or time.monotonic() < end):
            begin = time.monotonic()
            failed = one_round(options, done)
            done += 1
            often.update(failed)
            took = (time.monotonic() - begin) / 60
            print(f"round {done}: {len(failed)} failed, {took:.1f} minutes", *failed, sep="\n  ")
    print(f"\n{done} rounds, {len(often)} tests failed in some:")
    for name, count in often.most_common():
        print(f"{count:5} of {done}  {name}")
    return bool(often)


if __name__ == "__main__":
    sys.exit(main())
