"""Batch norm over the whole batch: whatever goes wrong wakes the shards that wait."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable

import fork_server
import pytest
import torch
from sync_batch_norm_support import batches, make
from torch import Tensor, nn
from torch.nn import functional as F

import torch_spheres as ts
from torch_spheres.training.shard_sums import ShardSums

HANGS = pytest.mark.timeout(60)


@pytest.fixture(autouse=True)
def no_advice() -> None:
    """These models are so small that plain torch would be faster, which users are told."""
    warnings.filterwarnings("ignore", "the shards of this model are so")


class Odd(nn.Module):
    """Does something else in the shard that has the row of the largest number."""

    def __init__(self, what: Callable[[Odd, Tensor], Tensor | None]) -> None:
        super().__init__()
        self.what = what
        self.one, self.two = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        if x.max() >= 59:
            found = self.what(self, x)
            if found is not None:
                return found
        return self.two(self.one(x))


def odd(what: Callable[[Odd, Tensor], Tensor | None]) -> Callable[[ts.KissingSpheres], nn.Module]:
    def made(spheres: ts.KissingSpheres) -> nn.Module:
        return ts.SphereParallel(ts.convert_sync_batchnorm(Odd(what)), spheres)

    return made


def fail(_model: Odd, _x: Tensor) -> None:
    raise ZeroDivisionError("of the user's")


ROWS = torch.arange(60.0)[:, None].expand(60, 3).contiguous()


@HANGS
@pytest.mark.parametrize("concurrency", [1, 2, 12])
@pytest.mark.parametrize(
    ("what", "kind", "match"),
    [
        (fail, ZeroDivisionError, "of the user's"),
        (lambda m, x: x * m.one.weight, RuntimeError, "without coming to the forward of 'one'"),
        (lambda m, x: m.one(x), RuntimeError, "without coming to the forward of 'two'|different"),
        (lambda m, x: m.one(m.two(x)), RuntimeError, "go different ways"),
        (lambda m, x: m.two(m.two(m.one(x))), RuntimeError, "has ended without|different ways"),
    ],
)
def test_a_shard_that_does_not_come_is_no_hang(concurrency, what, kind, match) -> None:
    with ts.KissingSpheres(concurrency=concurrency) as spheres:
        model = odd(what)(spheres)
        for lean in (False, True):
            with pytest.raises(kind, match=match) as caught:
                if lean:
                    model.forward_backward(lambda y, _: y.sum(), ROWS, ROWS)
                else:
                    model(ROWS)
            assert not any(note.startswith("also") for note in caught.value.__notes__)
        model(ROWS - 60)  # and the spheres go on


@HANGS
@pytest.mark.parametrize(
    "what", [lambda m, x: m.two(m.two(m.one(x))), lambda m, x: m.one(m.two(x)), lambda m, x: x]
)
def test_what_follows_from_a_shards_error_is_not_reported(monkeypatch, what) -> None:
    """However long the one that has failed takes until it wakes the others."""
    wake = ShardSums._fail

    def late(self: ShardSums) -> None:
        time.sleep(0.2)
        wake(self)

    monkeypatch.setattr(ShardSums, "_fail", late)
    with ts.KissingSpheres(concurrency=12) as spheres:
        model = odd(what)(spheres)
        for _ in range(3):
            with pytest.raises(RuntimeError, match=r"has ended without|different ways") as caught:
                model(ROWS)
            assert not any(note.startswith("also") for note in caught.value.__notes__)


@HANGS
def test_an_error_in_a_shards_backward_is_no_hang() -> None:
    def hooked(model: Odd, x: Tensor) -> Tensor:
        y = model.one(x * model.two.weight)
        y.register_hook(lambda grad: fail(model, grad))
        return model.two(y)

    with ts.KissingSpheres(concurrency=2) as spheres:
        model = odd(hooked)(spheres)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError, match="of the user's"):
                model(ROWS).sum().backward()
        model(ROWS - 60).sum().backward()


@HANGS
def test_a_batch_of_one_value_is_refused() -> None:
    with ts.KissingSpheres() as spheres:
        model = ts.SphereParallel(ts.convert_sync_batchnorm(nn.BatchNorm1d(3)), spheres)
        with pytest.raises(ValueError, match="one value for each channel"):
            model(torch.randn(1, 3))
        model(torch.randn(2, 3))


@HANGS
def test_layers_that_the_model_does_not_know_are_refused() -> None:
    hidden = [ts.convert_sync_batchnorm(nn.BatchNorm1d(3))]

    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.known = nn.Linear(3, 3)

        def forward(self, x):
            return hidden[0](self.known(x))

    with (
        ts.KissingSpheres() as spheres,
        pytest.raises(RuntimeError, match="registered nowhere"),
    ):
        ts.SphereParallel(Holds(), spheres)(torch.randn(24, 3))


@HANGS
@pytest.mark.parametrize("concurrency", [1, 3])
def test_stop_wakes_shards_that_wait(concurrency: int) -> None:
    begun, gate = threading.Event(), threading.Event()

    def wait(_model: Odd, _x: Tensor) -> None:
        begun.set()
        gate.wait(50)

    spheres = ts.KissingSpheres(concurrency=concurrency).start()
    model = odd(wait)(spheres)
    errors = []

    def call() -> None:
        try:
            model(ROWS)
        except BaseException as error:
            errors.append(error)

    caller = threading.Thread(target=call)
    caller.start()
    assert begun.wait(50)
    with pytest.raises(TimeoutError):
        spheres.stop(timeout=0)
    gate.set()
    spheres.stop()
    caller.join()
    (error,) = errors
    assert isinstance(error, ts.StoppedError)
    spheres.start()
    begun.clear()
    model(ROWS)
    spheres.stop()


CTRL_C = """
import threading, torch, torch_spheres as ts
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):
        if x.max() >= 59 and not gate.is_set():
            print("waits", flush=True)
            gate.wait(50)
        return self.norm(x)

gate = threading.Event()
rows = torch.arange(60.0)[:, None].expand(60, 3).contiguous()
with ts.KissingSpheres(concurrency=2) as spheres:
    model = ts.SphereParallel(ts.convert_sync_batchnorm(Net()), spheres)
    try:
        model(rows)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    gate.set()
    print(model(rows).shape, flush=True)
"""


@HANGS
def test_ctrl_c_wakes_shards_that_wait() -> None:
    with fork_server.start(CTRL_C) as process:
        assert process.readline() == "waits\n"
        process.interrupt()
        assert process.readline() == "interrupted\n"
        assert process.readline() == "torch.Size([60, 3])\n", process.stderr
        assert process.wait() == 0, process.stderr


@HANGS
def test_two_models_and_barriers_on_the_same_spheres() -> None:
    """Each pass has all leaves: half of one model's shards and half of the other's would hang."""
    x, y = next(batches(40))
    with ts.KissingSpheres(concurrency=3) as spheres:
        models = [ts.SphereParallel(ts.convert_sync_batchnorm(make()), spheres) for _ in range(3)]
        plain_model = ts.SphereParallel(nn.Linear(3, 3), spheres)
        done = threading.Event()

        def train(model: nn.Module) -> None:
            for _ in range(10):
                F.cross_entropy(model(x), y).backward()

        threads = [threading.Thread(target=train, args=(model,)) for model in models]

        def meet() -> None:
            while not done.is_set():
                spheres.barrier(1, 50)
                spheres.epoch(50)
                plain_model(torch.ones(24, 3)).sum().backward()
                spheres.map(lambda _: time.sleep(0), range(30))

        other = threading.Thread(target=meet)
        for thread in (*threads, other):
            thread.start()
        for thread in threads:
            thread.join()
        done.set()
        other.join()
        grads = [[p.grad for p in model.parameters()] for model in models]
        assert all(map(torch.equal, grads[0], grads[1]))


@HANGS
def test_compiled_parts_and_accelerators_are_refused() -> None:
    model = ts.convert_sync_batchnorm(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    with ts.KissingSpheres() as spheres:
        compiled = ts.SphereParallel(torch.compile(model), spheres)
        with pytest.raises(RuntimeError, match=r"parts that torch\.compile has compiled"):
            compiled(ROWS)
        elsewhere = ts.SphereParallel(model.to("meta"), spheres)
        with pytest.raises(RuntimeError, match="is on an accelerator"):
            elsewhere(ROWS.to("meta"))
