"""Shards that are too small to be worth it are told of, once, with the way out."""

from __future__ import annotations

import threading
import time
import warnings

import pytest
import torch
from torch import nn

import torch_spheres as ts
from torch_spheres.training.call_arguments import CallArguments
from torch_spheres.training.slow_warning import Adviser


@pytest.fixture(autouse=True)
def one_intra_op_thread():
    """Two that meet, where other programs have the cores, take longer than what is paid here."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Paid(nn.Module):
    """Sleeps for each call, and for each row: what is faster, shards or the whole, is sure."""

    def __init__(self, call: float, row: float) -> None:
        super().__init__()
        self.call, self.row = call, row
        self.norm = nn.BatchNorm1d(3)
        self.calls = 0

    def forward(self, x):
        time.sleep(self.call + self.row * len(x))
        return self.norm(x) + torch.rand(len(x), 1)


def train(call, row, concurrency, steps, **options):
    torch.manual_seed(0)
    heard = []
    hooked = []
    with ts.KissingSpheres(concurrency=concurrency) as spheres:
        module = Paid(call, row)
        module.register_forward_hook(lambda *_: hooked.append(1))
        model = ts.SphereParallel(module, spheres, **options)
        x = torch.randn(24, 3)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in range(steps):
                model(x).sum().backward()
                heard += [step] * (len(caught) > len(heard))
    assert len(hooked) == (12 * steps if not options else len(hooked))
    return heard, caught, (module.norm.running_mean, torch.get_rng_state())


def test_expensive_calls_are_told_of_once():
    heard, caught, state = train(0.02, 0.0, 2, 30)
    assert len(caught) == 1 and heard[0] < 25
    message = str(caught[0].message)
    assert "plain PyTorch would be faster" in message and "reproducible=False" in message
    assert "in 12 shards and" in message and "; shards=2 would take" in message
    assert caught[0].filename == __file__, "the user's line, not one of ours"
    # The measurement left no trace: neither hooks nor buffers nor random numbers.
    quiet = train(0.0, 0.01, 12, 30)
    assert quiet[1] == []
    assert all(torch.equal(a, b) for a, b in zip(state, quiet[2], strict=True))


def test_shards_that_pay_are_not():
    assert train(0.0, 0.01, 12, 20)[1] == []


def test_nothing_is_compiled_for_advice():
    rows = set()

    def backend(graph, _):
        def run(*args):
            rows.update(len(a) for a in args if a.shape[1:] == (3,) and not a.requires_grad)
            return graph.forward(*args)

        return run

    with ts.KissingSpheres(concurrency=1) as spheres:
        compiled = torch.compile(nn.Linear(3, 3), backend=backend)
        model = ts.SphereParallel(compiled, spheres)
        for _ in range(5):
            model(torch.randn(24, 3)).sum().backward()
    assert rows == {2}


def test_choosing_by_itself_needs_no_advice():
    assert train(0.002, 0.0, 2, 40, reproducible=False)[1] == []


@pytest.mark.parametrize("error", [RuntimeError, ValueError, AssertionError])
def test_a_batch_that_only_fits_in_shards_is_no_case_for_advice(error):
    class Limited(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(()))

        def forward(self, x):
            if len(x) > 2:
                raise error("too many rows")
            time.sleep(0.001)
            return self.w * x

    with ts.KissingSpheres(concurrency=2) as spheres:
        model = ts.SphereParallel(Limited(), spheres)
        for _ in range(25):
            model(torch.ones(24, 1)).sum().backward()


@pytest.mark.parametrize("mode", ["eval", "no_grad"])
def test_evaluation_is_left_alone(mode):
    with ts.KissingSpheres(concurrency=2) as spheres:
        model = ts.SphereParallel(Paid(0.001, 0), spheres).train(mode != "eval")
        with torch.set_grad_enabled(mode != "no_grad"):
            for _ in range(20):
                model(torch.ones(24, 3))


def test_two_threads_at_once_do_not_keep_it_measuring(monkeypatch):
    adviser, both = Adviser(), threading.Barrier(2)
    monkeypatch.setattr(adviser, "_compare", lambda *_: None)
    for _ in range(adviser._SAMPLES - 1):
        adviser.watch(lambda: None, nn.Identity(), CallArguments((), {}))
    threads = [
        threading.Thread(
            target=adviser.watch, args=(both.wait, nn.Identity(), CallArguments((), {}))
        )
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    adviser.watch(lambda: None, nn.Identity(), CallArguments((), {}))
    assert len(adviser._seconds) == adviser._SAMPLES + 1
