"""Shards that are too small to be worth it are told of, once, with the way out."""

from __future__ import annotations

import dataclasses
import re
import threading
import time
import types
import warnings

import pytest
import torch
from paid import Paid, heard
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import torch_spheres as ts
from torch_spheres.training.autotune import Plan
from torch_spheres.training.call_arguments import CallArguments
from torch_spheres.training.slow_warning import Adviser, WatchedCall


@pytest.fixture(autouse=True)
def one_intra_op_thread():
    """Two that meet, where other programs have the cores, take longer than what is paid here."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclasses.dataclass
class Record:
    x: torch.Tensor


def train(call, row, concurrency, steps, **options):
    torch.manual_seed(0)
    when = []
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
                when += [step] * (len(caught) > len(when))
    assert len(hooked) == (12 * steps if not options else len(hooked))
    return when, caught, (module.norm.running_mean, torch.get_rng_state())


def test_expensive_calls_are_told_of_once():
    when, caught, state = train(0.02, 0.0, 2, 30)
    assert len(caught) == 1 and when[0] < 25
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


def test_compiled_shards_are_told_of_without_compiling_anything_else():
    """torch's compiled code may be slower than its own operators, or have more to do for a call."""
    rows = set()

    def backend(graph, _):
        def run(*args):
            rows.update(len(a) for a in args if a.shape[1:] == (3,) and not a.requires_grad)
            time.sleep(0.005)
            return graph.forward(*args)

        return run

    with ts.KissingSpheres(concurrency=1) as spheres, heard() as messages:
        compiled = torch.compile(nn.Linear(3, 3), backend=backend)
        model = ts.SphereParallel(compiled, spheres)
        for _ in range(8):
            model(torch.randn(24, 3)).sum().backward()
    assert rows == {2}
    (message,) = messages
    assert "in 12 shards, compiled, and" in message and "as a whole, uncompiled" in message
    assert "; uncompiled shards would take" in message


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


@pytest.mark.parametrize("mode", ["eval", "no_grad", "inference"])
@pytest.mark.parametrize("pays", [False, True])
def test_evaluations_are_told_of_too(mode, pays):
    with ts.KissingSpheres(concurrency=12 if pays else 1) as spheres, heard() as messages:
        module = Paid(0.0, 0.005) if pays else Paid(0.005, 0.0)
        model = ts.SphereParallel(module, spheres)
        model.train(mode != "eval")
        with torch.inference_mode(mode == "inference"), torch.set_grad_enabled(mode == "eval"):
            for _ in range(60):
                model(torch.ones(24, 3))
    assert len(messages) == (not pays)
    assert all("model.module, with the same weights, evaluates" in m for m in messages)


def test_what_was_told_of_in_training_is_not_in_evaluation():
    with ts.KissingSpheres(concurrency=2) as spheres:
        model = ts.SphereParallel(Paid(0.01, 0.0), spheres)
        counts = []
        for training in (True, False):
            with heard() as messages:
                for _ in range(20):
                    model.train(training)(torch.ones(24, 3)).sum().backward()
            counts.append(len(messages))
    assert counts == [1, 0]


@pytest.mark.parametrize("reproducible", [False, True])
def test_forward_backward_is_told_of(reproducible):
    with ts.KissingSpheres(concurrency=2) as spheres, heard() as messages:
        model = ts.SphereParallel(Paid(0.005, 0.0), spheres, reproducible=reproducible)
        x, y = torch.randn(24, 3), torch.randn(24, 3)
        for _ in range(60):
            model.forward_backward(nn.functional.mse_loss, x, y)
    (message,) = messages
    assert "in 12 shards and" in message and "loss.backward() in place of" in message


def test_a_forward_backward_that_takes_long_is_let_alone():
    """It is for batches whose activations do not fit."""
    most = []

    class Slow(Paid):
        def forward(self, x):
            most.append(len(x))
            return super().forward(x)

    with ts.KissingSpheres(concurrency=1) as spheres, heard() as messages:
        model = ts.SphereParallel(Slow(0.02, 0.0), spheres)
        x, y = torch.randn(24, 3), torch.randn(24, 3)
        for _ in range(3):  # (the comparison with the bare module is of two shards' rows)
            model.forward_backward(nn.functional.mse_loss, x, y)
        del most[:]
        for _ in range(6):
            model.forward_backward(nn.functional.mse_loss, x, y)
    assert max(most) <= 4 and not messages


def test_a_batch_of_few_rows_is_told_of_with_its_shards():
    with ts.KissingSpheres(concurrency=2) as spheres, heard() as messages:
        model = ts.SphereParallel(Paid(0.005, 0.0), spheres).eval()
        for _ in range(60):
            model(torch.ones(10, 3))
    (message,) = messages
    assert "in 10 shards and" in message
    assert re.search(r"shards=[246] would", message), "a divisor of the twelve"


@pytest.mark.parametrize("what", ["advice", "suggest_shards"])
@pytest.mark.parametrize("kind", [list, dict, Record])
def test_measurements_leave_arguments_as_they_are(what, kind):
    """A forward may fill a list, or a cache of keys: only the calls of the user do."""

    class Fills(nn.Module):
        def __init__(self):
            super().__init__()
            self.paid, self.seen = Paid(0.005, 0.0), []

        def forward(self, x, given):
            held = vars(given) if kind is Record else given
            key = 0 if kind is list else "x"
            self.seen.append(held[key][0, 0].item())
            held[key] = held[key] + 1
            return self.paid(x)

    x = torch.zeros(24, 3)
    given = kind([x]) if kind is list else kind(x=x)
    with ts.KissingSpheres(concurrency=1) as spheres, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = ts.SphereParallel(Fills(), spheres)
        if what == "advice":
            for _ in range(20):
                model(x, given).sum().backward()
        else:
            model.suggest_shards(x, given, repeats=1)
        assert {*model.module.seen} == {0.0}


def test_counters_of_operators_see_the_calls_alone():
    layer, x, counts = nn.Linear(3, 3), torch.ones(24, 3), set()
    with ts.KissingSpheres(concurrency=1) as spheres, heard() as messages:
        model = ts.SphereParallel(layer, spheres)
        for _ in range(12):
            with FlopCounterMode(display=False) as counter:
                model(x).sum().backward()
            counts.add(counter.get_total_flops())
        with FlopCounterMode(display=False) as counter:
            layer(x).sum().backward()
        assert counts == {counter.get_total_flops()}
        for _ in range(12):  # it comes when nobody counts any more
            model(x).sum().backward()
    assert len(messages) == 1


def test_two_threads_at_once_do_not_keep_it_measuring(monkeypatch):
    adviser, both = Adviser(), threading.Barrier(2)
    monkeypatch.setattr(adviser, "_compare", lambda *_: None)
    arguments = CallArguments((), {})
    engine = types.SimpleNamespace(module=nn.Identity())
    call = WatchedCall(engine, arguments, Plan(12, 2), "forward", collective=False)
    for _ in range(adviser._SAMPLES - 1):
        adviser.watch(lambda: None, call)
    threads = [threading.Thread(target=adviser.watch, args=(both.wait, call)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    adviser.watch(lambda: None, call)
    (seconds,) = adviser._seconds.values()
    assert len(seconds) == adviser._SAMPLES + 1
