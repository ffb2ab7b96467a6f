"""KissingSpheres from Python: shape, work, stealing, waiting, errors.

Nothing here depends on how fast the machine is: items meet at events and barriers, and waits have
limits that only a hang reaches.
"""

from __future__ import annotations

import ctypes
import math
import threading
import time
import traceback
from typing import Any

import native_items
import pytest
import torch
from system_support import (  # noqa: F401
    LIMIT,
    TASKS,
    Meeting,
    eventually,
    fail,
    in_thread,
    no_thread_is_left,
    sphere_threads,
)

import torch_spheres as ts
from torch_spheres import KissingSpheres, NativeFunction, _core, usable_cores

# ---- shape ----


@pytest.mark.parametrize(("levels", "total", "leaves"), [(1, 1, 1), (2, 13, 12), (3, 157, 144),
                                                         (4, 1885, 1728)])  # fmt: skip
def test_shape_one_named_thread_per_sphere(levels: int, total: int, leaves: int) -> None:
    spheres = KissingSpheres(levels=levels)
    assert (spheres.levels, spheres.total_spheres, spheres.leaves) == (levels, total, leaves)
    assert spheres.spheres_per_level == (1, 12, 144, 1728)[:levels]
    assert spheres.topology.total == total
    path = spheres.topology.path(spheres.topology.leaf_of_item(1 + 12 * 2 + 144 * 3))
    assert path == [1, 2, 3][: levels - 1]
    assert f"{total} spheres" in repr(spheres) and "not started" in repr(spheres)
    paths = [ts.Topology.path_string(sphere) for sphere in range(total)]
    with spheres:
        eventually(lambda: sorted(sphere_threads()) == sorted(f"sphere {path}" for path in paths))
        ids = spheres.map(lambda _: _core.current_sphere(), range(2 * leaves))
        assert {ts.Topology.level(sphere) for sphere in ids} == {levels - 1}
        names = spheres.map(lambda _: threading.current_thread().name, range(50))
        assert set(names) <= {f"sphere {path}" for path in paths}
        assert "running" in repr(spheres)
    assert "stopped" in repr(spheres)
    # Joined, but the kernel takes a thread off its list only a moment after it let the joiner go.
    eventually(lambda: sphere_threads() == [])


def test_every_public_name_is_there() -> None:
    assert [name for name in ts.__all__ if not hasattr(ts, name)] == []


# ---- work ----


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_every_item_runs_once_and_map_keeps_the_order(levels: int) -> None:
    with KissingSpheres(levels=levels, concurrency=8) as spheres:
        seen: list[int] = []
        for count in (0, 1, 11, 12, 13, 1000):
            seen.clear()
            work = spheres.distribute_work((i for i in range(count)), seen.append)
            assert work.items == count
            spheres.wait(LIMIT)
            assert work.done() and work.cancelled == 0 and sorted(seen) == list(range(count))
            assert spheres.map(lambda x: x * x, iter(range(count))) == [x * x for x in range(count)]
        spheres.wait()  # nothing left: at once


def test_any_object_is_an_item_and_a_result() -> None:
    things = [
        None,
        ValueError("only a value"),
        torch.ones(3),
        (),
        {"a": 1},
        KissingSpheres,
        math.nan,
    ]
    with KissingSpheres() as spheres:
        assert all(a is b for a, b in zip(spheres.map(lambda x: x, things), things, strict=True))
        assert spheres.map(torch.sum, [torch.full((2,), float(i)) for i in range(30)]) == [
            torch.tensor(2.0 * i) for i in range(30)
        ]


def test_many_python_threads_submit_at_once() -> None:
    def submit(base: int) -> int:
        total: list[int] = []
        for batch in range(20):
            work = spheres.distribute_work(range(base, base + 50), total.append)
            if batch % 2:
                work.wait(LIMIT)
            assert spheres.map(abs, range(-7, 0)) == list(range(7, 0, -1))
        spheres.wait(LIMIT)
        assert len(total) == 20 * 50
        return sum(total)

    with KissingSpheres(levels=3, concurrency=4) as spheres:
        joins = [in_thread(lambda base=1000 * i: submit(base)) for i in range(6)]
        sums = [join() for join in joins]
        assert sums == [20 * sum(range(1000 * i, 1000 * i + 50)) for i in range(6)]
        assert spheres.stats().items_run == 6 * 20 * 57


def test_more_batches_than_fit_make_the_submitter_wait() -> None:
    gate, ran = threading.Event(), []
    with KissingSpheres(concurrency=2) as spheres:
        spheres.distribute_work([0], lambda _: gate.wait(LIMIT))
        works: list[ts.Work] = []

        def submit() -> None:
            works.extend(spheres.distribute_work([i], lambda i: (gate.wait(LIMIT), ran.append(i)))
                         for i in range(3 * 64))  # fmt: skip
            spheres.wait(LIMIT)

        join = in_thread(submit)
        time.sleep(0.05)
        gate.set()
        join()
    assert sorted(ran) == list(range(3 * 64)) and all(w.done() for w in works)


def test_one_slow_item_holds_up_no_other_batch() -> None:
    gate, batches = threading.Event(), 3 * 64
    with KissingSpheres(concurrency=2) as spheres:
        slow = spheres.distribute_work([1], lambda _: gate.wait(LIMIT))
        mapped = in_thread(lambda: [spheres.map(abs, [-i]) for i in range(batches)])
        try:
            assert mapped() == [[i] for i in range(batches)]

            def hand_out(_: object) -> list[bool]:  # in an item: there is room, one at a time
                works = [spheres.distribute_work([1], abs) for _ in range(60)]
                return [work.cancelled == 0 for work in works]

            assert spheres.map(hand_out, [0]) == [[True] * 60]
        finally:
            gate.set()
        slow.wait(LIMIT)


def test_wait_also_waits_for_work_handed_out_by_items() -> None:
    ran: list[int] = []

    def grow(depth: int) -> None:
        ran.append(depth)
        if depth < 5:
            spheres.distribute_work([depth + 1] * 2, grow)

    with KissingSpheres(concurrency=3) as spheres:
        spheres.distribute_work([0], grow)
        spheres.wait(LIMIT)
        assert sorted(ran) == [d for d in range(6) for _ in range(2**d)]


def test_waiting_inside_an_item_is_refused_not_a_deadlock() -> None:
    with KissingSpheres(concurrency=1) as spheres:
        use = [lambda: spheres.map(abs, [1]), lambda: spheres.distribute_work([1], abs).wait()]
        meet = [lambda: spheres.barrier(0), spheres.epoch]
        for call in [*use, *meet, spheres.wait, spheres.stop]:
            with pytest.raises(RuntimeError, match="from inside a work item"):
                spheres.map(lambda _, call=call: call(), [0])
        with pytest.raises(RuntimeError, match="batches are in flight"):
            spheres.map(lambda _: [spheres.distribute_work([1], abs) for _ in range(100)], [0])
        other = KissingSpheres(concurrency=1)  # waiting for others is allowed
        assert spheres.map(lambda n: sum(other.map(abs, range(n))), [3, 4]) == [3, 6]


def test_a_c_function_gets_its_context_and_the_item() -> None:
    seen: list[tuple[int, int]] = []
    kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)
    callback = kind(lambda context, item: seen.append((context, item)))
    address = ctypes.cast(callback, ctypes.c_void_p).value
    function = NativeFunction(address, 4711, owner=callback)
    with KissingSpheres() as spheres:
        spheres.distribute_work([5, -7, 2**40], function).wait(LIMIT)
        spheres.distribute_work(range(100), function)
    assert sorted(seen) == sorted((4711, item) for item in [5, -7, 2**40, *range(100)])
    assert function.address == address


def test_a_thread_that_waits_runs_short_native_items_and_no_long_ones() -> None:
    libc = ctypes.CDLL(None)
    usleep = ctypes.cast(libc.usleep, ctypes.c_void_p).value
    assert usleep is not None
    with KissingSpheres(concurrency=2) as spheres:
        slow = NativeFunction(usleep, 30_000, owner=libc)  # microseconds, and an ignored number
        for _ in range(3):
            spheres.distribute_work(range(4), slow).wait(LIMIT)
        assert spheres.stats()[0].items_run == 0  # it would answer neither Ctrl-C nor its timeout
        short = native_items.nothing()
        for _ in range(1000):
            spheres.distribute_work(range(1000), short).wait(LIMIT)
            if spheres.stats()[0].items_run > 0:
                break
        else:
            pytest.fail("the waiting thread never ran an item")


@pytest.mark.parametrize(
    "items", [range(100_000), range(3, 5000, 7), list(range(5000)), [], iter([4, 4])]
)
def test_native_items_are_counted_and_summed(items: Any) -> None:
    tally = native_items.Tally()
    expected = list(items) if not hasattr(items, "__next__") else [4, 4]
    with KissingSpheres(levels=3, concurrency=8) as spheres:
        spheres.distribute_work(items, tally.function())
        spheres.wait(LIMIT)
    assert (tally.count, tally.sum) == (len(expected), sum(expected))


# ---- concurrency and stealing ----


@pytest.mark.parametrize("concurrency", [1, 2, 5, 12])
def test_exactly_the_allowed_number_of_items_run_at_once(concurrency: int) -> None:
    meeting = Meeting(concurrency)
    with KissingSpheres(levels=3, concurrency=concurrency) as spheres:
        for _ in range(3):  # batches side by side count together
            spheres.distribute_work(range(40), meeting)
        spheres.wait(LIMIT)
    assert meeting.peak == concurrency


def test_concurrency_defaults_to_the_usable_cores_and_ends_at_the_leaves() -> None:
    assert KissingSpheres(levels=4).concurrency == usable_cores()
    assert KissingSpheres(levels=2, concurrency=10**6).concurrency == 12
    assert KissingSpheres(levels=1).concurrency == 1


def test_siblings_steal_the_items_of_a_slow_sphere() -> None:
    # Leaf 0 has every twelfth item.  They go on only when twelve of them run at once: eleven of
    # those must be in other hands.
    slow, ran = Meeting(12), []

    def run(item: int) -> None:
        if item % 12 == 0 and not slow.met.is_set():
            slow(item)
        ran.append(item)

    with KissingSpheres(concurrency=12) as spheres:
        spheres.distribute_work(range(12 * 200), run)
        spheres.wait(LIMIT)
        stats = spheres.stats()
    assert sorted(ran) == list(range(12 * 200))
    assert stats[1].path == "0" and stats[1].items_given >= 11
    assert stats.items_stolen >= 11 and sum(s.items_stolen > 0 for s in stats.spheres) >= 11
    assert stats.items_stolen == stats.total(lambda s: s.items_given)


@pytest.mark.parametrize("portions", [(1, 1), (1,) * 6, (1,) * 12, (2, 3, 1)])
def test_items_that_wait_for_each_other_run_at_once_in_any_portions(
    portions: tuple[int, ...],
) -> None:
    with KissingSpheres(concurrency=12) as spheres:
        for _ in range(1000 if portions == (1, 1) else 100):
            together = threading.Barrier(sum(portions))
            for items in portions:
                spheres.distribute_work(range(items), lambda _, all_=together: all_.wait(LIMIT))
            spheres.wait(LIMIT)


# ---- waiting ----


def test_wait_times_out_and_the_work_goes_on() -> None:
    gate, ran = threading.Event(), []
    with KissingSpheres() as spheres:
        work = spheres.distribute_work(range(30), lambda i: (gate.wait(LIMIT), ran.append(i)))
        for wait in (spheres.wait, work.wait):
            for timeout in (0, 0.02, 0.1):
                begin = time.monotonic()
                with pytest.raises(TimeoutError, match="it goes on"):
                    wait(timeout)
                assert time.monotonic() - begin >= timeout
        assert not work.done()
        gate.set()
        work.wait(math.inf)
        spheres.wait(LIMIT)
    assert sorted(ran) == list(range(30))


# ---- errors ----


def test_an_error_comes_back_as_the_same_object_with_its_traceback_and_a_note() -> None:
    error = ValueError("no")

    def work_function(item: int) -> None:
        if item == 17:
            raise error

    with KissingSpheres() as spheres:
        for call in (
            lambda: spheres.map(work_function, range(30)),
            lambda: spheres.distribute_work(range(30), work_function).wait(),
            lambda: (spheres.distribute_work(range(30), work_function), spheres.wait()),
        ):
            error.__notes__ = []
            with pytest.raises(ValueError, match="no") as caught:
                call()
            assert caught.value is error
            frames = traceback.extract_tb(error.__traceback__)
            assert frames[-1].name == "work_function" and frames[-1].line == "raise error"
            assert len(error.__notes__) == 1
            assert error.__notes__[0].startswith("raised by work item 17 (17) on sphere ")
            assert spheres.map(abs, [-1]) == [1]
        spheres.wait()  # each error was raised once; the end of the block raises none either


@pytest.mark.parametrize("awaited", [False, True])
def test_an_error_of_an_item_that_stop_finds_running_is_not_lost(awaited: bool) -> None:
    begun, stopping = threading.Event(), threading.Event()

    def fail(item: int) -> None:
        begun.set()
        stopping.wait(60)
        raise LookupError(f"item {item}")

    spheres = KissingSpheres(levels=1).start()
    work = spheres.distribute_work([7], fail)
    assert begun.wait(60)
    with pytest.raises(TimeoutError):
        spheres.stop(timeout=0.05)
    stopping.set()
    if awaited:
        with pytest.raises(LookupError, match="item 7"):
            work.wait()
        spheres.stop()
    else:
        with pytest.warns(RuntimeWarning, match=r"had raised LookupError\('item 7'\)"):
            spheres.stop()


def test_the_note_on_an_error_is_not_the_time_of_the_item() -> None:
    shown: list[int] = []

    class Slow:
        def __repr__(self) -> str:
            shown.append(time.perf_counter_ns())
            time.sleep(1)
            return "slow"

    items = [*range(200), Slow()]  # after short items, of which not each looks at the clock
    with KissingSpheres(levels=1) as spheres:
        begin = time.perf_counter_ns()
        with pytest.raises(LookupError) as caught:
            spheres.map(lambda item: [][0] if isinstance(item, Slow) else None, items)
        assert "slow" in caught.value.__notes__[0]
        assert spheres.stats().items_run == 201
        assert spheres.stats().item_time_ns <= 1.01 * (shown[0] - begin)


def test_items_after_an_error_are_not_run() -> None:
    ran: list[int] = []
    with KissingSpheres(levels=1) as spheres:
        work = spheres.distribute_work(range(1000), lambda i: fail(i) if i == 10 else ran.append(i))
        with pytest.raises(LookupError):
            spheres.wait(LIMIT)
        assert ran == list(range(10)) and work.cancelled == 989 and work.done()


def test_an_error_in_map_leaves_other_batches_alone() -> None:
    gate, ran = threading.Event(), []
    with KissingSpheres(concurrency=4) as spheres:
        spheres.distribute_work(range(3), lambda i: (gate.wait(LIMIT), ran.append(i)))
        with pytest.raises(LookupError):
            spheres.map(fail, range(5))
        gate.set()
        spheres.wait(LIMIT)
    assert sorted(ran) == [0, 1, 2]
