"""Threads and waits of tests of the runtime, which fail instead of hanging."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

LIMIT = 60.0  # seconds, for waits that end at once unless something is broken
TASKS = Path("/proc/self/task")

_others: set[str] = set()  # threads of earlier tests that are still there


def eventually(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def sphere_threads() -> list[str]:
    """Names of the threads of this process that are spheres, as the kernel knows them."""
    if not TASKS.exists():
        pytest.skip("thread names are read from /proc, which this system does not have")
    names = []
    for task in list(TASKS.iterdir()):
        try:
            if task.name not in _others:
                names.append((task / "comm").read_text().strip())
        except OSError:  # it has just ended
            continue
    return [name for name in names if name.startswith("sphere ")]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    # A library's thread that was started on a sphere has its name, and stays.
    _others.clear()  # the kernel may give a new thread the number of one that has ended
    _others.update(task.name for task in (TASKS.iterdir() if TASKS.exists() else ()))
    yield
    gc.collect()
    if TASKS.exists():
        eventually(lambda: sphere_threads() == [])


def in_thread(call: Callable[[], Any]) -> Callable[[], Any]:
    """Starts `call` in a thread; the result joins it and returns or raises what it did."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append((True, call()))
        except BaseException as error:
            outcome.append((False, error))

    thread = threading.Thread(target=run)
    thread.start()

    def join() -> Any:
        thread.join(LIMIT)
        assert outcome, "the thread hangs"
        good, value = outcome[0]
        if not good:
            raise value
        return value

    return join


class Meeting:
    """Items that go on only when `parties` of them run at once; knows the most that ever did."""

    def __init__(self, parties: int) -> None:
        self.parties, self.running, self.peak = parties, 0, 0
        self.lock, self.met = threading.Lock(), threading.Event()

    def __call__(self, item: object = None) -> None:
        with self.lock:
            self.running += 1
            self.peak = max(self.peak, self.running)
            if self.running >= self.parties:
                self.met.set()
        assert self.met.wait(LIMIT), f"only {self.peak} of {self.parties} ran at once"
        time.sleep(0.001)  # one too many would be seen
        with self.lock:
            self.running -= 1


def fail(item: object) -> None:
    raise LookupError(item)
