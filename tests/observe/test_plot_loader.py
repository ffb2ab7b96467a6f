"""`plot_loader`: against the calls that a loader remembers."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch
from plots_support import axes, drawn, legend, title
from torch.utils.data import DataLoader, Dataset, TensorDataset

import torch_spheres as ts
from torch_spheres.data.loader_stats import CALLS_KEPT, Call, Meter
from torch_spheres.observe.plots.waits import shares

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


@pytest.mark.parametrize(("workers", "theme"), [(0, "light"), (2, "dark")])
def test_what_is_drawn_is_what_was_counted(spheres, workers, theme):
    loader = ts.wrap(DataLoader(Slow(), 4, num_workers=workers), spheres)
    for _ in range(2):
        for _ in loader:
            time.sleep(0.002)
    ax = drawn(ts.plot_loader(loader, axes(9, 3), theme=theme))
    stats, calls = loader.stats(), loader._meter.calls()
    assert len(calls) == 22  # of which two found the epoch's end
    assert sum(call.waited for call in calls) == pytest.approx(stats.waited)
    assert sum(call.since for call in calls) == pytest.approx(stats.elapsed)
    assert sum(call.ready or 0 for call in calls) == round(stats.queue_depth * stats.batches)
    assert [call.ready is None for call in calls] == [*[False] * 10, True] * 2
    seconds, (empty, late, worked) = shares(calls, 50)
    assert (empty + late).sum() * seconds / 50 == pytest.approx(stats.waited)
    assert (empty + late + worked).sum() * seconds / 50 == pytest.approx(stats.elapsed)
    unit = 1.0 if ax.get_xlabel() == "time, s" else 1e-3
    assert ax.get_xlim()[1] * unit == pytest.approx(seconds)
    assert len(ax.collections) == 3
    assert legend(ax) == [
        "waited, no batch was ready", "waited, though one was ready", "the loop's own work",
    ]  # fmt: skip
    assert title(ax)[0].startswith("The loop waited ")
    assert title(ax)[1].startswith("20 batches, longest wait ")


def test_shares_of_a_known_loop():
    calls = [
        Call(ended=10.0, waited=1.0, since=1.0, ready=0),  # 9 to 10
        Call(ended=12.0, waited=0.5, since=2.0, ready=3),  # works to 11.5, waits to 12
        Call(ended=13.0, waited=0.0, since=1.0, ready=None),
        Call(ended=17.0, waited=2.0, since=2.0, ready=0),  # another epoch
    ]
    seconds, (empty, late, worked) = shares(calls, 8)
    assert seconds == 8
    assert np.allclose(empty, [1, 0, 0, 0, 0, 0, 1, 1])
    assert np.allclose(late, [0, 0, 0.5, 0, 0, 0, 0, 0])
    assert np.allclose(worked, [0, 1, 0.5, 1, 0, 0, 0, 0])
    empty, _, worked = shares(calls, 2)[1]
    assert np.allclose(empty, [0.25, 0.5]) and np.allclose(worked, [0.625, 0])
    # Of a loop whose beginning is forgotten: what came before the first call is not known.
    assert shares(calls[1:], 4)[1][2].sum() * 5.5 / 4 == pytest.approx(1.0)
    assert shares(calls[:1], 4)[1][0].tolist() == [1, 1, 1, 1]


def test_the_last_calls_are_kept(spheres):
    loader = ts.wrap(DataLoader(TensorDataset(torch.zeros(8, 2)), 4), spheres)
    for n in range(CALLS_KEPT + 5):
        loader._meter.count_batch(None, 1, n, 0)
        loader._meter.count_wait(1e-6, 2e-6, n * 2e-6)
    calls = loader._meter.calls()
    assert [call.ready for call in calls] == list(range(5, CALLS_KEPT + 5))
    ax = drawn(ts.plot_loader(loader, axes()))
    assert title(ax)[2] == "shown: the last 10,000 calls"


def test_threads_that_share_a_loader_do_not_mix_up_their_calls():
    meter, meet = Meter(2), threading.Barrier(4)

    def loop(ready):
        for _ in range(200):
            meet.wait(10)
            meter.count_batch(None, 1, ready, 0)
            meet.wait(10)  # all have been handed a batch before anybody's call is recorded
            meter.count_wait(ready / 1000, 1.0, 0.0)

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
