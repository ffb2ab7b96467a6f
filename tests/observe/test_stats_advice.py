"""Each rule of Stats.advice(): when it speaks, and when it does not."""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import replace

import pytest
from stats_support import made

import torch_spheres as ts
from torch_spheres import ITEM_TIME_EDGES_NS


def rules(stats: ts.Stats) -> str:
    assert isinstance(stats.advice(), tuple) and len(stats.advice()) <= 3
    return "\n".join(stats.advice())


def test_nothing_to_say_is_not_said() -> None:
    assert made([9.5, 9.5, 9.5, 9.5], waiting=40).advice() == ()
    assert made([0.9] * 4, seconds=0.95).advice() == ()  # too short to tell
    assert made([]).advice() == ()  # no items


def test_advice_idle_spheres() -> None:
    assert "had nothing to do 70% of the time, the busiest one too" in rules(made([3, 3, 3, 3]))
    # One long item keeps its sphere busy: that the others are idle is not for want of work.
    for fine in (made([8, 8, 8, 8]), made([9, 1, 1, 1])):
        assert "nothing to do" not in rules(fine)


def test_advice_items_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    asleep = rules(made([9.5] * 4, cores_used=0.1))
    assert "only 0.1 of 4 cores busy: " in asleep and "items wait, for a disk" in asleep
    assert "larger concurrency=" in asleep
    assert "levels= and concurrency=" in rules(
        made([9.5] * 12, concurrency=12, cores_used=0.1, waiting=12)
    )
    for gil in (True, False):
        monkeypatch.setattr("torch_spheres.observe.advice.has_gil", lambda gil=gil: gil)
        locked = rules(made([9.5] * 4, cores_used=1.0))
        assert "1.0 of 4 cores busy" in locked
        assert ("Python runs one thread at a time" in locked) == gil
        assert ("items wait, for a disk, a network or a lock" in locked) != gil
    for fine in (
        made([9.5] * 4, cores_used=3.8),
        made([9.5] * 4, cores=0, cores_used=1.0),
        made([5.0] * 4, cores_used=1.0),
    ):
        assert "cores busy" not in rules(fine)


def test_advice_one_sphere_has_the_long_items() -> None:
    # One item of nine seconds beside a hundred of ten milliseconds, on three other spheres.
    uneven = made([9, 1 / 3, 1 / 3, 1 / 3], waiting=40)
    counts = [0] * (len(ITEM_TIME_EDGES_NS) + 1)
    counts[bisect_right(ITEM_TIME_EDGES_NS, 9e9)] = 1
    long = replace(uneven[1], items_run=1, item_time_counts=tuple(counts))
    uneven = replace(uneven, spheres=(uneven[0], long, *uneven.spheres[2:]))
    assert re.search(
        r"sphere 0 worked 9 s, 3\.6 times the mean of the 4 busiest, and items of more than "
        r"[\d.]+ ms, four times the median, made up \d\d% of the work: cut the longest",
        rules(uneven),
    )
    assert "the mean of" not in rules(made([9, 8, 8, 8]))


def test_advice_one_item_at_a_time() -> None:
    alone = rules(made([9, 1, 1, 1], waiting=40))
    assert "1.2 of the 4 leaves that may run were at work on average" in alone
    assert "hand out more items at a time" in alone
    # The same work, by turns: what the figures tell is that each had little to do.
    assert "50% of the time, the busiest one too" in rules(made([5, 2.5, 2.5], waiting=40))
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


def test_at_most_three_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    for rule in ("_idle", "_waiting_items", "_uneven", "_short_items"):
        monkeypatch.setattr(f"torch_spheres.observe.advice.{rule}", lambda _, rule=rule: rule)
    assert made([5.0]).advice() == ("_idle", "_waiting_items", "_uneven")
