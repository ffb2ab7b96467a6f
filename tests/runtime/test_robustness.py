"""KissingSpheres under abuse: signals, exits, forks, leaks, races, garbage in.

What would take this process along runs in one of its own.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fork_server
import pytest
from system_support import LIMIT, eventually, fail, in_thread

from torch_spheres import KissingSpheres, NativeFunction, usable_cores

HEADER = """
import contextlib, gc, os, signal, sys, threading, time, warnings
import torch_spheres as ts
"""
needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")


def run(script: str) -> str:
    """Runs a script that must end well and silently; returns what it printed."""
    # (From 3.12 on Python warns of fork() with threads, which is what some scripts are about.)
    done = fork_server.run(HEADER + script, warn=(("ignore", "This process"),))
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done.stdout


# ---- signals, exits, forks ----


def test_ctrl_c_is_answered_by_every_call_that_waits() -> None:
    out = run("""
begun, gate = threading.Event(), threading.Event()
def item(_):
    begun.set()
    gate.wait()  # without end: only Ctrl-C ends the wait for it
def interrupt():
    begun.wait()
    main = f"/proc/self/task/{os.getpid()}/stat"
    while os.path.exists(main) and open(main).read().rpartition(")")[2].split()[0] != "S":
        time.sleep(0.001)  # until the main thread sleeps
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
        if name != "map":
            work = spheres.distribute_work([0], item)
        if name == "stop":
            begun.wait(60)
        watcher.start()
        call()
        sys.exit(f"{name} was not interrupted")
    except KeyboardInterrupt:
        print(name)
    watcher.join()
    gate.set()
    if name == "stop":
        spheres.stop()
        spheres.start()
    spheres.wait(60)
    assert spheres.map(abs, range(-9, 0)) == list(range(9, 0, -1)), name
""")
    assert len(out.split()) == 8


def test_interpreter_exit_is_clean_whatever_the_spheres_do() -> None:
    # Each case ends in a fork of its own, the first with what the fork server has imported, too.
    run(r"""
busy = '''
def item(_):
    begun.set()
    time.sleep(0.01)
def lend(spheres):  # only the function knows them
    return lambda _: (time.sleep(0.01), spheres.leaves)
begun, spheres = threading.Event(), ts.KissingSpheres(levels=3)
spheres.distribute_work(range(10_000), item)
begun.wait(60)
'''
cases = [
    ("gc.unfreeze()", 0, ""), ("sys.exit(3)", 3, ""),
    ("raise SystemError('mine')", 1, "SystemError: mine\n"),
    ("spheres.stop()", 0, ""), ("gc.collect(); spheres = 0; gc.collect()", 0, ""),
    ("threading.excepthook = lambda _: None;"  # StoppedError
     "threading.Thread(target=spheres.wait, daemon=True).start()", 0, ""),
    ("spheres.distribute_work(range(50), lend(spheres)); del spheres", 0, ""),
    ("del spheres; other = ts.KissingSpheres(); other.distribute_work([0], lend(other)); del other;"
     "time.sleep(0.01)", 0, ""),
]
for code, status, error in cases:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(write, 2)
        os.close(write)
        warnings.simplefilter("ignore", RuntimeWarning)
        exec(busy + code)
        sys.exit()
    os.close(write)
    told = open(read).read()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == status, (code, told)
    assert told.endswith(error) if error else told == "", (code, told)
""")


def test_a_forked_child_is_told_and_can_start_anew() -> None:
    out = run("""
import multiprocessing
from torch_spheres.runtime import sphere_threads, thread_hooks
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
             lambda: spheres.distribute_work([1], ts.NativeFunction(1)), lambda: spheres.receive(0)]
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
while len(sphere_threads._live) > 1:
    time.sleep(0.01)
with thread_hooks._lock:  # as a sphere does that just begins
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
def name(task):
    with contextlib.suppress(OSError):  # it has just ended
        return open(f"/proc/self/task/{task}/comm").read()
    return ""
def spheres_listed():
    return [n for n in map(name, os.listdir("/proc/self/task")) if n.startswith("sphere ")]
def state():
    gc.collect()
    end = time.monotonic() + 60
    while spheres_listed():  # those that were joined may stay on the kernel's list for a moment
        assert time.monotonic() < end, spheres_listed()
        time.sleep(0.01)
    tasks = len(os.listdir("/proc/self/task"))
    return tasks, len(os.listdir("/proc/self/fd")), threading.active_count()
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
        if i == warm:
            before, memory = state(), resident()
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
# Without the GIL Python has a heap for each thread that has run any: some 64 KiB for each sphere,
# and twice that for those that have run at the same time.
limit = 80 if getattr(sys, "_is_gil_enabled", lambda: True)() else 380
before = resident()
spheres = ts.KissingSpheres(levels=4, concurrency=4)
for _ in range(2):
    with spheres:
        assert spheres.map(abs, range(4000)) == list(range(4000))
        assert spheres.epoch() and len(os.listdir("/proc/self/task")) >= 1885
        added = resident() - before
        end, told = time.monotonic() + 60, -1
        while True:  # until all that the epoch woke sleep
            time.sleep(0.2)
            stats, last = spheres.stats(), told
            told = stats.messages
            assert time.monotonic() < end
            if told == last and {s.state for s in stats} == {ts.State.IDLE}:
                break
        begin = time.process_time()
        time.sleep(1)
        used = time.process_time() - begin
        print(f"{added:.1f} MiB, {100 * used:.2f} % CPU")
        assert added < limit and used < 0.01
""")
    )


# ---- races ----


def test_items_whose_end_submits_work() -> None:
    ended: list[int] = []

    class Item:
        def __del__(self) -> None:
            time.sleep(0.001)  # hands the GIL on
            spheres.distribute_work([1], ended.append)

    with KissingSpheres(concurrency=3) as spheres:
        joins = [
            in_thread(lambda: [spheres.distribute_work([Item()], id) for _ in range(10)])
            for _ in range(3)
        ]
        for join in joins:
            join()
        eventually(lambda: spheres.wait(LIMIT) or len(ended) == 30)


# ---- garbage ----


class UnprintableError(Exception):
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


class SurrogateError(Exception):
    def __repr__(self) -> str:
        return "\ud800"


class SlowReprError(Exception):
    def __repr__(self) -> str:
        time.sleep(0.01)  # hands the GIL to the next one that fails
        return "SlowReprError()"


class NoNotesError(Exception):
    def add_note(self, note: str) -> None:
        raise RuntimeError("no notes")


MISSHAPED = [UnprintableError, SurrogateError, SlowReprError, NoNotesError]
SPECIAL = [KeyboardInterrupt, SystemExit, StopIteration, GeneratorExit]


@pytest.mark.parametrize("kind", [*MISSHAPED, *SPECIAL])
def test_any_exceptions_of_leaves_that_fail_at_once_come_back(kind: type[BaseException]) -> None:
    def work_function(item: BaseException) -> None:
        meet.wait()
        raise item

    meet = threading.Barrier(4, timeout=LIMIT)
    with KissingSpheres(concurrency=4) as spheres:
        items = [kind() for _ in range(4)]
        with pytest.raises(kind) as caught:
            spheres.map(work_function, items)
        assert any(caught.value is item for item in items)
        notes = getattr(caught.value, "__notes__", None) or [""] + ["also: "] * 3
        assert sorted(note.startswith("also: ") for note in notes) == [False, True, True, True]
        assert spheres.map(abs, [-1]) == [1]


LONG = ["x" + "ä" * 200, "xx" + "\U0001f600" * 200, [None] * 999]


@pytest.mark.parametrize("item", [*LONG, "\0", b"\xff", None])
def test_the_note_shows_any_item_in_short(item: Any) -> None:
    with KissingSpheres() as spheres, pytest.raises(LookupError) as caught:
        spheres.map(fail, [item])
    note = caught.value.__notes__[0]
    assert repr(item)[:97] in note and len(note) < 160


def garbage() -> Iterator[tuple[type[Exception], Callable[[Any], Any], Any]]:
    spheres, huge, native = KissingSpheres(), 2**70, NativeFunction(1)
    work = spheres.distribute_work([], abs)
    calls: list[tuple[type[Exception], Callable[[Any], Any], list[Any]]] = [
        (ValueError, lambda v: KissingSpheres(levels=v), [0, 5, -1, huge]),
        (TypeError, lambda v: KissingSpheres(levels=v), [2.5, "2", True, None, [2]]),
        (ValueError, lambda v: KissingSpheres(concurrency=v), [0, -3, -huge]),
        (TypeError, lambda v: KissingSpheres(concurrency=v), [1.5, "2", False]),
        (TypeError, lambda v: spheres.distribute_work(v, abs), [5, None, abs]),
        (TypeError, lambda v: spheres.distribute_work(v, native), [5, [1, 2.5], ["7"], [True]]),
        (OverflowError, lambda v: spheres.distribute_work(v, native), [[1, huge], [-huge]]),
        (TypeError, lambda v: spheres.distribute_work([1], v), [None, "x", 5]),
        (TypeError, lambda v: spheres.map(v, [1]), [None, "x", 5]),
        (TypeError, lambda v: spheres.map(abs, v), [5]),
        (ValueError, spheres.barrier, [-1, 2, huge]),
        (TypeError, spheres.barrier, [0.5, None, "0"]),
        (ValueError, spheres.receive, [-1, 13, huge]),
        (ValueError, lambda v: spheres.send(v, 0, 1), [-1, 13, huge]),
        (ValueError, lambda v: spheres.send(0, v, 1), [-1, 13, huge]),
        (TypeError, lambda v: spheres.send(0, v, 1), [1.0, None]),
    ]
    waits = [spheres.wait, work.wait, spheres.stop, spheres.epoch]
    for wait in [*waits, lambda v: spheres.barrier(0, v), lambda v: spheres.receive(0, v)]:
        calls += [(ValueError, wait, [-1, float("nan")]), (TypeError, wait, ["x", "5", [1]])]
    for error, call, values in calls:
        yield from ((error, call, value) for value in values)


def test_garbage_is_refused_with_its_value_in_the_message() -> None:
    for error, call, value in garbage():
        with pytest.raises(error) as caught:
            call(value)
        shown = [value, *value] if isinstance(value, list) else [value]
        assert any(repr(one) in str(caught.value) for one in shown), (str(caught.value), value)
    assert KissingSpheres(concurrency=2**70).concurrency == 12  # more than there are means all


def test_an_iterable_that_fails_raises_its_own_error() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise TypeError("mine")

    with pytest.raises(TypeError, match="mine"):
        KissingSpheres().map(abs, items())


QUOTAS = [("max 100000", 6), ("150000 100000", 2), ("1 100000", 1), ("900000 100000", 6)]


@pytest.mark.parametrize(("quota", "cores"), [*QUOTAS, ("", 6), ("a b", 6), (None, 6)])
def test_usable_cores_heeds_affinity_and_quota(
    quota: str | None, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_quota(path: Path) -> str:
        assert path == Path("/sys/fs/cgroup/cpu.max")
        if quota is None:
            raise FileNotFoundError(path)
        return quota

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", read_quota)
        patch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
        affinity = usable_cores()
        patch.delattr(os, "sched_getaffinity")
        patch.setattr(os, "cpu_count", lambda: 6)
        no_affinity = usable_cores()
        patch.setattr(os, "cpu_count", lambda: None)
        unknown = usable_cores()
    assert (affinity, no_affinity, unknown) == (cores, cores, 1)
