"""KissingSpheres under abuse: signals, exits, forks, leaks, races, garbage in.

What would take this process along runs in one of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from test_system import LIMIT, eventually, in_thread, sphere_threads

from torch_spheres import KissingSpheres, StoppedError

HEADER = """
import gc, os, signal, sys, threading, time, warnings
import torch_spheres as ts
"""
needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads /proc")  # noqa: PTH110


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=110)
    return process.returncode, out, err


def begin(script: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-X", "faulthandler", "-c", HEADER + script]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(script: str) -> str:
    """Runs a script that must end well and silently; returns what it printed."""
    code, out, err = finish(begin(script))
    assert (code, err) == (0, ""), out
    return out


# ---- signals, exits, forks ----


def test_ctrl_c_is_answered_by_every_call_that_waits() -> None:
    out = run("""
begun, gate, sent = threading.Event(), threading.Event(), 0.0
def item(_):
    begun.set()
    gate.wait(60)
def interrupt():
    global sent
    begun.wait(60)
    time.sleep(0.1)  # most likely it waits by now
    sent = time.perf_counter()
    os.kill(os.getpid(), signal.SIGINT)
spheres = ts.KissingSpheres(concurrency=4)
calls = dict(wait=spheres.wait, map=lambda: spheres.map(item, range(3)), epoch=spheres.epoch,
             receive=lambda: spheres.receive(0), barrier=lambda: spheres.barrier(1),
             room=lambda: [spheres.distribute_work([0], item) for _ in range(100)],
             handle=lambda: work.wait(), stop=spheres.stop)
for name, call in calls.items():
    begun.clear(), gate.clear()
    watcher = threading.Thread(target=interrupt)
    try:
        if name != "map": work = spheres.distribute_work([0], item)
        watcher.start()
        call()
        sys.exit(f"{name} was not interrupted")
    except KeyboardInterrupt:
        print(name, round(1000 * (time.perf_counter() - sent), 1), "ms")
    watcher.join()
    gate.set()
    if name == "stop":
        spheres.stop()
        spheres.start()
    spheres.wait(60)
    assert spheres.map(abs, range(-9, 0)) == list(range(9, 0, -1)), name
""")
    print(out)
    latencies = [float(line.split()[1]) for line in out.splitlines()]
    assert len(latencies) == 8 and max(latencies) < 1000  # 100 on a machine of one's own


def test_interpreter_exit_with_running_spheres_is_clean() -> None:
    start = """
spheres = ts.KissingSpheres(levels=3)
begun = threading.Event()
def item(_):
    begun.set()
    time.sleep(0.01)
spheres.distribute_work(range(10_000), item)
begun.wait(60)
"""
    only_in_fn = "del spheres\n"
    closure = start.replace("begun.set()", "begun.set(), own.leaves") + "own = spheres\n"
    ends = [
        (start, 0, ""),
        (start + "import atexit; atexit.register(os.write, 1, b'end')", 0, "end"),
        (start + "sys.exit(3)", 3, ""),
        (start + "raise SystemError('mine')", 1, ""),
        (start + "spheres.stop(); spheres.start(); spheres.map(abs, range(5))", 0, ""),
        (start + "threading.Thread(target=spheres.wait, daemon=True).start()", 0, ""),
        (start.replace("10_000", "30") + only_in_fn, 0, ""),
        ("""
def lend(spheres):  # only the function knows them, and lets go on one of their own threads
    return lambda _: spheres.leaves
for _ in range(30):
    ts.KissingSpheres().distribute_work([0], lend(ts.KissingSpheres().start()))
    spheres = ts.KissingSpheres()
    spheres.distribute_work(range(5), lend(spheres))
    del spheres
""", 0, ""),
    ]  # fmt: skip
    del closure
    for i in range(0, len(ends), 2):
        pair = [(begin(script), code, out) for script, code, out in ends[i : i + 2]]
        for process, code, out in pair:
            got, printed, err = finish(process)
            warned = err.replace("RuntimeWarning", "") if "call wait() before stop()" in err else ""
            assert (got, printed) == (code, out), err
            assert (code == 1 and err.endswith("SystemError: mine\n")) or err == warned, err


def test_a_forked_child_is_told_and_can_start_anew() -> None:
    out = run("""
import multiprocessing
from torch_spheres import _threads
def refused(call):
    try:
        call()
    except RuntimeError as error:
        return "fork" in str(error)
    return False
def child():
    calls = [spheres.start, spheres.stop, spheres.wait, spheres.epoch, work.wait,
             lambda: spheres.barrier(0), lambda: spheres.map(abs, [1]),
             lambda: spheres.distribute_work([1], abs), lambda: spheres.send(0, 1, 2),
             lambda: spheres.distribute_work([1], ts._core.noop()), lambda: spheres.receive(0)]
    assert [refused(call) for call in calls] == [True] * len(calls)
    assert not spheres.running and len(spheres.stats()) == 13 and repr(spheres)
    with ts.KissingSpheres(concurrency=2) as own:
        assert own.map(abs, range(-50, 0)) == list(range(50, 0, -1))
def dropped_on_its_own_thread():
    spheres = ts.KissingSpheres()
    return spheres, lambda _: spheres.leaves
def reap(pid):
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

spheres, gate = ts.KissingSpheres(concurrency=2), threading.Event()
work = spheres.distribute_work(range(20), lambda _: gate.wait(60))
lost, fn = dropped_on_its_own_thread()
lost.distribute_work([1, 2], fn)
del lost, fn
while any("KissingSpheres(" in repr(s) and s.leaves and s is not spheres for s in list(ts.system._live)):
    time.sleep(0.01)
with _threads._lock:  # as a sphere does that just begins
    pid = os.fork()
    if pid == 0:
        child()
        sys.exit()
reap(pid)
process = multiprocessing.get_context("fork").Process(target=child)
process.start()
process.join(60)
assert process.exitcode == 0
pid = os.fork()
if pid == 0:
    sys.exit()  # with all that the parent has
reap(pid)
gate.set()
spheres.wait(60)
def from_an_item(_):
    pid = os.fork()
    if pid == 0:
        assert ts.KissingSpheres().map(abs, [-3]) == [3] and refused(spheres.epoch)
        os._exit(0)
    reap(pid)
    return 5
print(spheres.map(from_an_item, [0]))
""")
    assert out == "[5]\n"


# ---- leaks ----


@needs_proc
def test_a_thousand_starts_leave_nothing_behind() -> None:
    print(
        run("""
def state():
    gc.collect()
    return (len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd")),
            threading.active_count())
def resident():
    gc.collect()
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
warnings.simplefilter("ignore", ResourceWarning)
spheres = ts.KissingSpheres(concurrency=2)
def again(spheres):
    with spheres:
        assert spheres.map(abs, [-1, -2, 3]) == [1, 2, 3]
for what, count, warm, make in (("starts", 1000, 200, lambda: spheres),
                                ("objects", 200, 50, ts.KissingSpheres)):
    for i in range(count):
        if i == warm: before, memory = state(), resident()
        again(make())
    grown = resident() - memory
    print(what, *before, round(grown, 2), "MiB")
    assert state() == before and grown < 5, (state(), before, grown)
""")
    )


@needs_proc
def test_1885_idle_spheres_are_cheap() -> None:
    print(
        run("""
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
ts.KissingSpheres(levels=1).map(abs, [1])
before = resident()
spheres = ts.KissingSpheres(levels=4, concurrency=4)
for _ in range(3):
    with spheres:
        assert spheres.map(abs, range(4000)) == list(range(4000))
        assert spheres.epoch() and len(os.listdir("/proc/self/task")) >= 1885
        added = resident() - before
        time.sleep(0.2)  # whatever the epoch woke goes to sleep
        begin = time.process_time()
        time.sleep(1)
        used = time.process_time() - begin
        print(f"{added:.1f} MiB, {100 * used:.2f} % CPU")
        assert added < 80 and used < 0.01
""")
    )


def test_functions_items_and_results_are_let_go() -> None:
    class Thing:
        pass

    with KissingSpheres(concurrency=3) as spheres:
        for drain in (spheres.wait, lambda: None):  # waited for or not
            alive: list[weakref.ref[Any]] = []

            def make(number: int, alive: list[weakref.ref[Any]] = alive) -> Thing:
                thing = Thing()
                alive.append(weakref.ref(thing))
                return thing

            work = spheres.distribute_work(map(make, range(20)), lambda t, keep=make(0): id(keep))
            spheres.distribute_work([make(1)], lambda t, keep=make(0): None)
            spheres.distribute_work([], lambda t, keep=make(0): None)
            spheres.map(lambda t, keep=make(0): None, map(make, range(20)))
            results = spheres.map(make, range(5))
            del results
            drain()
            eventually(lambda alive=alive: not any(ref() for ref in alive))
            assert len(alive) == 50 and work.items == 20
        nothing = sys.getrefcount(None)
        spheres.map(lambda _: None, [None] * 10_000)
        assert abs(sys.getrefcount(None) - nothing) < 100


@pytest.mark.parametrize("items", [5, 5000])
def test_dropping_the_last_reference_ends_the_threads(items: int) -> None:
    spheres = KissingSpheres(concurrency=2)
    spheres.distribute_work(range(items), lambda _: time.sleep(0.001))
    assert len(sphere_threads()) > 0
    del spheres
    assert sphere_threads() == []


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


# ---- races ----


def test_start_and_stop_from_many_threads_at_once() -> None:
    for _ in range(20):
        spheres, line = KissingSpheres(levels=3), threading.Barrier(4, timeout=LIMIT)

        def use() -> list[int]:
            line.wait()
            return spheres.map(abs, range(-5, 0))

        def stop() -> None:
            line.wait()
            spheres.stop()

        assert [join() for join in [in_thread(use) for _ in range(4)]] == [[5, 4, 3, 2, 1]] * 4
        for join in [in_thread(stop) for _ in range(4)]:
            join()
        assert not spheres.running


def test_stop_in_the_middle_of_everything() -> None:
    spheres = KissingSpheres(concurrency=4)

    def use(call: Callable[[], Any]) -> None:
        while True:
            call()

    for _ in range(5):
        spheres.start()
        calls = [lambda: spheres.map(abs, range(100)), lambda: spheres.barrier(1), spheres.epoch,
                 lambda: spheres.receive(3), lambda: spheres.distribute_work([1], abs).wait()]  # fmt: skip
        joins = [in_thread(lambda call=call: use(call)) for call in calls]
        time.sleep(0.01)
        spheres.stop()
        for join in joins:
            with pytest.raises(StoppedError):
                join()


def test_items_whose_end_submits_work() -> None:
    ended: list[int] = []

    class Item:
        def __del__(self) -> None:
            time.sleep(0.001)  # hands the GIL on
            spheres.distribute_work([1], ended.append)

    with KissingSpheres(concurrency=3) as spheres:
        joins = [
            in_thread(lambda: [spheres.distribute_work([Item()], id) for _ in range(20)])
            for _ in range(3)
        ]
        for join in joins:
            join()
        eventually(lambda: spheres.wait(LIMIT) or len(ended) == 60)


# ---- garbage ----


class Unprintable(Exception):
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


class Surrogate(Exception):
    def __repr__(self) -> str:
        return "\ud800"


class NoNotes(Exception):
    def add_note(self, note: str) -> None:
        raise RuntimeError("no notes")


@pytest.mark.parametrize(
    "item", [Unprintable(), Surrogate(), NoNotes(), "x" + "ä" * 200, "\0", b"\xff"]
)
def test_items_and_errors_that_cannot_be_shown(item: Any) -> None:
    def work_function(item: object) -> None:
        raise item if isinstance(item, Exception) else LookupError

    meet = threading.Barrier(2, timeout=LIMIT)
    with KissingSpheres(concurrency=2) as spheres:
        kind = type(item) if isinstance(item, Exception) else LookupError
        with pytest.raises(kind):
            spheres.map(work_function, [item])
        with pytest.raises((kind, ValueError)):  # the other one becomes a note
            spheres.map(lambda x: work_function((meet.wait() and x) or x), [item, ValueError()])
        assert spheres.map(abs, [-1]) == [1]


@pytest.mark.parametrize(("error", "call"), [
    *[(kind, lambda v=v: (v, KissingSpheres(levels=v))) for kind, values in (
        (ValueError, (0, 5, -1, 2**70)), (TypeError, (2.5, "2", True, None))) for v in values],
])  # fmt: skip
def test_garbage(error: type[Exception], call: Callable[[], Any]) -> None:
    with pytest.raises(error):
        call()
