"""KissingSpheres from Python: messages, statistics, start and stop."""

from __future__ import annotations

import copy
import dataclasses
import gc
import io
import pickle
import sys
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from system_support import (  # noqa: F401
    LIMIT,
    Meeting,
    eventually,
    fail,
    in_thread,
    no_thread_is_left,
    sphere_threads,
)

from torch_spheres import KissingSpheres, StoppedError

# ---- messages ----


def test_messages_go_along_edges_first_in_first_out() -> None:
    spheres = KissingSpheres(levels=3)
    root, parent, child, sibling, cousin = 0, 1, 13, 14, 25
    for source, target in [(root, parent), (parent, root), (parent, child), (child, parent),
                           (child, sibling), (1, 12)]:  # fmt: skip
        for value in ("first", None, 2**70):
            spheres.send(source, target, value)
        assert [spheres.receive(target, 0) for _ in range(3)] == ["first", None, 2**70]
    for source, target in [(root, child), (child, root), (child, cousin), (parent, cousin), (3, 3)]:
        with pytest.raises(ValueError, match=f"{source} .* {target} .* do not touch"):
            spheres.send(source, target, "x")
    stats = spheres.stats()
    assert (
        stats.total(lambda s: s.messages_sent) == stats.total(lambda s: s.messages_received) == 18
    )
    assert not spheres.running  # mail needs no threads


def test_a_full_mailbox_refuses_and_loses_nothing() -> None:
    with KissingSpheres() as spheres:
        with pytest.raises(OverflowError, match="sphere 4 is full: 128 messages"):
            for number in range(1000):
                spheres.send(0, 4, number)
        assert number == 128
        assert [spheres.receive(4) for _ in range(number)] == list(range(number))


def test_receive_waits_times_out_and_ends_with_stop() -> None:
    spheres = KissingSpheres().start()
    for timeout in (0, 0.1):
        with pytest.raises(TimeoutError, match="no message for sphere 7"):
            spheres.receive(7, timeout)
    join = in_thread(lambda: spheres.receive(7))
    spheres.map(lambda _: spheres.send(6, 7, "from an item"), [0])
    assert join() == "from an item"
    join = in_thread(lambda: spheres.receive(7))
    spheres.stop()
    with pytest.raises(StoppedError):
        join()


def test_mail_nobody_reads_is_freed_with_the_spheres() -> None:
    spheres, value = KissingSpheres(), Meeting(1)
    alive = weakref.ref(value)
    spheres.send(0, 1, value)
    del value
    gc.collect()
    assert alive() is not None
    del spheres
    assert alive() is None


# ---- statistics ----


def test_statistics_are_frozen_and_add_up() -> None:
    with KissingSpheres(levels=3, concurrency=4) as spheres:
        spheres.epoch()  # all threads are there
        t0, before, t1 = time.perf_counter_ns(), spheres.stats(), time.perf_counter_ns()
        spheres.map(lambda _: time.sleep(0.001), range(500))
        assert spheres.stats().items_run == 500
        spheres.epoch()
        t2, after, t3 = time.perf_counter_ns(), spheres.stats(), time.perf_counter_ns()
    for old, new in zip(before.spheres, after.spheres, strict=True):
        assert 0.8 * (t2 - t1) - 1e8 < new.total_ns - old.total_ns < 1.2 * (t3 - t0) + 1e8
        assert new.items_stolen <= new.items_run and 0 <= new.utilization <= 1
    assert after.items_stolen == after.total(lambda s: s.items_given)
    assert after.total(lambda s: s.processing_ns) > 500 * 1e6
    assert len(after) == 157 and after[13].path == "0.0" and after[13].group == 0
    assert after[0].group is None and after.concurrency == 4
    for value, field in ((after, "spheres"), (after[0], "items_run")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, field, 0)


def test_print_stats_is_short_and_names_the_extremes() -> None:
    out = io.StringIO()
    with KissingSpheres(levels=4, concurrency=2) as spheres:
        spheres.map(abs, range(100))
        spheres.print_stats(out)
        assert out.getvalue() == f"{spheres.stats()}\n" or "busy %" in out.getvalue()
    lines = out.getvalue().splitlines()
    assert len(lines) < 30 and max(map(len, lines)) < 100
    assert [
        sum(name in line for line in lines) for name in ("level ", "busiest: ", "idlest: ")
    ] == [4, 3, 3]


# ---- life ----


def test_threads_come_with_the_first_use_and_go_with_stop() -> None:
    spheres = KissingSpheres()
    spheres.wait(), spheres.stop(), spheres.stats()
    assert sphere_threads() == []
    assert spheres.map(abs, [-1]) == [1] and spheres.running
    assert spheres.start() is spheres.start()
    eventually(lambda: len(sphere_threads()) == 13)
    spheres.stop()
    assert not spheres.running
    eventually(lambda: sphere_threads() == [])  # joined, but for a moment the kernel lists them yet
    use = [lambda: spheres.map(abs, [1]), lambda: spheres.distribute_work([1], abs)]
    meet = [spheres.epoch, lambda: spheres.barrier(0), lambda: spheres.receive(0)]
    for call in [*use, *meet]:
        with pytest.raises(StoppedError):
            call()
    with spheres:
        assert spheres.map(abs, [-2]) == [2] and spheres.stats().items_run == 2


def test_a_with_block_waits_for_its_work_and_raises_its_errors() -> None:
    ran: list[int] = []
    with KissingSpheres() as spheres:
        spheres.distribute_work(range(100), lambda i: (time.sleep(0.001), ran.append(i)))
    assert sorted(ran) == list(range(100))
    with pytest.raises(LookupError, match="5"), spheres:
        spheres.distribute_work([5], fail)
    assert not spheres.running


def test_an_exception_in_a_with_block_does_not_wait_for_the_rest() -> None:
    gate, ran = threading.Event(), []
    with pytest.raises(ZeroDivisionError), KissingSpheres(concurrency=1) as spheres:
        work = spheres.distribute_work(range(1000), lambda i: (ran.append(i), gate.wait(LIMIT)))
        eventually(lambda: ran)
        join = in_thread(lambda: (eventually(lambda: work.cancelled), gate.set()))
        _ = 1 / 0
    join()
    assert len(ran) == 1 and work.cancelled == 999 and not spheres.running


def test_stop_tells_how_many_items_were_lost() -> None:
    begun, gate, spheres = threading.Event(), threading.Event(), KissingSpheres(levels=1)
    work = spheres.distribute_work(range(1000), lambda i: (begun.set(), gate.wait(LIMIT)))
    assert begun.wait(LIMIT)
    with pytest.raises(TimeoutError):
        spheres.stop(0)
    gate.set()
    with pytest.warns(RuntimeWarning, match=r"999 work items had not begun .* call wait\(\)"):
        spheres.stop()
    with pytest.raises(StoppedError, match="999 of 1000"):
        work.wait()


def test_stop_tells_of_an_error_that_nobody_waited_for_and_of_no_other() -> None:
    spheres = KissingSpheres(levels=1)
    work = spheres.distribute_work([7], fail)
    eventually(work.done)
    with pytest.warns(RuntimeWarning, match=r"LookupError\(7\), and nobody waited for it"):
        spheres.stop()
    for wait in (lambda work: work.wait(LIMIT), lambda _: spheres.wait(LIMIT)):
        spheres.start()
        with pytest.raises(LookupError):
            wait(spheres.distribute_work([7], fail))
        spheres.stop()  # warns of nothing: warnings are errors here


@pytest.mark.parametrize(
    "wait", [lambda spheres, work: work.wait(), lambda spheres, _: spheres.wait()]
)
def test_stop_leaves_it_to_those_who_wait_to_tell_what_was_lost(wait: Callable[..., None]) -> None:
    begun, gate, spheres = threading.Event(), threading.Event(), KissingSpheres(levels=1)
    work = spheres.distribute_work(range(1000), lambda i: (begun.set(), gate.wait(LIMIT)))
    assert begun.wait(LIMIT)
    join = in_thread(lambda: wait(spheres, work))
    eventually(lambda: spheres._core.waiters(work) == 1)
    with pytest.raises(TimeoutError):
        spheres.stop(0)
    gate.set()
    spheres.stop()
    with pytest.raises(StoppedError, match="999 of 1000"):
        join()


@pytest.mark.parametrize("call", [pickle.dumps, copy.copy, copy.deepcopy])
def test_spheres_are_neither_pickled_nor_copied(call: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match="cannot be pickled or copied"):
        call(KissingSpheres())


@pytest.mark.parametrize("items", [5, 5000])
def test_dropping_the_last_reference_ends_the_threads(items: int) -> None:
    spheres, ran = KissingSpheres(concurrency=2), []
    spheres.distribute_work(range(items), lambda i: (time.sleep(0.001), ran.append(i)))
    eventually(sphere_threads)
    del spheres
    count = len(ran)
    eventually(lambda: sphere_threads() == [])  # joined, but for a moment the kernel lists them yet
    assert len(ran) == count


def test_spheres_dropped_on_their_own_thread_end() -> None:
    def lend(spheres: KissingSpheres) -> Callable[[int], int]:
        return lambda _: spheres.leaves if gate.wait(LIMIT) else 0

    gate = threading.Event()
    spheres = KissingSpheres()
    alive = weakref.ref(spheres)
    spheres.distribute_work(range(20), lend(spheres))
    del spheres
    assert alive() is not None
    gate.set()
    eventually(lambda: sphere_threads() == [] and alive() is None)


def test_start_and_stop_from_many_threads_at_once() -> None:
    def meet(line: threading.Barrier, call: Callable[[], Any]) -> Any:
        line.wait()
        return call()

    for _ in range(20):
        spheres, line = KissingSpheres(levels=3), threading.Barrier(4, timeout=LIMIT)

        use = partial(spheres.map, abs, range(-5, 0))
        for call, result in ((use, [5, 4, 3, 2, 1]), (spheres.stop, None)):
            joins = [in_thread(partial(meet, line, call)) for _ in range(4)]
            assert [join() for join in joins] == [result] * 4
        assert not spheres.running


@pytest.mark.filterwarnings("ignore:stop:RuntimeWarning")
def test_stop_in_the_middle_of_everything() -> None:
    spheres = KissingSpheres(concurrency=4)

    def use(call: Callable[[], Any]) -> None:
        while True:
            call()

    for _ in range(5):
        spheres.start()
        work = [
            lambda: spheres.map(abs, range(99)),
            lambda: spheres.distribute_work([1], abs).wait(),
        ]
        meet = [lambda: spheres.barrier(1), spheres.epoch, lambda: spheres.receive(3)]
        joins = [in_thread(lambda call=call: use(call)) for call in [*work, *meet]]
        time.sleep(0.01)
        spheres.stop()
        for join in joins:
            with pytest.raises(StoppedError):
                join()


def test_functions_items_and_results_are_let_go() -> None:
    class Thing:
        pass

    def id_of(kept: Thing, item: Thing) -> int:
        return id(item)

    with KissingSpheres(concurrency=3) as spheres:
        for drain in (spheres.wait, lambda: None):  # waited for or not
            alive: list[weakref.ref[Any]] = []

            def make(number: int, alive: list[weakref.ref[Any]] = alive) -> Thing:
                thing = Thing()
                alive.append(weakref.ref(thing))
                return thing

            work = spheres.distribute_work(map(make, range(20)), partial(id_of, make(0)))
            spheres.distribute_work([make(1)], partial(id_of, make(0)))
            spheres.distribute_work([], partial(id_of, make(0)))
            spheres.map(partial(id_of, make(0)), map(make, range(20)))
            with pytest.raises(LookupError):
                spheres.map(fail, map(make, range(5)))
            gc.collect()
            drain()
            eventually(lambda alive=alive: not any(ref() for ref in alive))
            assert len(alive) == 50 and work.items == 20
        nothing = sys.getrefcount(None)
        spheres.map(lambda _: None, [None] * 10_000)
        eventually(lambda: abs(sys.getrefcount(None) - nothing) < 1000)


def test_an_error_caught_beside_its_handle_is_collected() -> None:
    class Marker:
        pass

    def catch(spheres: KissingSpheres) -> tuple[weakref.ref[Marker], weakref.ref[Marker]]:
        in_frame, in_item = Marker(), Marker()
        work = spheres.distribute_work([in_item], fail)
        with pytest.raises(LookupError) as caught:
            work.wait()
        gc.collect()  # everything is in use
        with pytest.raises(LookupError) as again:
            work.wait()
        assert again.value is caught.value and again.value.args == (in_item,)
        loop = [caught]  # error -> traceback -> this frame -> error, and -> handle -> error
        return weakref.ref(in_frame), weakref.ref(loop[0].value.args[0])

    with KissingSpheres(levels=1) as spheres:
        alive = catch(spheres)
        gc.collect()
        spheres.distribute_work([0], int).wait()  # takes finished batches off the list
        gc.collect()
        assert [ref() for ref in alive] == [None, None]


def test_the_first_use_waits_for_a_start_that_is_under_way() -> None:
    for _ in range(8):  # with many spheres, so that it takes long
        spheres = KissingSpheres(levels=4)

        def use(spheres: KissingSpheres = spheres) -> list[int]:
            while not spheres._starts:
                pass
            return spheres.map(abs, [-1])

        join = in_thread(use)
        with spheres:
            assert join() == [1]
