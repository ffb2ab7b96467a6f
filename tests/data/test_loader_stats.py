"""What a loader says about itself."""

from __future__ import annotations

import dataclasses
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from loader_support import Numbers
from torch.utils.data import DataLoader, TensorDataset

import torch_spheres as ts
from torch_spheres.data.loader_stats import LoaderStats, Meter

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


@pytest.fixture(scope="module")
def spheres():
    with ts.KissingSpheres(levels=2, concurrency=2) as running:
        yield running


@pytest.mark.parametrize("workers", [0, 2])
def test_counts_are_right(spheres, workers):
    loader = ts.wrap(DataLoader(Numbers(50), 4, num_workers=workers), spheres)
    for _ in range(2):
        for _ in loader:
            pass
    stats = loader.stats()
    way = "spheres" if workers else "caller"
    assert (stats.batches, stats.samples, stats.workers, stats.way) == (26, 100, workers, way)
    # a pair of int64, an int64, a float64 and an int64 for each sample
    assert stats.bytes == 100 * (16 + 8 + 8 + 8)
    assert 0 < stats.waited <= stats.elapsed and stats.worked > 0
    assert 0 <= stats.computed <= stats.worked * 1.5 + 0.1
    assert 0 <= stats.queue_depth <= 4 and 0 <= stats.waiting <= 1
    assert "26 batches" in str(stats) and f"by {way}" in str(stats)
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.batches = 3


def test_a_gathering_loader(spheres):
    loader = ts.wrap(DataLoader(TensorDataset(torch.zeros(64, 5)), 16), spheres)
    assert loader.stats().batches == 0 and "0 batches" in str(loader.stats())
    for _ in loader:
        pass
    stats = loader.stats()
    assert (stats.batches, stats.bytes, stats.way) == (4, 64 * 20, "gather")
    assert stats.advice is None


def test_a_difference_is_what_came_between():
    meter = Meter(2)

    def load(ready, waited):
        for _ in range(4):
            meter.count_batch([torch.zeros(10)], 5, ready)
            meter.count_wait(waited, 1.0, 0.0)
            meter.count_work(0.5, 0.25)
        return meter.snapshot()

    before, after = load(0, 0.9), load(3, 0.1)
    between = after - before
    assert (between.batches, between.samples, between.bytes) == (4, 20, 160)
    assert between.elapsed == pytest.approx(4) and between.worked == pytest.approx(2)
    assert between.computed == pytest.approx(1) and between.workers == 2
    assert (before.waiting, between.waiting, after.waiting) == pytest.approx((0.9, 0.1, 0.5))
    assert (before.queue_depth, between.queue_depth, after.queue_depth) == pytest.approx(
        (0, 3, 1.5)
    )
    assert (after - after).batches == (after - after).queue_depth == 0
    with pytest.raises(ValueError, match="later - earlier"):
        before - after
    with pytest.raises(ValueError, match="different loaders"):
        Meter(2).snapshot() - before
    with pytest.raises(TypeError):
        after - 1


FIGURES = LoaderStats(
    batches=100,
    samples=400,
    bytes=0,
    waited=9.0,
    worked=18.0,
    computed=10.0,
    elapsed=10.0,
    queue_depth=0.1,
    workers=2,
    way="spheres",
)


@pytest.mark.parametrize("gil", [True, False])
def test_advice_says_what_to_change(gil, monkeypatch):
    def advice(**changes):
        return dataclasses.replace(FIGURES, **changes).advice

    monkeypatch.setattr("torch_spheres.data.loader_stats.has_gil", lambda: gil)
    if gil:
        assert "kept 1.0 cores busy" in advice() and 'workers="process"' in advice()
    else:
        assert "more num_workers may help" in advice()
    assert "more num_workers may help" in advice(computed=19.0)  # both cores at work
    assert "more num_workers may help" in advice(computed=0.5)  # they wait for a disk
    assert "give the DataLoader num_workers=" in advice(workers=0, way="caller")
    assert "more num_workers may help" in advice(way="process")
    for quiet in ({"waited": 1.0}, {"batches": 3}, {"way": "gather"}):
        assert advice(**quiet) is None
    assert str(FIGURES).splitlines()[1] == FIGURES.advice


def test_the_news_come_once_and_only_when_another_way_is_faster(monkeypatch):
    monkeypatch.setattr("torch_spheres.data.loader_stats.has_gil", lambda: True)

    def meter(**changes):
        made = Meter(2)
        made.way = "spheres"
        figures = dataclasses.replace(FIGURES, **changes)
        for _ in range(figures.batches):
            made.count_batch([], 4, 0)
        made.count_wait(figures.waited, figures.elapsed, 0.0)
        made.count_work(figures.worked, figures.computed)
        return made

    python_bound = meter()
    assert python_bound.next_warning() == python_bound.snapshot().advice is not None
    assert python_bound.next_warning() is None
    assert meter(computed=19.0).next_warning() is None
    assert meter(waited=1.0).next_warning() is None
    assert meter(batches=2).next_warning() is None
    assert meter(elapsed=0.5, waited=0.4).next_warning() is None


def test_the_loop_hears_of_it(spheres, monkeypatch):
    monkeypatch.setattr("torch_spheres.data.loader_stats.has_gil", lambda: True)
    loader = ts.wrap(DataLoader(Numbers(40), 4, num_workers=2), spheres)
    for _ in range(20):
        loader._meter.count_batch([], 4, 0)
    loader._meter.count_wait(9.0, 10.0, 0.0)
    loader._meter.count_work(18.0, 10.0)
    with pytest.warns(UserWarning, match="one thread at a time") as caught:
        for _ in loader:
            pass
    assert len(caught) == 1 and caught[0].filename == __file__


def test_threads_that_share_a_loader_get_each_warning_once():
    class Slow(list):
        """Takes a moment from the question whether it is empty to the answer."""

        def __len__(self):
            found = super().__len__()
            time.sleep(0.05)
            return found

    meter = Meter(0, lambda _: None)
    meter._warnings = Slow()
    meter.add_warning("once")
    meter.add_warning("once")
    with ThreadPoolExecutor(4) as executor:
        found = [*executor.map(lambda _: meter.next_warning(), range(4))]
    assert sorted(found, key=str) == [None, None, None, "once"]
