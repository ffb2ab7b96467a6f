"""Torch's own threads make room for the spheres, and come back."""

from __future__ import annotations

import time
from pathlib import Path

import fork_server
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import torch_spheres as ts
from torch_spheres.runtime import openmp
from torch_spheres.runtime.openmp import start_openmp_threads
from torch_spheres.training import autotune
from torch_spheres.training.autotune import Plan


def threads():
    return {path.name for path in Path("/proc/self/task").iterdir()}


def test_rest_ends_the_openmp_threads_and_the_next_kernel_makes_new_ones():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        assert openmp._pause_function() is not None, (
            "torch 2.13 comes with an OpenMP that can pause"
        )
        x, w = torch.randn(512, 512), torch.randn(512, 512)
        idle = threads()
        product = torch.nn.functional.linear(x, w)
        helpers = threads() - idle
        assert helpers
        openmp.stop_openmp_threads()
        deadline = time.monotonic() + 10
        while helpers & threads() and time.monotonic() < deadline:
            time.sleep(0.01)  # a joined thread leaves the list a moment later
        assert not helpers & threads()
        openmp.stop_openmp_threads()  # nothing to end is no error
        assert torch.equal(torch.nn.functional.linear(x, w), product)
        assert threads() - idle - helpers and torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kept", [False, True])
def test_a_plan_says_whether_they_are_ended_before_the_shards_run(monkeypatch, kept):
    ends = []
    monkeypatch.setattr(
        "torch_spheres.training.executor.stop_openmp_threads", lambda: ends.append(1)
    )
    plan = Plan(12, 2, keeps_openmp=kept)
    monkeypatch.setattr("torch_spheres.training.engine.reproducible_ways", lambda *_: [plan])
    with ts.KissingSpheres(concurrency=2) as spheres:
        model = ts.SphereParallel(torch.nn.Linear(3, 3), spheres)
        model(torch.randn(24, 3)).sum().backward()
        assert len(ends) == (0 if kept else 2)  # before the forward, and before the backward
        assert model.plan == plan.name


@pytest.mark.parametrize(
    ("plan", "starts"), [(Plan(12, 2), 2), (Plan(12, 2, keeps_openmp=True), 0)]
)
def test_what_is_measured_has_the_price_of_new_threads(monkeypatch, plan, starts):
    made = []
    monkeypatch.setattr(autotune, "start_openmp_threads", lambda: made.append(1))
    output = torch.ones(3, requires_grad=True) * 2
    autotune.Trial(autotune.Tuner([plan, plan]), plan, 3).forward_done([output])
    output.sum().backward()
    assert len(made) == starts  # after the forward, and after the backward


def test_making_threads_again_shows_to_no_mode_of_the_users():
    class Heard(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            heard.append(func)
            return func(*args, **(kwargs or {}))

    heard = []
    with Heard():
        start_openmp_threads()
    with torch.device("meta"):
        start_openmp_threads()
    assert not heard


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
