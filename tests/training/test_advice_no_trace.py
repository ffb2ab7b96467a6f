"""What is measured for advice leaves no trace: arguments, random numbers, hooks, counters."""

from __future__ import annotations

import dataclasses
import threading
import warnings

import pytest
import torch
from paid import Paid, heard, one_intra_op_thread  # noqa: F401
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import torch_spheres as ts


@dataclasses.dataclass
class Record:
    x: torch.Tensor


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


@pytest.mark.parametrize("even", [False, True])
def test_measurements_draw_nothing_whichever_pass_draws(even):
    """A module may draw in every second of its passes."""

    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 8)
            self.register_buffer("step", torch.zeros((), dtype=torch.long))

        def forward(self, x):
            self.step += 1
            y = self.a(x).relu()
            return nn.functional.dropout(y) if self.step % 2 == even else y

    def train(advised):
        torch.manual_seed(0)
        with ts.KissingSpheres(concurrency=1) as spheres, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = ts.SphereParallel(Sometimes(), spheres)
            model._engine._adviser._has_warned = not advised
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            for _ in range(10):
                optimizer.zero_grad()
                model(torch.ones(48, 8)).square().mean().backward()
                optimizer.step()
            before = torch.get_rng_state()
            model.suggest_shards(torch.ones(48, 8), repeats=3)
            assert torch.equal(before, torch.get_rng_state())
        return [*model.state_dict().values(), torch.get_rng_state()]

    assert all(map(torch.equal, train(advised=True), train(advised=False)))


def test_other_threads_never_draw_the_same_numbers_again():
    drawn, stop = [], threading.Event()

    def draw():
        while not stop.wait(0.0005):
            drawn.append(torch.rand((), dtype=torch.float64).item())

    thread = threading.Thread(target=draw)
    thread.start()
    with ts.KissingSpheres(concurrency=1) as spheres, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = ts.SphereParallel(nn.Sequential(nn.Linear(3, 3), nn.Dropout()), spheres)
        for _ in range(30):
            model(torch.ones(24, 3)).sum().backward()
        model.suggest_shards(torch.ones(24, 3))
    stop.set()
    thread.join()
    assert len({*drawn}) == len(drawn) > 10


@pytest.mark.parametrize("where", ["a method", "a list"])
def test_functions_that_are_compiled_are_not_compiled_for_the_whole_batch(where):
    rows = set()

    def backend(graph, examples):
        rows.update(str(v.shape[0]) for v in examples if v.shape[1:] == (3,))
        return graph.forward

    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(5, 5)
            self.f = torch.compile(lambda x: x.relu() + 1, backend=backend, dynamic=False)
            self.held = [torch.compile(nn.Identity(), backend=backend, dynamic=False)]

        def forward(self, x):
            y = self.f(x) if where == "a method" else self.held[0](x) * 2
            return self.a(torch.nn.functional.pad(y, (0, 2)))

    with ts.KissingSpheres(concurrency=1) as spheres:
        model = ts.SphereParallel(Partly(), spheres)
        for _ in range(9):
            model(torch.randn(60, 3)).sum().backward()
    assert "60" not in rows


def test_hooks_of_all_modules_see_the_calls_alone():
    calls = []
    handle = nn.modules.module.register_module_forward_hook(lambda *_: calls.append(1))
    try:
        with ts.KissingSpheres(concurrency=1) as spheres:
            model = ts.SphereParallel(nn.Linear(3, 3), spheres)
            counts = set()
            for step in range(12):
                del calls[:]
                model(torch.ones(24, 3)).sum().backward()
                counts.update([len(calls)] if step > 3 else [])
    finally:
        handle.remove()
    assert len(counts) == 1


def test_suggest_shards_leaves_arguments_or_says_why_not():
    class InPlace(nn.Linear):
        def forward(self, x):
            return super().forward(x.mul_(2))

    class Checkpointed(nn.Linear):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=True)

    x = torch.ones(24, 3)
    with ts.KissingSpheres(concurrency=1) as spheres:
        with pytest.raises(RuntimeError, match="wrote in place"):
            ts.SphereParallel(InPlace(3, 3), spheres).suggest_shards(x)
        assert torch.equal(x, torch.ones(24, 3))
        with torch.inference_mode(), pytest.raises(RuntimeError, match="outside of that block"):
            ts.SphereParallel(nn.Linear(3, 3), spheres).suggest_shards(x)
        with pytest.raises(RuntimeError) as caught:
            model = nn.Sequential(nn.Linear(3, 3), Checkpointed(3, 3))
            ts.SphereParallel(model, spheres).suggest_shards(x)
        assert "use_reentrant=False" in "".join(caught.value.__notes__)
