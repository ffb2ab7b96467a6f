"""`plot_loader`: against the calls that a loader remembers."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from plots_support import axes, drawn, found, legend, words
from torch.utils.data import DataLoader, Dataset, TensorDataset

import torch_spheres as ts
from torch_spheres.loading.stats import CALLS_KEPT, Call, Meter
from torch_spheres.plots.waits import Waits

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


class Slow(Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        time.sleep(0.001)
        return index


@pytest.fixture(scope="module")
def spheres():
    with ts.KissingSpheres(levels=2, concurrency=2) as made:
        yield made


def heights(ax, gid):
    (stairs,) = found(ax, gid)
    data = stairs.get_data()
    return data.values - data.baseline


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_what_is_drawn_is_what_was_counted(spheres, workers, theme):
    loader = ts.wrap(DataLoader(Slow(), 4, num_workers=workers), spheres)
    for _ in range(2):
        for _ in loader:
            time.sleep(0.002)
    ax = ts.plot_loader(loader, axes(9, 3), theme=theme)
    drawn(ax)
    stats, calls = loader.stats(), loader._meter.calls()
    assert len(calls) == 22  # of which two found the epoch's end
    assert sum(call.waited for call in calls) == pytest.approx(stats.waited)
    assert sum(call.since for call in calls) == pytest.approx(stats.elapsed)
    assert sum(call.ready or 0 for call in calls) == round(stats.queue_depth * stats.batches)
    assert [call.ready is None for call in calls] == [*[False] * 10, True] * 2
    seconds = ax.get_xlim()[1] * (1 if ax.get_xlabel() == "time, s" else 1e-3)
    share = seconds / len(heights(ax, "empty"))
    waited = (heights(ax, "empty").sum() + heights(ax, "late").sum()) * share
    assert waited == pytest.approx(stats.waited, rel=0.01)
    both = waited + heights(ax, "worked").sum() * share
    assert both == pytest.approx(stats.elapsed, rel=0.01)
    assert len(found(ax, "epoch")) == 2 and "epoch begins" in legend(ax)
    assert "waited, no batch was ready" in legend(ax)
    assert words(ax, "title").startswith("The loop waited ")
    notes = words(ax, "notes")
    assert "20 batches, loaded by " in notes and "longest" in notes


def test_shares_of_a_known_loop():
    calls = [
        Call(ended=10.0, waited=1.0, since=1.0, ready=0),  # 9 to 10
        Call(ended=12.0, waited=0.5, since=2.0, ready=3),  # works to 11.5, waits to 12
        Call(ended=13.0, waited=0.0, since=1.0, ready=None),
        Call(ended=17.0, waited=2.0, since=2.0, ready=0),  # another epoch
    ]
    assert [call.first for call in calls] == [True, False, False, True]
    waits = Waits.of(calls, 8)
    assert waits.seconds == 8 and waits.epochs == (0.0, 6.0)
    assert np.allclose(waits.empty, [1, 0, 0, 0, 0, 0, 1, 1])
    assert np.allclose(waits.late, [0, 0, 0.5, 0, 0, 0, 0, 0])
    assert np.allclose(waits.worked, [0, 1, 0.5, 1, 0, 0, 0, 0])
    coarse = Waits.of(calls, 2)
    assert np.allclose(coarse.empty, [0.25, 0.5]) and np.allclose(coarse.worked, [0.625, 0])
    # Of a loop whose beginning is forgotten: what came before the first call is not known.
    assert Waits.of(calls[1:], 4).worked.sum() * 5.5 / 4 == pytest.approx(1.0)
    assert Waits.of(calls[:1], 4).empty.tolist() == [1, 1, 1, 1]


def test_the_last_calls_are_kept(spheres):
    loader = ts.wrap(DataLoader(TensorDataset(torch.zeros(8, 2)), 4), spheres)
    for n in range(CALLS_KEPT + 5):
        loader._meter.handed_out(None, 1, n, 0)
        loader._meter.waited(1e-6, 2e-6, n * 2e-6)
    calls = loader._meter.calls()
    assert [call.ready for call in calls] == list(range(5, CALLS_KEPT + 5))
    ax = ts.plot_loader(loader, axes())
    drawn(ax)
    assert "shown: the last 10,000 calls" in words(ax, "notes").replace("\n", " ")


def test_threads_that_share_a_loader_do_not_mix_up_their_calls():
    meter, meet = Meter(2), threading.Barrier(4)

    def loop(ready):
        for _ in range(200):
            meet.wait(10)
            meter.handed_out(None, 1, ready, 0)
            meet.wait(10)  # all have been handed a batch before anybody's call is recorded
            meter.waited(ready / 1000, 1.0, 0.0)

    threads = [threading.Thread(target=loop, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    calls = meter.calls()
    assert len(calls) == 800 and all(call.waited == call.ready / 1000 for call in calls)


def test_mistakes_are_named(spheres):
    plain = DataLoader(TensorDataset(torch.zeros(8, 2)), 4)
    loader = ts.wrap(plain, spheres)
    with pytest.raises(TypeError, match=r"got DataLoader; loader = wrap\(loader\)"):
        ts.plot_loader(plain)
    with pytest.raises(ValueError, match="nothing to draw yet: nobody has iterated"):
        ts.plot_loader(loader)
    for _ in loader:
        pass
    with pytest.raises(ValueError, match="theme must be one of"):
        ts.plot_loader(loader, theme="")
    with pytest.raises(TypeError, match=r"plot_loader\(\): ax must be .* got Figure"):
        ts.plot_loader(loader, Figure())
    drawn(ts.plot_loader(loader))


def test_a_layout_makes_room_for_what_stands_above_given_axes(spheres):
    loader = ts.wrap(DataLoader(TensorDataset(torch.zeros(40, 2)), 4), spheres)
    for _ in loader:
        pass
    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    for ax in (left, right):
        ts.plot_loader(loader, ax)
    drawn(left)
    for ax in (left, right):
        for box in [found(ax, gid)[0].get_window_extent() for gid in ("title", "notes")]:
            assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1
            assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
