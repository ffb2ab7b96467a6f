"""What a live display costs: its thread's time on a core, and a loop's beside it.

The target is 1 % of a core at four drawings per second, with 13 and with 1885 spheres. The display
is drawn into a pseudo-terminal of 120 × 40 that somebody reads, while items of a millisecond run.
"""

from __future__ import annotations

import os
import statistics
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fcntl import ioctl
from termios import TIOCSWINSZ
from typing import TextIO

from common import Ratio, Report, Row, Section, arguments, compare

import torch_spheres as ts
from torch_spheres.observe.live import Live
from torch_spheres.observe.readings import Reading

HERTZ = 4.0
TARGET = 0.01  # of a core
LEVELS = (2, 4)


@contextmanager
def terminal() -> Iterator[TextIO]:
    """A pseudo-terminal, with a thread that reads what is drawn."""
    os.environ["TERM"] = "xterm-256color"
    master, slave = os.openpty()
    ioctl(slave, TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    file = os.fdopen(slave, "w")

    def read() -> None:
        try:
            while os.read(master, 65536):
                pass
        except OSError:  # closed on the other side
            os.close(master)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield file
    finally:
        file.close()
        reader.join()


def on_core(live: Live) -> float:
    """Seconds that the display's thread has been on a core."""
    thread = live._thread
    assert thread is not None
    assert thread.ident is not None
    return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))


def shares(spheres: ts.KissingSpheres, seconds: float, samples: int) -> list[float]:
    """Shares of a core that the thread takes, while there is work."""
    found = []
    with terminal() as file, spheres.live(HERTZ, file=file, plain=False) as live:
        step(spheres)
        for _ in range(samples):
            before, begin = on_core(live), time.perf_counter()
            while time.perf_counter() - begin < seconds:
                step(spheres)
                live.advance(1)
            found.append((on_core(live) - before) / (time.perf_counter() - begin))
    return found


def step(spheres: ts.KissingSpheres) -> None:
    spheres.map(lambda _: time.sleep(0.001), range(spheres.concurrency * 20))


def per_second(spheres: ts.KissingSpheres, seconds: float, *, live: bool) -> float:
    """Seconds of one step, with or without a display."""
    steps = 0
    with terminal() as file, spheres.live(HERTZ, file=file, plain=not live):
        begin = time.perf_counter()
        while (spent := time.perf_counter() - begin) < seconds:
            step(spheres)
            steps += 1
    return spent / steps


def share_row(name: str, found: list[float], note: str, section: Section) -> None:
    section.samples[name] = found
    median = statistics.median(found)
    percent = Ratio.of([100 * share for share in found], [1.0] * len(found))
    section.add(Row(name, f"{median:.2%}", percent, "< 1 %", median < TARGET, note))


def reading_costs(spheres: ts.KissingSpheres, section: Section, rounds: int) -> None:
    """A reading, and what it would be by way of stats()."""
    found: dict[str, list[float]] = {"a reading": [], "stats()": []}
    for _ in range(rounds):
        for name, call in (("a reading", lambda: Reading.of(spheres)), ("stats()", spheres.stats)):
            before = time.thread_time()
            call()
            found[name].append(time.thread_time() - before)
    compare(section, found, "a reading", {})


def main() -> None:
    options = arguments("live", __doc__ or "")
    seconds, samples = (0.5, 2) if options.quick else (2.5, 4)
    report = Report("live", {"quick": options.quick, "seconds": seconds, "samples": samples})
    cost = Section("A display at 4 Hz beside items of 1 ms: on a core", "percent of one core")
    pace = Section("A step beside it", "time of a step with the display over one without")
    for levels in LEVELS:
        with ts.KissingSpheres(levels=levels, concurrency=options.concurrency) as spheres:
            name = f"{spheres.total_spheres} spheres"
            share_row(name, shares(spheres, seconds, samples), "live()'s thread", cost)
            with_, without = [], []
            for _ in range(samples):
                without.append(per_second(spheres, seconds / 5, live=False))
                with_.append(per_second(spheres, seconds / 5, live=True))
            pace.samples[name] = with_ + without
            ratio = Ratio.of(with_, without)
            pace.add(Row(name, f"{ratio.median:.3f}", ratio, "", None, "interleaved"))
            readings = Section(f"What is read of {name}", "time on a core, over that of a reading")
            reading_costs(spheres, readings, 5 if options.quick else 50)
            report.add(readings)
    report.add(cost)
    report.add(pace)
    report.save(options.json)


if __name__ == "__main__":
    main()
