"""The figures: what is counted, differences, percentiles, balance, the table."""

from __future__ import annotations

import math
import random
import re
import threading
import time
from bisect import bisect_right

import native_items
import pytest
import torch
from stats_support import made

import torch_spheres as ts
from torch_spheres import ITEM_TIME_EDGES_NS, KissingSpheres
from torch_spheres.observe.histogram import quantile_ns
from torch_spheres.observe.table import duration

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
        spheres.distribute_work(range(50_000), native_items.nothing())
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


# ---- differences ----


def test_a_difference_is_what_came_between() -> None:
    with KissingSpheres(levels=3, concurrency=3) as spheres:
        spheres.map(abs, range(500))
        before = spheres.stats()
        spheres.map(abs, range(300))
        spheres.distribute_work(range(400), native_items.nothing()).wait(LIMIT)
        spheres.epoch()
        spheres.send(0, 1, "a letter")
        assert spheres.receive(1) == "a letter"
        after = spheres.stats()
    between = after - before
    assert (before.items_run, between.items_run, after.items_run) == (500, 700, 1200)
    assert between.items_stolen == after.items_stolen - before.items_stolen
    assert sum(between.item_time_counts) == 700
    assert between.item_time_ns == after.item_time_ns - before.item_time_ns
    assert between.elapsed == pytest.approx((after.time_ns - before.time_ns) / 1e9)
    assert between.begin_ns == before.time_ns and between.time_ns == after.time_ns
    assert between.is_difference and not after.is_difference
    assert between.running_time > 0 and between.messages == after.messages - before.messages > 0
    for old, new, change in zip(before, after, between, strict=True):
        assert (change.id, change.path, change.level) == (new.id, new.path, new.level)
        assert change.processing_ns == new.processing_ns - old.processing_ns >= 0
        assert change.total_ns == new.total_ns - old.total_ns >= 0
        assert sum(change.item_time_counts) == change.items_run
        assert sum(change.stolen_from) == change.items_stolen
        assert (change.state, change.queued) == (new.state, new.queued)
        assert change.queue_high_water == new.queue_high_water
    nothing = after - after
    assert nothing.items_run == nothing.elapsed == nothing.cpu_ns == 0
    assert nothing.utilization == nothing.items_per_second == nothing.cores_used == 0


def test_snapshots_that_do_not_belong_together_are_refused() -> None:
    with KissingSpheres() as spheres, KissingSpheres() as others:
        first, second = spheres.stats(), spheres.stats()
        with pytest.raises(ValueError, match=r"different spheres: 13 of KissingSpheres number \d+"):
            others.stats() - first
        with pytest.raises(ValueError, match="write later - earlier"):
            first - second
        for one, two in ((second - first, first), (spheres.stats(), second - first)):
            with pytest.raises(ValueError, match="subtract the snapshots"):
                one - two
        with pytest.raises(TypeError):
            first - 1


def test_counting_begins_with_the_first_start_and_survives_a_stop() -> None:
    spheres = KissingSpheres()
    unborn = spheres.stats()
    assert unborn.elapsed == unborn.cpu_ns == unborn.running_time == 0
    assert unborn.advice() == () and "items" in str(unborn)
    begin = time.monotonic_ns()
    with spheres:
        spheres.map(abs, range(10))
    stopped = spheres.stats()
    with spheres:
        spheres.map(abs, range(20))
        again = spheres.stats()
    assert begin <= stopped.begin_ns == again.begin_ns < stopped.time_ns
    assert ((again - stopped).items_run, (again - unborn).items_run) == (20, 30)


# ---- what is made of the counts ----


def test_utilization_and_imbalance_look_at_the_leaves_that_could_run() -> None:
    even = made([5, 5, 5, 5])
    assert even.utilization == pytest.approx(0.5) and even.imbalance == pytest.approx(1)
    assert made([10, 10, 10, 10]).utilization == pytest.approx(1)
    assert made([5] * 8).utilization == pytest.approx(1)  # the turns went round
    one = made([10, 2, 2, 2])
    assert one.utilization == pytest.approx(0.4) and one.imbalance == pytest.approx(2.5)
    assert made([8]).imbalance == pytest.approx(4) and made([]).imbalance == 1
    assert made([5, 5]).cores_used == pytest.approx(1)


def test_percentiles_are_within_a_bucket_of_the_truth() -> None:
    rng = random.Random(0)
    for times in (
        [64],
        [10, 20],
        [rng.randrange(10**9) for _ in range(1000)],
        [int(rng.lognormvariate(12, 3)) for _ in range(5000)],
    ):
        counts = [0] * (len(ITEM_TIME_EDGES_NS) + 1)
        for ns in times:
            counts[bisect_right(ITEM_TIME_EDGES_NS, ns)] += 1
        ordered = sorted(times)
        last = 0.0
        for q in (0, 0.01, 0.1, 0.5, 0.9, 0.95, 0.999, 1):
            truth = ordered[max(0, math.ceil(q * len(ordered)) - 1)]
            found = quantile_ns(counts, q)
            assert abs(found - truth) <= max(64, truth / 4)
            assert found >= last
            last = found
    assert quantile_ns((), 0.5) == quantile_ns([0] * 130, 0.5) == 0
    assert quantile_ns([0] * 129 + [1], 0.5) == ITEM_TIME_EDGES_NS[-1]
    for q in (-0.1, 1.1, 50, math.nan):
        with pytest.raises(ValueError, match="0 to 1"):
            made([1]).item_time(q)


def test_item_times_of_all_spheres_and_of_one() -> None:
    stats = made([4, 2], item=0.01, inside=1.0)
    assert sum(stats.item_time_counts) == stats.items_run == 600
    assert stats.mean_item_time == pytest.approx(0.01)
    assert stats.item_time() == pytest.approx(0.01, rel=0.25)
    assert stats[1].item_time(0.9) == pytest.approx(0.01, rel=0.25) and stats[5].item_time() == 0
    assert stats.items_per_second == pytest.approx(60)


def test_the_steal_rate_is_a_share_of_the_items() -> None:
    with KissingSpheres(concurrency=1) as spheres:
        spheres.map(abs, range(1200))  # on one thread, mostly: eleven twelfths are others'
        stats = spheres.stats()
    assert stats.steal_rate == stats.items_stolen / 1200
    assert 0 <= stats.steal_rate <= 1 and made([]).steal_rate == 0


def test_the_table_sums_up_turns_balance_and_item_times() -> None:
    text = str(made([8, 4, 4, 4], item=0.0123))
    assert "at most 4 of 12 leaves run at once; 50.0 % of that was used, imbalance 1.60" in text
    assert "an item took 12.3 ms on average; half of them less than" in text
    assert "an item took" not in str(made([]))
    assert [duration(s) for s in (0, 12e-9, 1.5e-6, 0.0123, 2.5, 12345)] == [
        "0 ns", "12 ns", "1.5 µs", "12.3 ms", "2.5 s", "12345 s"]  # fmt: skip


def test_the_repr_is_one_line_however_many_spheres() -> None:
    with KissingSpheres(levels=4) as spheres:
        before = spheres.stats()
        spheres.map(abs, range(1538))
        stats = spheres.stats()
    assert re.fullmatch(
        r"<Stats of 1,885 spheres: 1,538 items, [\d,]+ stolen, in [\d.]+ m?s; print\(\) shows the "
        r"table>",
        repr(stats),
    )
    since = repr(stats - before)
    assert since.startswith("<Difference of two Stats of 1,885 spheres: 1,538 items, ")
    assert repr(KissingSpheres(levels=1).stats()).startswith("<Stats of 1 sphere: 0 items, ")
    assert str(stats).count("\n") > 5  # the table is what it was


def test_mistakes_are_named() -> None:
    stats = KissingSpheres(levels=2).stats()
    for wrong in ("95", None, True):
        with pytest.raises(TypeError, match=f"q must be a number, .* got {wrong!r}"):
            stats.item_time(wrong)  # type: ignore[arg-type]
    with pytest.raises(IndexError, match=r"no sphere 99; ids are 0 \(the root\) to 12"):
        stats[99]
    with pytest.raises(TypeError, match="a sphere's id must be an integer, got 'root'"):
        stats["root"]  # type: ignore[index]
