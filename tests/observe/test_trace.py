"""`KissingSpheres.trace`: against the counters, and as a file."""

from __future__ import annotations

import threading
import time
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import native_items
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from trace_support import (
    check_file,
    check_trace,
    items_in,
    load,
    phases_in,
    steals_in,
    wait_until_idle,
)

import torch_spheres as ts
from torch_spheres import _core
from torch_spheres.observe import trace_recorder
from torch_spheres.training.autotune import Plan

X = torch.randn(36, 8, generator=torch.Generator().manual_seed(0))


def network():
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.fixture
def spheres():
    with ts.KissingSpheres(levels=2, concurrency=3) as made:
        made.epoch()  # all threads are there
        yield made


# ---- against the counters ----


@pytest.mark.parametrize(("levels", "concurrency"), [(1, 1), (2, 1), (2, 5), (3, 2)])
def test_as_many_items_and_steals_as_the_counters_say(levels, concurrency, tmp_path):
    with ts.KissingSpheres(levels=levels, concurrency=concurrency) as spheres:
        spheres.epoch()  # all threads are there
        with spheres.trace() as trace:
            spheres.map(lambda i: time.sleep(0.0002 * (i % 5)), range(50))
            spheres.distribute_work(range(20_000), native_items.nothing()).wait()
            spheres.map(abs, range(500))
        stats = spheres.stats()
        check_trace(trace, spheres)
    assert trace.lost == 0
    assert (trace.levels, trace.concurrency) == (levels, spheres.concurrency)
    assert items_in(trace) == stats.items_run == 20_550
    assert steals_in(trace) == stats.items_stolen
    python = [s for s in trace.slices if s.name == "item"]
    assert all(s.count == 1 for s in python)
    assert sorted(s.item for s in python) == sorted([*range(50), *range(500)])
    for s in stats:
        mine = sum(t.count for t in trace.slices if t.kind == "item" and t.sphere == s.id)
        assert mine == s.items_run
    queued = [c.value for c in trace.counters if c.name == "queued items"]
    assert queued[0] == queued[-1] == 0 and max(queued) >= 19_000
    trace.save(tmp_path / "run.json")
    tracks = check_file(load(tmp_path / "run.json"))
    assert set(tracks) >= {f"sphere {s.path}" for s in stats}


def test_native_items_of_one_slice_are_told_apart(spheres):
    tally = native_items.Tally()
    with spheres.trace() as trace:
        spheres.distribute_work(range(5000), tally.function()).wait()
    seen = [
        s.item + i * spheres.leaves
        for s in trace.slices
        if s.kind == "item"
        for i in range(s.count)
    ]
    assert sorted(seen) == list(range(5000))
    assert any(s.count > 1 for s in trace.slices)


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_threads_that_submit_and_fail_all_at_once(levels, tmp_path):
    def work(seconds, items, fails):
        def item(i):
            time.sleep(seconds)
            if i == fails:
                raise ValueError(i)

        try:
            spheres.map(item, range(items))
        except ValueError as error:
            raised.append(error.args)

    raised = []
    with ts.KissingSpheres(levels=levels, concurrency=4) as spheres:
        with spheres.trace() as trace:
            threads = [
                threading.Thread(target=work, args=(0.00005 * t, 40 + 31 * t, 30 if t % 2 else -1))
                for t in range(6)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            spheres.wait()
        stats = spheres.stats()
        check_trace(trace, spheres)
    assert raised == [(30,)] * 3
    assert trace.lost == 0
    assert items_in(trace) == stats.items_run
    assert steals_in(trace) == stats.items_stolen
    assert [c.value for c in trace.counters if c.name == "queued items"][-1] == 0
    trace.save(tmp_path / "run.json.gz")
    check_file(load(tmp_path / "run.json.gz"))


def test_a_small_ring_keeps_the_last_events_and_counts_the_lost(spheres, tmp_path):
    with spheres.trace(capacity=20) as trace:
        for _ in range(10):
            spheres.map(lambda _: time.sleep(0.0001), range(60))
    assert trace.lost > 0
    items = Counter(s.sphere for s in trace.slices if s.kind == "item")
    assert max(items.values()) <= 20
    # Of every event that is left there is at most one slice more: a track's last state.
    assert items.total() + trace.lost >= 600
    for counter in trace.counters:
        assert counter.value >= 0
    trace.save(tmp_path / "run.json")
    check_file(load(tmp_path / "run.json"))


def test_states_last_as_long_as_the_statistics_say(spheres):
    with spheres.trace() as trace:
        before = spheres.stats()
        spheres.map(lambda _: time.sleep(0.002), range(30))
        spheres.barrier(1)
        after = spheres.stats()
    states = Counter()
    for s in trace.slices:
        if s.kind == "state":
            states[s.name] += s.duration_ns
    for name, counted in (
        ("processing", lambda s: s.processing_ns),
        ("waiting", lambda s: s.waiting_ns),
    ):
        assert after.total(counted) - before.total(counted) <= states[name]
    whole = trace.end_ns - trace.begin_ns
    for sphere in range(13):
        mine = [s for s in trace.slices if s.sphere == sphere and s.kind == "state"]
        assert sum(s.duration_ns for s in mine) == whole
        assert all(a.end_ns == b.begin_ns for a, b in pairwise(mine))


@pytest.mark.parametrize(
    ("first", "events", "last", "since", "lost", "shown"),
    [
        # Nothing changed in the trace: it was in its last state all the time.
        ("idle", [], "idle", 40, 0, [("idle", 100, 200)]),
        ("ready", [], "idle", 100, 0, [("idle", 100, 200)]),
        ("terminating", [], "terminating", 0, 0, []),
        # A change that its thread had not recorded when the trace ended ...
        ("ready", [], "idle", 150, 0, [("ready", 100, 150), ("idle", 150, 200)]),
        ("ready", [], "terminating", 150, 0, [("ready", 100, 150)]),
        ("terminating", [], "ready", 150, 0, [("ready", 150, 200)]),
        (
            "ready", [(90, 130, "ready", "idle")], "ready", 170, 0,
            [("ready", 100, 130), ("idle", 130, 170), ("ready", 170, 200)],
        ),
        # ... and one that came afterwards.
        ("ready", [], "idle", 230, 0, [("ready", 100, 200)]),
        ("ready", [(90, 130, "ready", "idle")], "ready", 230, 0,
         [("ready", 100, 130), ("idle", 130, 200)]),
        # A state that ended before the trace began, in the time that all threads take to join in.
        ("ready", [(90, 99, "ready", "idle")], "idle", 99, 0, [("idle", 100, 200)]),
        # Changes were lost.
        ("ready", [], "processing", 150, 3, [("processing", 150, 200)]),
    ],
)  # fmt: skip
def test_states_at_both_ends_of_a_trace(first, events, last, since, lost, shown):
    number = [state.name.lower() for state in ts.State].index
    rows = [(b, e, -1, 1, number(after), 0, number(state)) for b, e, state, after in events]
    track = SimpleNamespace(
        sphere=5,
        name="",
        native_id=1,
        first_state=number(first),
        last_state=number(last),
        last_since=since,
        lost=lost,
        events=np.array(rows, trace_recorder._EVENT).tobytes(),
    )
    record = SimpleNamespace(begin=100, end=200, queued=0, tracks=[track])
    slices = trace_recorder._Reader(_core.Topology(2), record, {}).slices()
    assert [(s.name, s.begin_ns, s.end_ns) for s in slices] == shown


def test_arrows_of_work_and_gradients(spheres, tmp_path):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hook = ts.GradientHook(optimizer, spheres)

    def work(k):
        hook.add(k, torch.autograd.grad(model(X[k]).sum(), list(model.parameters())))

    wait_until_idle(spheres)
    with spheres.trace() as trace:
        spheres.map(work, range(12))
        optimizer.step()
    check_trace(trace, spheres)
    gradients = [a for a in trace.arrows if a.kind == "gradient"]
    assert sorted(a.source for a in gradients) == list(range(1, 13))
    assert {a.target for a in gradients} == {-1}  # this thread adds them up
    assert phases_in(trace) == {("sum", None): 1}
    trace.save(tmp_path / "run.json")
    data = load(tmp_path / "run.json")
    check_file(data)
    flows = Counter(e["cat"] for e in data["traceEvents"] if e["ph"] == "s")
    assert flows == Counter(a.kind for a in trace.arrows)


# ---- phases ----


def test_phases_of_shards_are_on_the_sphere_that_ran_them(spheres):
    model = ts.SphereParallel(network(), spheres)
    loss = nn.CrossEntropyLoss()
    y = torch.zeros(36, dtype=torch.long)
    with spheres.trace() as trace:
        loss(model(X), y).backward()
        model.forward_backward(loss, X, y)
        with torch.no_grad():
            model(X)
    by_sphere = check_trace(trace, spheres)
    expected = {("sum", None): 2}
    for k in range(12):
        expected |= {("forward", k): 3, ("backward", k): 2, ("sum", k): 2, ("loss", k): 1}
    assert phases_in(trace) == expected
    (main,) = {s.sphere for s in trace.slices if (s.name, s.item) == ("sum", None)}
    assert main == -1
    for sphere, slices in by_sphere.items():
        for s in slices:
            if s.kind == "phase" and s.item is not None:
                assert sphere > 0
                assert any(
                    t.kind == "item" and t.begin_ns <= s.begin_ns and s.end_ns <= t.end_ns
                    for t in slices
                )
    gradients = [a for a in trace.arrows if a.kind == "gradient"]
    assert {a.target for a in gradients} >= {main}, "the last ones are added by who waits"
    for arrow in gradients:
        assert arrow.source > 0 and arrow.source != arrow.target
        sums = [
            s
            for s in by_sphere[arrow.source]
            if s.name == "sum" and s.begin_ns <= arrow.sent_ns <= s.end_ns
        ]
        assert len(sums) == 1, "an arrow begins where the shard's gradients were handed over"
    assert trace.threads == {-1: "MainThread"}


def test_phases_on_the_calling_thread_have_a_track_of_its_name(spheres, monkeypatch):
    model = ts.SphereParallel(network(), spheres)
    alone = Plan(12, 0)
    monkeypatch.setattr("torch_spheres.training.engine.reproducible_ways", lambda *_: [alone])

    def step():
        model(X).sum().backward()

    with spheres.trace() as trace:
        thread = threading.Thread(target=step, name="my own loop")
        thread.start()
        thread.join()
        step()
    check_trace(trace, spheres)
    assert trace.threads == {-1: "my own loop", -2: "MainThread"}
    assert phases_in(trace)["forward", 3] == phases_in(trace)["backward", 3] == 2
    assert {s.sphere for s in trace.slices if s.kind == "phase"} == {-1, -2}


def test_bits_do_not_depend_on_being_traced(spheres):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    model = ts.SphereParallel(module, spheres)

    def gradients():
        torch.manual_seed(1)
        model.zero_grad()
        model(X).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients()
    with spheres.trace():
        traced = gradients()
    assert all(torch.equal(a, b) for a, b in zip(plain, traced, strict=True))


def test_what_a_helper_runs_stands_on_the_track_of_its_thread(spheres):
    shards = [torch.ones(600_000) for _ in range(12)]
    with spheres.trace() as trace:
        while spheres.stats()[0].items_run == 0:  # the others may have been faster
            ts.tree_sum(shards, spheres=spheres)
    stats = spheres.stats()
    check_trace(trace, spheres)
    assert items_in(trace) == stats.items_run
    assert steals_in(trace) == stats.items_stolen
    helped = [s for s in trace.slices if s.sphere < 0]
    assert len(helped) == stats[0].items_run > 0
    assert {s.name for s in helped} == {"sum piece"}
    assert {trace.threads[s.sphere] for s in helped} == {"MainThread"}


def test_what_a_loader_does_is_in_the_trace(spheres):
    class Slow(torch.utils.data.Dataset):
        def __len__(self):
            return 40

        def __getitem__(self, index):
            time.sleep(0.0005)
            return index

    with spheres.trace() as trace:
        batches = list(ts.wrap(DataLoader(Slow(), batch_size=10, num_workers=2), spheres))
        rows = TensorDataset(torch.randn(50_000, 64))
        list(ts.wrap(DataLoader(rows, batch_size=20_000, shuffle=True), spheres))
    assert len(batches) == 4
    spheres.wait()
    check_trace(trace, spheres)
    assert {s.name for s in trace.slices if s.kind == "item"} == {"gather"}
    assert [s.name for s in trace.slices].count("load") >= 4  # on the workers' own rows
    assert items_in(trace) <= spheres.stats().items_run
