"""Torch's own threads make room for the spheres, and come back."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading

import fork_server
import pytest
import torch

import torch_spheres as ts
from torch_spheres.runtime import openmp
from torch_spheres.runtime.openmp import openmp_threads_asleep
from torch_spheres.training.autotune import Plan


@pytest.fixture
def _four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def product(x):
    return torch.nn.functional.linear(x, x)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="with one core no thread spins")
def test_the_callers_openmp_threads_sleep_and_work_on_afterwards():
    """In a process of its own: with other teams about, an OpenMP thread does not spin for long."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}  # see conftest.py
    done = subprocess.run(
        [sys.executable, "-P", "-c", SPINNING],
        env=environment, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert (done.stdout.split(), done.stderr) == (["True", "True", "True", "2"], "")


SPINNING = """
import contextlib, time, torch
from pathlib import Path
from torch_spheres.runtime.openmp import openmp_threads_asleep

def threads():
    return {path.name for path in Path("/proc/self/task").iterdir()}

def on_core(helper):  # nanoseconds
    return int(Path(f"/proc/self/task/{helper}/schedstat").read_text().split()[0])

def used_in(block):
    used = 0
    for _ in range(30):
        torch.nn.functional.linear(x, x)
        with block():
            before = on_core(helper)
            time.sleep(0.02)
            used += on_core(helper) - before
    return used

torch.set_num_threads(2)
x = torch.randn(512, 512)
known = threads()
expected = torch.nn.functional.linear(x, x)
(helper,) = threads() - known
print(used_in(contextlib.nullcontext) > 4 * used_in(openmp_threads_asleep))
print(torch.equal(torch.nn.functional.linear(x, x), expected))
print(threads() == known | {helper}, torch.get_num_threads())
"""


@pytest.mark.usefixtures("_four_threads")
def test_an_error_in_the_block_lets_them_go():
    x = torch.randn(512, 512)
    expected = product(x)
    with pytest.raises(KeyError, match="mine"), openmp_threads_asleep():
        raise KeyError("mine")
    with openmp_threads_asleep(), openmp_threads_asleep():
        pass  # a region within a region has one thread
    assert torch.equal(product(x), expected)


@pytest.mark.usefixtures("_four_threads")
def test_ctrl_c_at_any_moment_lets_them_go():
    def alarm(*_):
        raise KeyboardInterrupt

    x = torch.randn(512, 512)
    expected, interrupts, blocks = product(x), 0, 0
    before = signal.signal(signal.SIGALRM, alarm)
    try:
        while interrupts < 100:
            with contextlib.suppress(KeyboardInterrupt):
                try:
                    signal.setitimer(signal.ITIMER_REAL, 1e-5 + 1e-6 * (blocks % 200))
                    blocks += 1
                    for _ in range(1000):
                        with openmp_threads_asleep():
                            pass
                except KeyboardInterrupt:
                    interrupts += 1
        signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert torch.equal(product(x), expected)
    assert torch.get_num_threads() == 4


def test_each_calling_thread_has_its_own():
    x = torch.randn(512, 512)
    results = []

    def call():
        for _ in range(50):
            with openmp_threads_asleep():
                pass
            results.append(product(x).sum().item())

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(results) == 200 and len(set(results)) == 1


def test_nothing_is_held_with_one_thread_or_without_openmp(monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert isinstance(openmp_threads_asleep(), contextlib.nullcontext)
        torch.set_num_threads(2)
        assert not isinstance(openmp_threads_asleep(), contextlib.nullcontext)
        for name, value in [
            ("_FUNCTIONS", ("GOMP_no_such_function",)),
            ("torch.__config__.parallel_info", lambda: "ATen parallel backend: native thread pool"),
        ]:
            with monkeypatch.context() as patch:
                openmp._addresses.cache_clear()
                patch.setattr(name if "." in name else f"{openmp.__name__}.{name}", value)
                assert isinstance(openmp_threads_asleep(), contextlib.nullcontext)
            openmp._addresses.cache_clear()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("workers", "blocks"), [(1, 0), (2, 2)])
def test_shards_on_several_spheres_have_their_cores(monkeypatch, workers, blocks):
    begun = []

    @contextlib.contextmanager
    def asleep():
        begun.append(1)
        yield

    monkeypatch.setattr("torch_spheres.training.executor.openmp_threads_asleep", asleep)
    plan = Plan(12, workers)
    monkeypatch.setattr("torch_spheres.training.engine.reproducible_ways", lambda *_: [plan])
    with ts.KissingSpheres(concurrency=2) as spheres:
        model = ts.SphereParallel(torch.nn.Linear(3, 3), spheres)
        model(torch.randn(24, 3)).sum().backward()
        assert len(begun) == blocks  # of the forward, and of the backward
        assert model.plan == plan.name


def test_a_sphere_whose_first_python_comes_as_the_interpreter_ends():
    """From Python 3.12 on nobody can start a thread then; what else goes wrong is an error."""
    done = fork_server.run("""
import threading, torch
from torch_spheres.runtime import thread_hooks

def refuse(self):
    raise RuntimeError(text)

threading.Thread.start = refuse
text = "can't create new thread at interpreter shutdown"
thread_hooks._enter("sphere 0")
text = "can't start new thread"
torch.set_num_threads(3)
try:
    thread_hooks._enter("sphere 0")
except RuntimeError as error:
    print(error)
print(torch.get_num_threads())
""")
    assert (done.stdout, done.stderr) == ("can't start new thread\n3\n", "")


FORKS = """
import os, signal, sys, time, torch, torch_spheres as ts
from torch import nn
torch.set_num_threads(2)
x = torch.randn(24, 4)

def train(wrapped):
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    if wrapped:
        model = ts.SphereParallel(model, ts.KissingSpheres(levels=2, concurrency=2))
    for _ in range(4):
        model(x).square().mean().backward()

def kernel():
    (torch.ones(2_000_000) + 1).sum()

before, child = sys.argv[1:]
acts = {"kernel": kernel, "spheres": lambda: train(True), "plain": lambda: train(False)}
acts.get(before, lambda: None)()
pid = os.fork()
if pid == 0:
    train(child == "spheres")
    os._exit(7)
for _ in range(600):
    done, status = os.waitpid(pid, os.WNOHANG)
    if done:
        break
    time.sleep(0.05)
else:
    os.kill(pid, signal.SIGKILL)
    sys.exit("the child hangs")
assert os.waitstatus_to_exitcode(status) == 7
"""


@pytest.mark.parametrize("before", ["nothing", "kernel", "plain", "spheres"])
@pytest.mark.parametrize("child", ["plain", "spheres"])
def test_a_child_of_a_process_with_threads_trains_a_small_model(before, child):
    """A parallel region would wait for threads that the parent had; small models have none."""
    done = fork_server.run(FORKS, before, child)
    assert done.returncode == 0, done.stderr


def test_a_child_that_is_forked_while_shards_run_ends():
    done = fork_server.run("""
import os, signal, time, torch, torch_spheres as ts
from torch import nn
torch.set_num_threads(2)

class Slow(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(20, 3)
    def forward(self, x):
        time.sleep(0.02)
        return self.layer(x)

model = ts.SphereParallel(Slow(), ts.KissingSpheres(levels=2, concurrency=2))
x = torch.randn(96, 20)
model(x).sum().backward()
children = []
def fork(*_):
    pid = os.fork()
    if pid == 0:
        raise SystemExit(7)
    children.append(pid)
signal.signal(signal.SIGALRM, fork)
signal.setitimer(signal.ITIMER_REAL, 0.03)
while not children:
    model(x).sum().backward()
assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 7
""")
    assert done.returncode == 0, done.stderr
