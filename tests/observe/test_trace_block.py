"""The block of a trace: when it begins and ends, one at a time, errors, forks."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
from trace_support import check_file, check_trace, items_in, load

import torch_spheres as ts


def test_nothing_is_recorded_outside_of_the_block(spheres):
    spheres.map(abs, range(100))
    with spheres.trace() as trace:
        pass
    spheres.map(abs, range(100))
    assert items_in(trace) == 0
    assert not spheres._core.tracing and spheres._recorder is None
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
    seconds = f"{(trace.end_ns - trace.begin_ns) / 1e9:.3f}"
    told = f"Trace of {seconds} s: {len(trace.slices)} slices, 0 arrows, 0 events lost"
    assert repr(trace) == told and trace.slices


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
        (0, ValueError, "1 to 16777216, got 0"),
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
    assert len(check_file(load(tmp_path / "run.json"))) == 13  # tracks, whichever threads


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
                code = 0 if "in the process that began it" in str(error) else 2
            finally:
                os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0
        spheres.map(abs, range(5))
    assert items_in(trace) == 10
