"""What displays consist of: totals of subtrees, rates, counts of samples; notebooks' table."""

from __future__ import annotations

import os
import signal
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import torch_spheres as ts
from torch_spheres.observe.readings import Rates, Reading, Totals
from torch_spheres.runtime.sample_counter import SampleCounter

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
    counted = SampleCounter()
    threads = [
        threading.Thread(target=lambda: [counted.loaded(1) for _ in range(10_000)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counted.value == 40_000


class Slow(int):
    """Does something else while it is added, when nobody else can add."""

    meanwhile: Callable[[], object]

    def __radd__(self, other: int) -> int:
        self.meanwhile()
        return other + int(self)


def test_a_signals_handler_may_count_while_its_thread_does() -> None:
    counted, rows = SampleCounter(), Slow(4)
    rows.meanwhile = lambda: signal.raise_signal(signal.SIGUSR1)
    before = signal.signal(signal.SIGUSR1, lambda *_: counted.set(7))
    try:
        counted.loaded(rows)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert counted.value == 7


def test_a_forked_child_counts_though_a_thread_of_its_parent_was_counting() -> None:
    counted, rows = SampleCounter(), Slow(4)
    begun, gate = threading.Event(), threading.Event()
    rows.meanwhile = lambda: (begun.set(), gate.wait(LIMIT))
    thread = threading.Thread(target=counted.loaded, args=[rows])
    thread.start()
    assert begun.wait(LIMIT)
    if (pid := os.fork()) == 0:
        signal.alarm(20)  # ends a child that hangs
        counted.loaded(1)
        os._exit(counted.value or 0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    gate.set()
    thread.join()
    assert (code, counted.value) == (1, 4)


def test_samples_are_counted_or_told() -> None:
    with ts.KissingSpheres() as spheres:
        assert Reading.of(spheres).samples is None
        data = TensorDataset(torch.randn(50, 3))
        for _ in ts.wrap(DataLoader(data, batch_size=8), spheres):
            pass
        for _ in ts.wrap(DataLoader(data, batch_size=8, num_workers=2), spheres):
            pass
        assert Reading.of(spheres).samples == 100
        live = spheres.live()
        live.advance(3)
        live.advance()
        assert Reading.of(spheres).samples == 4
        live.update(samples=2)
        assert Reading.of(spheres).samples == 2
        for bad, error in ((-1, ValueError), (1.5, TypeError), ("3", TypeError)):
            with pytest.raises(error, match="samples must be"):
                live.advance(bad)  # type: ignore[arg-type]


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
