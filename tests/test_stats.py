"""The figures: what is counted, differences, percentiles, advice, and where they are written."""

from __future__ import annotations

import threading
import time
from bisect import bisect_right

import pytest
import torch

import torch_spheres as ts
from torch_spheres import ITEM_TIME_EDGES_NS, KissingSpheres, _core

LIMIT = 60.0  # seconds, for waits that end at once unless something is broken


# ---- what is counted ----


def test_edges_are_four_to_a_doubling() -> None:
    edges = ITEM_TIME_EDGES_NS
    assert edges[:5] == (64, 80, 96, 112, 128) and edges[-1] == 2**38
    assert all(edges[i + 4] == 2 * edges[i] for i in range(len(edges) - 4))
    assert sorted(edges) == list(edges) and len(edges) == 4 * 32 + 1


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_each_item_is_counted_once_by_its_time_and_its_owner(levels: int) -> None:
    with KissingSpheres(levels=levels, concurrency=4) as spheres:
        spheres.map(abs, range(1000))
        spheres.distribute_work(range(50_000), _core.noop())
        with pytest.raises(LookupError):
            spheres.map(lambda _: (_ for _ in ()).throw(LookupError()), range(50))
        spheres.wait(LIMIT)
        stats = spheres.stats()
    for sphere in stats.spheres:
        assert sum(sphere.item_time_counts) == sphere.items_run
        assert len(sphere.item_time_counts) == len(ITEM_TIME_EDGES_NS) + 1
        if sphere.level in (0, levels - 1):
            assert len(sphere.stolen_from) == 12
            assert sum(sphere.stolen_from) == sphere.items_stolen
        else:
            assert sphere.stolen_from == ()
        assert sphere.queued == 0
        assert (sphere.item_time_ns > 0) == (sphere.items_run > 0)
    given = [0] * 12
    for sphere in stats.level(levels - 1):
        given[sphere.group or 0] += sphere.items_given
    taken = [s.stolen_from for s in stats.spheres if s.stolen_from]
    assert [sum(t[group] for t in taken) for group in range(12)] == given


def test_an_item_that_sleeps_is_found_in_the_bucket_of_its_time() -> None:
    with KissingSpheres(concurrency=12) as spheres:
        spheres.map(lambda item: time.sleep(0.05 if item == 3 else 0), range(24))
        stats = spheres.stats()
    assert stats.total(lambda s: sum(s.item_time_counts)) == 24
    slow = bisect_right(ITEM_TIME_EDGES_NS, 49_000_000)
    assert stats.total(lambda s: sum(s.item_time_counts[slow:])) >= 1
    assert stats.total(lambda s: s.item_time_ns) >= 49_000_000


def test_sums_of_gradients_are_no_items() -> None:
    with KissingSpheres() as spheres:
        ts.tree_sum([torch.ones(500_000) for _ in range(12)], spheres=spheres)
        stats = spheres.stats()
    assert stats.items_run > 1
    assert stats.total(lambda s: sum(s.item_time_counts)) == 0


def test_queued_counts_what_waits_in_the_leaf_and_above_it() -> None:
    gate, running = threading.Event(), threading.Event()
    with KissingSpheres(levels=3, concurrency=1) as spheres:
        spheres.distribute_work([0], lambda _: (running.set(), gate.wait(LIMIT)))
        assert running.wait(LIMIT)
        spheres.distribute_work(range(289), abs)
        stats = spheres.stats()
        gate.set()
        spheres.wait(LIMIT)
        assert spheres.stats()[0].queued == 0
    assert stats[0].queued == 289
    assert [s.queued for s in stats.level(1)] == [25] + [24] * 11
    assert [s.queued for s in stats.level(2)].count(3) == 1
    assert sum(s.queued for s in stats.level(2)) == 289
