"""`KissingSpheres.trace`: against the counters, against the format, against torch's profiler."""

from __future__ import annotations

import os
import re
import threading
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from trace_support import check_file, check_trace, items_in, load, phases_in, steals_in

import torch_spheres as ts
from torch_spheres import _core, recording
from torch_spheres.tuning import Plan

X = torch.randn(36, 8, generator=torch.Generator().manual_seed(0))


def network():
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.fixture
def spheres():
    with ts.KissingSpheres(levels=2, concurrency=3) as made:
        yield made


# ---- against the counters ----


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("concurrency", [1, 2, 5])
def test_as_many_items_and_steals_as_the_counters_say(levels, concurrency, tmp_path):
    with ts.KissingSpheres(levels=levels, concurrency=concurrency) as spheres:
        with spheres.trace() as trace:
            spheres.map(lambda i: time.sleep(0.0002 * (i % 5)), range(50))
            spheres.distribute_work(range(20_000), _core.noop()).wait()
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
    tally = _core.Tally()
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
    spheres.epoch()  # all threads are there
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
        events=np.array(rows, recording._EVENT).tobytes(),
    )
    record = SimpleNamespace(begin=100, end=200, queued=0, tracks=[track])
    slices = recording._Reader(_core.Topology(2), record, {}).slices()
    assert [(s.name, s.begin_ns, s.end_ns) for s in slices] == shown


def test_arrows_of_work_and_gradients(spheres, tmp_path):
    model, optimizer = network(), None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hook = ts.GradientHook(optimizer, spheres)

    def work(k):
        time.sleep(0.001)
        hook.add(k, torch.autograd.grad(model(X[k]).sum(), list(model.parameters())))

    with spheres.trace() as trace:
        spheres.map(work, range(12))
        optimizer.step()
    check_trace(trace, spheres)
    gradients = [a for a in trace.arrows if a.kind == "gradient"]
    assert sorted(a.source for a in gradients) == list(range(1, 13))
    assert {a.target for a in gradients} == {0}
    work = [a for a in trace.arrows if a.kind == "work"]
    assert work and {a.source for a in work} == {0}
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
    monkeypatch.setattr("torch_spheres.parallel.reproducible_ways", lambda *_: [alone])

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
        for _ in range(20):
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
    assert {s.name for s in trace.slices if s.kind == "item"} == {"item", "gather"}
    assert items_in(trace) <= spheres.stats().items_run  # a loader's item may end after the block


# ---- the block ----


def test_nothing_is_recorded_outside_of_the_block(spheres):
    spheres.map(abs, range(100))
    with spheres.trace() as trace:
        pass
    spheres.map(abs, range(100))
    assert items_in(trace) == 0
    assert not spheres._core.tracing and spheres._recording is None
    with spheres.trace() as other:
        spheres.map(abs, range(7))
    assert (items_in(trace), items_in(other)) == (0, 7)


@pytest.mark.parametrize("reading", [lambda t: t.slices, lambda t: t.save("x.json")])
def test_a_trace_cannot_be_read_before_its_block_ends(spheres, reading, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trace = spheres.trace()
    with pytest.raises(RuntimeError, match="when its 'with' block has ended"):
        reading(trace)
    with trace, pytest.raises(RuntimeError, match="when its 'with' block has ended"):
        reading(trace)
    reading(trace)


def test_a_trace_has_a_repr_at_any_time(spheres):
    trace = spheres.trace()
    assert repr(trace) == "Trace, not begun"
    with trace:
        assert repr(trace) == "Trace, being recorded"
    assert re.fullmatch(r"Trace of 0\.\d{3} s: \d+ slices, 0 arrows, 0 events lost", repr(trace))


def test_one_trace_at_a_time(spheres):
    with spheres.trace() as trace:
        with pytest.raises(RuntimeError, match="is being recorded already"), spheres.trace():
            pytest.fail("a trace in a trace")
        spheres.map(abs, range(5))
        with ts.KissingSpheres(levels=1) as others, others.trace() as other:
            others.map(abs, range(6))
    assert (items_in(trace), items_in(other)) == (5, 6)
    with pytest.raises(RuntimeError, match=r"call trace\(\) again"), trace:
        pytest.fail("a trace used twice")


@pytest.mark.parametrize(
    ("capacity", "error", "message"),
    [
        (0, ValueError, "1 to 2.*got 0"),
        (-3, ValueError, "got -3"),
        (2**24 + 1, ValueError, "got 16777217"),
        (1.5, TypeError, "capacity must be an integer, got 1.5"),
        ("9", TypeError, "got '9'"),
        (True, TypeError, "got True"),
    ],
)
def test_bad_capacities(spheres, capacity, error, message):
    with pytest.raises(error, match=message):
        spheres.trace(capacity=capacity)


def test_an_exception_in_the_block_leaves_a_readable_trace(spheres, tmp_path):
    with pytest.raises(KeyError), spheres.trace() as trace:
        spheres.map(abs, range(5))
        raise KeyError
    assert items_in(trace) == 5
    trace.save(tmp_path / "run.json")
    check_file(load(tmp_path / "run.json"))


def test_spheres_are_started_and_may_be_stopped_in_the_block(tmp_path):
    spheres = ts.KissingSpheres(levels=2, concurrency=2)
    with spheres.trace() as trace:
        assert spheres.running
        for _ in range(3):
            spheres.map(abs, range(30))
            spheres.stop()
            time.sleep(0.002)
            spheres.start()
        spheres.stop()
    check_trace(trace, spheres)
    assert items_in(trace) == 90
    assert "terminating" not in {s.name for s in trace.slices}
    trace.save(tmp_path / "run.json")
    data = load(tmp_path / "run.json")
    check_file(data)
    roots = {
        e["tid"]
        for e in data["traceEvents"]
        if e["name"] == "thread_name" and e["args"]["name"] == "sphere root"
    }
    assert len(roots) >= 2  # each start makes new threads


def test_threads_are_known_that_start_as_the_trace_begins():
    for _ in range(30):
        spheres = ts.KissingSpheres(levels=2, concurrency=2)
        with spheres.trace() as trace:
            spheres.epoch()  # all threads are there
        spheres.stop()
        native_ids = trace._parts().native_ids
        assert {s.sphere for s in trace.slices} == set(range(13))
        assert all(native_ids[sphere] for sphere in range(13))


def test_a_large_capacity_takes_no_memory_yet():
    with ts.KissingSpheres(levels=4, concurrency=1) as spheres:
        spheres.epoch()
        before = memory_in_use()
        with spheres.trace(capacity=2**24):
            during = memory_in_use()
    assert during - before < 200e6


def memory_in_use():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_traces_come_and_go_while_threads_work(spheres):
    enough = threading.Event()

    def work():
        while not enough.is_set():
            spheres.map(lambda _: None, range(30))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        found = 0
        for _ in range(50):
            with spheres.trace(capacity=4096) as trace:
                time.sleep(0.001)
            check_trace(trace, spheres)
            found += items_in(trace)
        while not found:
            with spheres.trace() as trace:
                time.sleep(0.01)
            found += items_in(trace)
    finally:
        enough.set()
        for thread in threads:
            thread.join()


def test_a_forked_child_neither_hangs_nor_reads(spheres):
    with spheres.trace() as trace:
        spheres.map(abs, range(5))
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                trace.__exit__(None, None, None)
                trace.slices  # noqa: B018
            except RuntimeError as error:
                code = 0 if "forked" in str(error) else 2
            finally:
                os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0
        spheres.map(abs, range(5))
    assert items_in(trace) == 10
