"""What displays consist of: totals of subtrees, rates, counts of samples; notebooks' table."""

from __future__ import annotations

import subprocess
import threading
import time
import xml.etree.ElementTree as ET

import pytest
from terminal import script

import torch_spheres as ts
from torch_spheres.watching.readings import Rates, Reading, Rows, Totals

LIMIT = 60.0
SUBTREES = ["root", *map(str, range(12)), "all"]


# ---- figures ----


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_totals_of_subtrees_are_the_sums_of_stats(levels: int) -> None:
    with ts.KissingSpheres(levels=levels, concurrency=2) as spheres:
        gate, begun = threading.Event(), threading.Semaphore(0)

        def item(_: int) -> None:
            begun.release()
            gate.wait(LIMIT)

        spheres.map(abs, range(1000))
        work = spheres.distribute_work(range(500), item)
        for _ in range(min(2, spheres.leaves)):
            assert begun.acquire(timeout=LIMIT)
        end = time.monotonic() + LIMIT
        while True:  # until nobody falls asleep between the two
            reading, stats, after = Reading.of(spheres), spheres.stats(), Reading.of(spheres)
            if [t.states for t in reading.subtrees.values()] == [
                t.states for t in after.subtrees.values()
            ]:
                break
            assert time.monotonic() < end
        gate.set()
        work.wait()
    for path, totals in [*reading.subtrees.items(), ("", reading.total)]:
        below = [
            s
            for s in stats.spheres
            if not path or s.path == path or (path != "root" and s.path.startswith(path + "."))
        ]
        assert sum(totals.states) == len(below)
        assert totals.items == sum(s.items_run for s in below)
        assert totals.stolen == sum(s.items_stolen for s in below)
        assert totals.queued == sum(s.queued for s in below if s.level == levels - 1)
        for state, count in zip(ts.State, totals.states, strict=True):
            assert count == sum(s.state is state for s in below)
    busy = min(2, spheres.leaves)
    assert reading.total.working == busy and reading.total.queued == 500 - busy
    assert reading.spheres == len(stats) and reading.leaves == len(stats.leaves)


def made(time_s: float, busy_s: float, items: int = 0) -> Reading:
    """13 spheres of which sphere 0 alone works."""
    idle = Totals((0, 0, 1, 0, 0, 0), 0, 0, 0, 0)
    busy = Totals((0, 1, 0, 0, 0, 0), items, 2, 3, int(busy_s * 1e9))
    subtrees = {"root": idle, "0": busy, **{str(i): idle for i in range(1, 12)}}
    total = busy._replace(states=(0, 1, 12, 0, 0, 0))
    now = int(time_s * 1e9)
    return Reading(13, 12, 2, "running", now, now, subtrees, total, items * 10)


def test_rates_are_of_the_time_between_two_readings() -> None:
    first = made(10, 4)
    since_start = Rates(first, first)
    assert (since_start.items, since_start.samples) == (0, 0)
    assert since_start.busy("0") == 0.4 and since_start.busy() == 0.2 and since_start.busy("1") == 0
    between = Rates(first, made(12, 5, items=8))
    assert (between.items, between.samples) == (4, 40)
    assert between.busy("0") == 0.5 and between.busy() == 0.25
    anew = Rates(first, made(1, 0.25))  # stopped and started
    assert anew.items == 0 and anew.busy("0") == 0.25


def test_rows_are_counted_from_any_thread() -> None:
    counted = Rows()
    threads = [
        threading.Thread(target=lambda: [counted.loaded(1) for _ in range(10_000)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counted.value == 40_000


SLOW = """
import os, signal, sys, threading
import torch_spheres as ts

class Slow(int):
    # Takes a moment to add, and that is while nobody else can.
    def __radd__(self, other):
        meanwhile()
        return int(other) + int(self)

spheres = ts.KissingSpheres(levels=1)
live = spheres.live()
"""


@pytest.mark.parametrize("call", ["live.advance(5)", "spheres._rows.loaded(5)"])
def test_a_signals_handler_may_count_while_its_thread_does(call: str) -> None:
    text = f"""
def handler(*_):
    {call}
    print("handled")
def meanwhile():
    signal.raise_signal(signal.SIGTERM)
signal.signal(signal.SIGTERM, handler)
spheres._rows.{"advance" if "live" in call else "loaded"}(Slow(4))
live.update(samples=3)
live.advance(2)
print(spheres._rows.value)
"""
    done = subprocess.run(
        script(SLOW + text), capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert (done.returncode, done.stdout) == (0, "handled\n5\n"), done.stderr


def test_a_forked_child_counts_though_a_thread_of_its_parent_was_counting() -> None:
    text = """
begun, gate = threading.Event(), threading.Event()
def meanwhile():
    begun.set()
    gate.wait(60)
thread = threading.Thread(target=spheres._rows.loaded, args=[Slow(4)])
thread.start()
begun.wait(60)
pid = os.fork()
if pid == 0:
    signal.alarm(20)  # ends a child that hangs
    spheres._rows.loaded(1)
    assert spheres._rows.value == 1
    live.advance(2)
    assert spheres._rows.value == 2
    os._exit(3)
code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
gate.set()
thread.join()
assert spheres._rows.value == 4
sys.exit(code)
"""
    done = subprocess.run(
        script(SLOW + text), capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert done.returncode == 3, done.stderr


# ---- notebooks ----


@pytest.mark.parametrize("levels", [1, 2, 4])
def test_the_table_for_notebooks(levels: int) -> None:
    spheres = ts.KissingSpheres(levels=levels, concurrency=2)
    assert "not started" in spheres._repr_html_()
    with spheres:
        spheres.map(abs, range(4321))
        spheres.live().advance(99)
        html = spheres._repr_html_()
    assert "running" in html and f"{spheres.total_spheres:,} sphere" in html
    assert "stopped" in spheres._repr_html_() and "99 samples" in html and len(html) < 10_000
    titles, *table = ET.fromstring(html).iter("tr")  # well-formed, whatever is in it
    assert [cell.text for cell in titles][:3] == ["sphere", "state", "items"]
    names = [row[0].text for row in table]
    assert names == (["root", "all"] if levels == 1 else SUBTREES)
    assert table[-1][2].text == "4,321"
    for row in table:
        assert f"{row[-1].text}, transparent {row[-1].text}" in row[-1].get("style", "")
