"""KissingSpheres that are dropped, forked or left running when nobody can wait for their items.

Each script runs in a process of its own, which must end.
"""

from __future__ import annotations

import fork_server
import pytest

HEADER = """
import ctypes, os, signal, sys, threading, time, types
import torch_spheres as ts
from torch_spheres import _core
LIMIT = 60

def eventually(condition):
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.001)

def main_calls(name):  # whether the main thread is in a function of that name
    frame = sys._current_frames().get(threading.main_thread().ident)
    while frame is not None and frame.f_code.co_name != name:
        frame = frame.f_back
    return frame is not None
"""


def run(script: str) -> tuple[str, str]:
    """Runs a script that must end well; what it printed, and its complaints."""
    # (From 3.12 on Python warns of fork() with threads, which is what one script is about.)
    done = fork_server.run(HEADER + script, warn=(("ignore", "This process"),))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, done.stderr


# ---- the interpreter's end ----

# What threads do that are left running: each comes for the GIL again and again, or once.
LATE = {
    "in a work item": """
def item(_):
    begun.set()
    while True:
        time.sleep(0.001)
spheres.distribute_work([0], item)
""",
    "after an item that fails": """
class Slow(Exception):
    def __repr__(self):
        begun.set()
        while True:
            time.sleep(0.001)
def item(error):
    raise error
spheres.distribute_work([Slow()], item)
""",
    "in an item's end": """
class Item:
    def __del__(self):
        begun.set()
        while True:
            time.sleep(0.001)
spheres.distribute_work([Item()], id)
""",
    "with the last of a batch": """
libc = ctypes.CDLL(None)
libc.fdopen.restype = ctypes.c_void_p
address = ctypes.cast(libc.getc, ctypes.c_void_p).value
getc = ts.NativeFunction(address, libc.fdopen(read, b"r"), owner=libc)
core = _core.System(levels=2, concurrency=1)  # that nobody stops
core.start()
core.submit_native(getc, [0])
eventually(lambda: any(s.state is ts.State.PROCESSING for s in core.stats()))
late = sys.modules["late"]  # whose objects go in this order
late._core, late.last = core, late.__dict__.pop("last")
del core, late
spheres.distribute_work([0], lambda _: (begun.set(), threading.Event().wait()))
""",
    "in a wait": """
others = ts.KissingSpheres()
threading.Thread(target=others.receive, args=(0,), daemon=True).start()
spheres.distribute_work([0], lambda _: (begun.set(), threading.Event().wait()))
""",
}


@pytest.mark.parametrize("script", [pytest.param(LATE[what], id=what) for what in LATE])
def test_ctrl_c_at_the_exit_leaves_threads_that_come_too_late(script: str) -> None:
    out, err = run(f"""
read, write = os.pipe()
class Late:  # dies while the interpreter is torn down; lets all others ask for the GIL then
    def __del__(self, write=write, os=os, time=time):
        os.write(write, b"go on")
        time.sleep(1)
        os.write(1, b"torn down")
late = sys.modules["late"] = types.ModuleType("late")  # of its own: a frame may keep this one alive
late.last = Late()
del late
def interrupt():
    eventually(lambda: main_calls("_stop_all"))
    os.kill(os.getpid(), signal.SIGINT)
begun, spheres = threading.Event(), ts.KissingSpheres(concurrency=2)
{script}
begun.wait(LIMIT)
threading.Thread(target=interrupt, daemon=True).start()
""")
    assert out == "torn down"
    assert "KeyboardInterrupt" in err and "Fatal" not in err and "terminate" not in err


# ---- dropped ----


def test_dropping_spheres_with_an_item_that_never_ends_answers_signals() -> None:
    out, err = run("""
def item(_):
    begun.set()
    gate.wait(LIMIT)
def interrupt(number):
    main = f"/proc/self/task/{os.getpid()}/stat"
    eventually(lambda: main_calls("drop") and (
        not os.path.exists(main) or open(main).read().rpartition(")")[2].split()[0] == "S"))
    os.kill(os.getpid(), number)
def drop(spheres):
    spheres.clear()
    for _ in range(10):  # what the handler raises comes before anything else is done
        pass
    sys.exit("was not interrupted")
def leave(*_):
    sys.exit("told to leave")
signal.signal(signal.SIGTERM, leave)
for number, kind in ((signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)):
    begun, gate, spheres = threading.Event(), threading.Event(), [ts.KissingSpheres()]
    spheres[0].distribute_work([0], item)
    begun.wait(LIMIT)
    watcher = threading.Thread(target=interrupt, args=(number,))
    watcher.start()
    try:
        drop(spheres)
    except kind as error:
        print(type(error).__name__)
    watcher.join()
    assert ts.KissingSpheres().map(abs, [-1]) == [1]  # without waiting for the others
    gate.set()
_core.join_dropped()
""")
    assert (out, err) == ("KeyboardInterrupt\nSystemExit\n", "")


def test_two_systems_dropped_on_each_others_threads() -> None:
    out, err = run("""
begun, gate, ended = threading.Barrier(3), threading.Barrier(3), []
def item(others):
    begun.wait(LIMIT)
    gate.wait(LIMIT)
    others.clear()
    ended.append(1)
a, b = ts.KissingSpheres(concurrency=1), ts.KissingSpheres(concurrency=1)
a.distribute_work([[b]], item)
b.distribute_work([[a]], item)
begun.wait(LIMIT)
del a, b
gate.wait(LIMIT)
eventually(lambda: len(ended) == 2)
_core.join_dropped()
print("joined")
""")
    assert (out, err) == ("joined\n", "")


# ---- forked ----


def test_spheres_that_do_not_run_work_in_a_child_whatever_the_parent_does_with_them() -> None:
    out, err = run("""
never = ts.KissingSpheres(concurrency=2)
with ts.KissingSpheres(concurrency=2) as stopped:
    stopped.map(abs, [-1])
waiters = [threading.Thread(target=never.receive, args=(0, LIMIT)) for _ in range(3)]
for waiter in waiters:
    waiter.start()
time.sleep(0.05)  # (sooner or later they hold its lock, or wait for its news)
pid = os.fork()
if pid == 0:
    signal.alarm(LIMIT)
    assert never.map(abs, range(-50, 0)) == [*range(50, 0, -1)]
    never.epoch()
    never.stop()
    del never
    try:
        stopped.map(abs, [-1])
        sys.exit("were stopped")
    except ts.StoppedError:
        pass
    with stopped:
        assert stopped.map(abs, [-1]) == [1]
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
for _ in waiters:
    never.send(1, 0, "go on")
for waiter in waiters:
    waiter.join(LIMIT)
print("forked")
""")
    assert (out, err) == ("forked\n", "")
