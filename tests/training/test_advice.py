"""Shards that are too small to be worth it are told of, once, with the way out."""

from __future__ import annotations

import re
import threading
import time
import types
import warnings

import pytest
import torch
from paid import Paid, heard, one_intra_op_thread  # noqa: F401
from torch import nn

import torch_spheres as ts
from torch_spheres.training.autotune import Plan
from torch_spheres.training.call_arguments import CallArguments
from torch_spheres.training.slow_warning import Adviser, WatchedCall


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
    assert "in 12 shards and" in message
    assert re.search(
        r"; shards=[12346] would take \S+x for a forward and backward, and these", message
    )
    assert caught[0].filename == __file__, "the user's line, not one of ours"
    # The measurement left no trace: neither hooks nor buffers nor random numbers.
    quiet = train(0.0, 0.01, 12, 30)
    assert quiet[1] == []
    assert all(torch.equal(a, b) for a, b in zip(state, quiet[2], strict=True))


def test_a_warning_that_is_an_error_is_raised():
    with ts.KissingSpheres(concurrency=1) as spheres, warnings.catch_warnings():
        warnings.simplefilter("error")
        model = ts.SphereParallel(Paid(0.002, 0.0), spheres)
        with pytest.raises(UserWarning, match="plain PyTorch would be faster"):
            for _ in range(8):
                model(torch.randn(24, 3)).sum().backward()


def test_small_shards_on_one_of_several_spheres_are_not_called_few():
    torch.set_num_threads(2)
    with ts.KissingSpheres(concurrency=2) as spheres, heard() as messages:
        model = ts.SphereParallel(nn.Linear(3, 3), spheres)
        for _ in range(120):
            model(torch.randn(24, 3)).sum().backward()
    (message,) = messages
    assert "so small" in message and "at a time" not in message


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
        for _ in range(9):
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
            for _ in range(30 if pays else 8):
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
        for _ in range(9):
            model.forward_backward(nn.functional.mse_loss, x, y)
    assert max(most) <= 4 and not messages


def test_a_batch_of_few_rows_is_told_of_with_its_shards():
    with ts.KissingSpheres(concurrency=2) as spheres, heard() as messages:
        model = ts.SphereParallel(Paid(0.005, 0.0), spheres).eval()
        for _ in range(60):
            model(torch.ones(10, 3))
    (message,) = messages
    assert "in 10 shards and" in message
    assert re.search(r"shards=[12346] would", message)


def test_two_threads_at_once_do_not_keep_it_measuring(monkeypatch):
    adviser, both, compared = Adviser(), threading.Barrier(2), []
    monkeypatch.setattr(adviser, "_compare", lambda *_: compared.append(1))
    engine = types.SimpleNamespace(module=nn.Identity(), ranks=None, is_on_cpu=lambda _: True)
    call = WatchedCall(engine, CallArguments((), {}), Plan(12, 2), "forward", collective=False)
    threads = [threading.Thread(target=adviser.watch, args=(both.wait, call)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for _ in range(200):
        adviser.watch(lambda: None, call)
    assert len(compared) == 9
    assert [watch.is_over for watch in adviser._watches.values()] == [True]


def test_one_slow_measurement_does_not_decide_for_good():
    """The first whole batches meet another program; a later round shows what is the matter."""
    passes = []

    class Met(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(()))

        def forward(self, x):
            passes.append(len(x))
            slow = len(x) == 24 and passes.count(24) < 2
            time.sleep(0.5 if slow else 0.002)
            return self.w * x

    with ts.KissingSpheres(concurrency=1) as spheres, heard() as messages:
        model = ts.SphereParallel(Met(), spheres)
        for _ in range(30):
            model(torch.ones(24, 3)).sum().backward()
    assert len(messages) == 1


@pytest.mark.parametrize("lengths", [(1, 10), (10, 1), (1, 5, 10)])
def test_batches_of_several_lengths_are_told_of(lengths):
    class Long(Paid):
        def forward(self, x):
            time.sleep(0.0005 * x.shape[1])
            return self.norm(x.mean(1))

    with ts.KissingSpheres(concurrency=1) as spheres, heard() as messages:
        model = ts.SphereParallel(Long(0.0, 0.0), spheres)
        for i in range(9):
            model(torch.randn(24, lengths[i % len(lengths)], 3)).sum().backward()
    assert len(messages) == 1


def test_a_model_that_needs_its_hooks_is_told_of():
    model = nn.Sequential(Paid(0.002, 0.0))
    model.register_forward_pre_hook(lambda _, args: (args[0].float(),))
    x = torch.randn(24, 3).double()
    with ts.KissingSpheres(concurrency=1) as spheres, heard() as messages:
        parallel = ts.SphereParallel(model, spheres)
        for _ in range(8):
            parallel(x).sum().backward()
        assert parallel.suggest_shards(x, repeats=1).best
    assert len(messages) == 1


@pytest.mark.parametrize("training", [False, True])
def test_the_way_out_of_parallelize(training):
    with ts.KissingSpheres(concurrency=1) as spheres, heard() as messages:
        model = ts.parallelize_(Paid(0.002, 0.0), spheres).train(training)
        for _ in range(8):
            model(torch.randn(24, 3)).sum().backward()
    (message,) = messages
    assert ("parallelize_(..., reproducible=False)" in message) is training
    assert ("model.forward.remove()" in message) is not training
    assert "(see SphereParallel.suggest_shards)" in message


def test_few_shards_are_not_called_small():
    torch.set_num_threads(4)

    class Threads(nn.Module):
        """Takes as long as its intra-op threads make it."""

        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(()))

        def forward(self, x):
            time.sleep(0.002 * len(x) / torch.get_num_threads())
            return self.w * x

    with ts.KissingSpheres(concurrency=4) as spheres, heard() as messages:
        model = ts.SphereParallel(Threads(), spheres, shards=1)
        for _ in range(8):
            model(torch.ones(24, 3)).sum().backward()
    (message,) = messages
    assert "so few that plain PyTorch" in message and "Larger batches" not in message
    assert "1 at a time runs with one intra-op thread each, where plain PyTorch has 4" in message
    assert re.search(r"; shards=(2|3|4|6|12) would take", message)
