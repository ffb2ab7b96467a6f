"""Each rule of Stats.advice(): when it speaks, and when it does not."""

from __future__ import annotations

import re
import threading
import time
from dataclasses import replace

import pytest
from stats_support import made

import torch_spheres as ts
from torch_spheres import KissingSpheres

LIMIT = 60.0  # seconds, for a wait that ends at once unless something is broken


def rules(stats: ts.Stats) -> str:
    assert isinstance(stats.advice(), tuple) and len(stats.advice()) <= 3
    return "\n".join(stats.advice())


def test_nothing_to_say_is_not_said() -> None:
    assert made([9.5, 9.5, 9.5, 9.5], waiting=40).advice() == ()
    assert made([0.9] * 4, seconds=0.95).advice() == ()  # too short to tell
    assert made([]).advice() == ()  # no items


def test_advice_few_items_at_a_time() -> None:
    def run(items: int) -> str:
        with KissingSpheres(concurrency=4) as spheres:
            for _ in range(2):
                spheres.map(lambda _: time.sleep(0.6), range(items))
            return rules(spheres.stats())

    assert "never more than 2 items waited at once, but 4 leaves may run" in run(2)
    assert "waited at once, but" not in run(8)


def test_advice_idle_spheres() -> None:
    with KissingSpheres(concurrency=2) as spheres:
        start = spheres.stats()
        spheres.map(abs, range(50))
        time.sleep(1.2)
        idle = spheres.stats()
        spheres.map(lambda _: time.sleep(0.3), range(8))
        busy = spheres.stats()
    assert "% of the time, the busiest one too" in rules(idle - start)
    assert "nothing to do" not in rules(busy - idle)
    # One long item keeps its sphere busy: that the others are idle is not for want of work.
    assert "nothing to do" not in rules(made([9, 1, 1, 1]))


def test_advice_items_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    with KissingSpheres(concurrency=2) as spheres:
        spheres.map(lambda _: time.sleep(0.3), range(8))
        stats = spheres.stats()
    stats = replace(stats, cores=2)
    assert re.search(r"only 0\.\d of 2 cores busy: .* items wait, for a disk", rules(stats))
    assert "larger concurrency=" in rules(stats)
    assert "levels= and concurrency=" in rules(replace(made([9.0] * 12, cores_used=0.1),
                                                       concurrency=12))  # fmt: skip
    for gil in (True, False):
        monkeypatch.setattr("torch_spheres.stats_advice.has_gil", lambda gil=gil: gil)
        locked = rules(made([9.5] * 4, cores_used=1.0))
        assert "1.0 of 4 cores busy" in locked
        assert ("Python runs one thread at a time" in locked) == gil
        assert ("items wait, for a disk, a network or a lock" in locked) != gil
    for fine in (made([9.5] * 4, cores_used=3.8), made([9.5] * 4, cores=0, cores_used=1.0),
                 made([5.0] * 4, cores_used=1.0)):  # fmt: skip
        assert "cores busy" not in rules(fine)


def test_advice_more_threads_than_cores() -> None:
    crowd = made([9.9] * 8, concurrency=8, cores=2, cores_used=1.98, waiting=8)
    assert rules(crowd).startswith(
        "7.9 leaves ran at once, on average, on 2 cores that were 99% busy: concurrency=2 does"
    )
    for fine in (
        made([9.9] * 8, concurrency=8, cores=8, cores_used=7.9, waiting=8),
        made([9.9] * 8, concurrency=8, cores=2, cores_used=0.5, waiting=8),  # they sleep
        made([2.0] * 8, concurrency=8, cores=2, cores_used=1.9, waiting=8),  # seldom at once
    ):
        assert "leaves ran at once" not in rules(fine)


def test_advice_one_sphere_has_the_long_items() -> None:
    with KissingSpheres(concurrency=4) as spheres:
        spheres.map(lambda i: time.sleep(1.2 if i == 0 else 0), range(24))
        uneven = spheres.stats()
        meeting = threading.Barrier(4)
        spheres.map(lambda i: (meeting.wait(LIMIT), time.sleep(1.2)), range(4))
        even = spheres.stats() - uneven
    assert re.search(
        r"worked [\d.]+ s, \d\.\d times the mean of the 4 busiest, and items of more than .* "
        r"made up \d+% of the work: cut the longest",
        rules(uneven),
    )
    assert "the mean of" not in rules(even)
    assert "the mean of" not in rules(made([9, 8, 8, 8]))


def test_advice_one_item_at_a_time() -> None:
    with KissingSpheres(concurrency=4) as spheres:
        spheres.map(abs, range(100))  # many once, but not since
        before = spheres.stats()
        # (One item: several would run anywhere, and no sphere might be busy half of the time.)
        spheres.map(lambda _: time.sleep(1.5), [0])
        stats = spheres.stats() - before
    assert re.search(r"[01]\.\d of the 4 leaves that may run were at work on average", rules(stats))
    # The same work, by turns: what the figures tell is that each had little to do.
    assert "50% of the time, the busiest one too" in rules(made([5, 2.5, 2.5], waiting=40))
    assert "hand out more items at a time" in rules(made([9, 1, 1, 1], waiting=40))
    for fine in (
        made([9, 9, 9, 9], waiting=40),
        made([3, 0.5, 0.5, 0.5], waiting=40),  # nobody had much
        made([9, 1, 1, 1], waiting=40, item=1e-6),  # short items are another matter
    ):
        assert "at a time" not in rules(fine)


def test_advice_short_items() -> None:
    short = made([9.0] * 4, item=1e-6, inside=0.4)
    assert "an item took 1 µs on average, and 60% of the time that spheres were awake" in rules(
        short
    )
    for fine in (
        made([9.0] * 4, item=1e-6, inside=0.9),
        made([9.0] * 4, item=1e-3, inside=0.4),
        made([0.0002] * 4, item=1e-6, inside=0.4),  # too few to tell
    ):
        assert "an item took" not in rules(fine)


def test_at_most_three_sentences() -> None:
    bad = made([4.0, 0.5], item=1e-6, inside=0.1, waiting=1)
    assert len(bad.advice()) == 3
    worst = made([9.9] * 8, concurrency=8, cores=2, cores_used=1.98, waiting=2, item=1e-6,
                 inside=0.1)  # fmt: skip
    assert len(worst.advice()) == 3
