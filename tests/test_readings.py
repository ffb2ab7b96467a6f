"""What displays consist of: totals of subtrees, rates, lines on a screen; notebooks' picture."""

from __future__ import annotations

import subprocess
import threading
import time
import xml.etree.ElementTree as ET

import pytest
from terminal import script

import torch_spheres as ts
from torch_spheres.watching.frame import View, full_frame, plain_line, screen
from torch_spheres.watching.readings import Rates, Reading, Rows, SubtreeTotals

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
            if [t.states for t in reading.subtrees] == [t.states for t in after.subtrees]:
                break
            assert time.monotonic() < end
        gate.set()
        work.wait()
    for totals in reading.subtrees:
        path = totals.path
        below = [
            s
            for s in stats.spheres
            if s.path == path or (path != "root" and s.path.startswith(path + "."))
        ]
        assert totals.spheres == len(below)
        assert totals.items == sum(s.items_run for s in below)
        assert totals.stolen == sum(s.items_stolen for s in below)
        leaves = [s for s in below if s.level == levels - 1]
        assert totals.queued == sum(s.queued for s in leaves)
        for state, count in zip(ts.State, totals.states, strict=True):
            assert count == sum(s.state is state for s in below)
    assert reading.items == stats.items_run
    assert reading.working == min(2, spheres.leaves) and reading.queued == 500 - reading.working
    assert sum(s.spheres for s in reading.subtrees) == len(stats) == reading.spheres
    assert Reading.from_json(reading.to_json()) == reading


def made(time_s: float, busy_s: float, items: int = 0, concurrency: int = 2) -> Reading:
    """13 spheres of which sphere 0 alone works."""
    idle, busy = (0, 0, 1, 0, 0, 0), (0, 1, 0, 0, 0, 0)
    subtrees = [SubtreeTotals(i, idle, 0, 0, 0, 0) for i in range(13)]
    subtrees[1] = SubtreeTotals(1, busy, items, 2, 3, int(busy_s * 1e9))
    now = int(time_s * 1e9)
    return Reading(2, concurrency, True, now, now, tuple(subtrees), items * 10)


def test_rates_are_of_the_last_second() -> None:
    rates = Rates(1.0)
    rates.add(made(10, 4))
    assert (rates.items, rates.samples) == (0, 0)
    assert rates.busy(1) == 0.4 and rates.busy() == 0.2 and rates.busy(2) == 0
    for step in range(1, 9):
        rates.add(made(10 + step / 4, 4 + step / 8, items=step))
    assert (rates.items, rates.samples) == (4, 40)
    assert rates.busy(1) == 0.5 and rates.busy() == 0.25
    rates.settle()  # over all of the two seconds
    assert (rates.items, rates.samples) == (4, 40) and rates.busy(1) == 0.5
    rates.add(made(12.5, 5, items=8))
    rates.settle()
    assert rates.items == 3.2 and rates.busy(1) == 0.4
    rates.add(made(1, 0.25))  # started anew
    assert rates.items == 0 and rates.busy(1) == 0.25


def test_several_systems_share_a_screen() -> None:
    views = []
    for number in range(5):
        rates = Rates()
        rates.add(made(10, 4, items=7))
        views.append(View(rates, name=f"pid {number}", ended=number == 0))
    assert len(full_frame(views[0], 80)) == 17

    def text(height: int) -> list[str]:
        return ["".join(span for span, _ in line) for line in screen(views, 80, height)]

    for height in range(1, 100):
        assert 1 <= len(text(height)) <= height
    headings = [line[:5] for line in text(100) if line.startswith("pid")]
    assert headings == ["pid 1", "pid 2", "pid 3", "pid 4", "pid 0"]  # that has ended comes last
    assert sum(line.startswith("all") for line in text(100)) == 4
    assert sum(line.startswith("all") for line in text(30)) == 1
    assert text(6)[-1] == "and 3 more"
    assert "ended" in plain_line(views[0]) and "7 items" in plain_line(views[0])


class CountedRates(Rates):
    """Counts how often shares are worked out, which is most of what a line costs."""

    asked = 0

    def busy(self, index: int | None = None) -> float:
        CountedRates.asked += 1
        return super().busy(index)


def test_a_screen_costs_what_is_shown_and_not_what_there_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rates = CountedRates()
    rates.add(made(10, 4, items=7))
    views = [View(rates, name=f"pid {number}", ended=number > 0) for number in range(3000)]
    for shown, height in ((1, 24), (11, 24), (3000, 24), (3000, 7)):
        monkeypatch.setattr(CountedRates, "asked", 0)
        lines = screen(views[:shown], 80, height)
        assert 1 <= len(lines) <= height and 1 <= CountedRates.asked <= height
    assert lines[-1][0][0] == "and 2,997 more"


def test_an_empty_screen_fits_any_terminal() -> None:
    assert [screen([], 80, height) for height in (-1, 0, 1)] == [[], [], []]


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


def texts(svg: str) -> list[str]:
    return [node.text or "" for node in ET.fromstring(svg).iter() if node.tag.endswith("}text")]


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_the_picture_for_notebooks(levels: int) -> None:
    spheres = ts.KissingSpheres(levels=levels, concurrency=2)
    assert "not started" in texts(spheres._repr_html_())[0]
    with spheres:
        spheres.map(abs, range(4321))
        svg = spheres._repr_html_()
        assert "running" in texts(svg)[0] and f"{spheres.total_spheres:,} sphere" in texts(svg)[0]
    assert "4,321" in texts(svg)
    names = [text for text in texts(svg) if text in SUBTREES and text != "0"]
    assert [n for n in SUBTREES if n in texts(svg)] == (
        ["root", "0", "all"] if levels == 1 else SUBTREES
    ) and names[0] == "root"
    assert "stopped" in texts(spheres._repr_html_())[0]
    assert len(svg) < 10_000
    root = ET.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg" and root.get("fill") == "currentColor"
    width = float(root.get("width", 0))
    for bar in root.iter("{http://www.w3.org/2000/svg}rect"):
        assert float(bar.get("x", -1)) >= 0 and float(bar.get("width", -1)) >= 0
        assert float(bar.get("x", 0)) + float(bar.get("width", 0)) <= width


def test_samples_are_in_the_picture() -> None:
    with ts.KissingSpheres() as spheres:
        spheres.live().advance(99)
        assert any("99 samples" in text for text in texts(spheres._repr_html_()))
