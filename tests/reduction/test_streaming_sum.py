"""`StreamingSum`: the bits of the fixed tree in any order of finishing, and few sets at a time."""

from __future__ import annotations

import random
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import numpy as np
import pytest
import torch
from effort import rounds
from hypothesis import given, settings
from hypothesis import strategies as st
from loop_support import soon
from reference import digest, tree
from torch import nn

import torch_spheres as ts
from torch_spheres.reduction.partition import tree_order
from torch_spheres.reduction.streaming_sum import StreamingSum
from torch_spheres.reduction.tree_sum import tree_sum
from torch_spheres.runtime.thread_hooks import has_gil


def grad_of(shard: int, parameter: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * shard + parameter)
    return torch.randn(5, 3, generator=generator).to(dtype) * 10.0 ** (shard % 5 - 2)


@pytest.mark.parametrize("leaves", [1, 12, 144, 1728])
def test_the_tree_s_order_has_every_leaf_once_and_siblings_together(leaves):
    order = tree_order(leaves)
    assert sorted(order) == list(range(leaves))
    step = max(1, leaves // 12)
    for i in range(0, leaves, 12):
        assert len({k % step for k in order[i : i + 12]}) == 1


@settings(max_examples=rounds(60))
@given(
    leaves=st.sampled_from([1, 12, 144]),
    concurrency=st.integers(1, 6),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 2**32 - 1),
    density=st.floats(0.02, 1),
)
def test_any_subset_in_any_order_has_the_bits_of_the_tree(
    leaves, concurrency, dtype, seed, density
):
    """The shards that run at once finish in an order that is drawn; in one thread."""
    rng = random.Random(seed)
    shards = [k for k in range(leaves) if rng.random() < density] or [rng.randrange(leaves)]
    # The second parameter is used by some shards only, the third by none.
    users = {k for k in shards if rng.random() < 0.5}
    fold = StreamingSum(leaves, shards, concurrency)
    running: list[int] = []
    for _ in range(len(shards)):
        while running and (
            len(running) == concurrency or fold._alive == fold.limit or rng.random() < 0.5
        ):
            k = running.pop(rng.randrange(len(running)))
            fold.add(k, grads_of(k, users, dtype))
        assert fold._alive < fold.limit, "begin() would wait for ever"
        running.append(fold.begin())
    for k in rng.sample(running, len(running)):
        fold.add(k, grads_of(k, users, dtype))
    check(fold.finish(), leaves, shards, users, dtype)
    assert fold.peak <= fold.limit


def grads_of(k, users, dtype):
    return [grad_of(k, 0, dtype), grad_of(k, 1, dtype) if k in users else None, None]


def check(sums, leaves, shards, users, dtype):
    for i, those in enumerate((set(shards), users, set())):
        column = [grad_of(k, i, dtype) if k in those else None for k in range(leaves)]
        expected, by_tree_sum = tree(column), tree_sum(column)
        if expected is None:
            assert sums[i] is None and by_tree_sum is None
        else:
            assert sums[i].dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
            assert torch.equal(sums[i].to(dtype), expected)
            assert torch.equal(by_tree_sum, expected)


@settings(max_examples=rounds(15))
@given(
    leaves=st.sampled_from([12, 144]),
    threads=st.integers(2, 6),
    seed=st.integers(0, 2**32 - 1),
)
def test_threads_that_finish_in_any_order(leaves, threads, seed):
    rng = random.Random(seed)
    shards = sorted(rng.sample(range(leaves), rng.randint(1, leaves)))
    users = set(rng.sample(shards, len(shards) // 2))
    naps = {k: rng.random() * 1e-3 for k in shards}
    fold = StreamingSum(leaves, shards, threads)
    wake = threading.Event()

    def run(_):
        k = fold.begin()
        wake.wait(naps[k])  # never set: a sleep
        fold.add(k, grads_of(k, users, torch.float32))

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, shards))
    check(fold.finish(), leaves, shards, users, torch.float32)
    assert fold.peak <= fold.limit


def test_a_failure_lets_go_of_those_who_wait():
    fold = StreamingSum(12, range(12), 1)
    started = [fold.begin() for _ in range(fold.limit)]
    assert started == [*tree_order(12)[: fold.limit]]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(fold.begin)
        assert not waiting.done()
        fold.fail()
        assert waiting.result(timeout=20) is None
    assert fold.begin() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 2, 5, 12])
def test_gradients_that_somebody_else_holds_are_not_written_to(dtype, count):
    held = [torch.full((4,), float(k)).to(dtype) for k in range(count)]
    views = [t.view(2, 2) for t in held]
    fold = StreamingSum(12, range(count), 1)
    for k in range(count):
        fold.begin()
        fold.add(k, [held[k], views[k]])
    sums = fold.finish()
    total = float(sum(range(count)))
    assert torch.equal(sums[0], torch.full((4,), total))
    assert torch.equal(sums[1], torch.full((2, 2), total))
    for k, t in enumerate(held):
        assert torch.equal(t, torch.full((4,), float(k)).to(dtype))


@pytest.mark.parametrize("leaves", [12, 144])
def test_gradients_in_memory_of_somebody_else_are_not_written_to(leaves):
    """No reference to the tensor tells of an array whose memory it uses."""
    arrays = [np.full(4, k, dtype=np.float32) for k in range(leaves)]
    fold = StreamingSum(leaves, range(leaves), 2)
    for _ in range(leaves):
        k = fold.begin()
        fold.add(k, [torch.from_numpy(arrays[k])])
    (total,) = fold.finish()
    assert total.tolist() == [sum(range(leaves))] * 4
    for k, array in enumerate(arrays):
        assert array.tolist() == [k] * 4


class Keeps(torch.autograd.Function):
    """x * w, whose backward keeps the gradients that it returns: by reference, or by memory."""

    kept: ClassVar[list[tuple[object, object]]] = []  # what is kept, a copy of it

    @staticmethod
    def forward(ctx, x, w, way):
        ctx.save_for_backward(x, w)
        ctx.way = way
        return x * w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        made = (g * x).sum(0)
        if ctx.way == "tensor":
            Keeps.kept.append((made, made.clone()))
        elif ctx.way == "view":
            Keeps.kept.append((made[1:], made[1:].clone()))
        else:
            array = made.numpy().copy()
            Keeps.kept.append((array, array.copy()))
            made = torch.from_numpy(array)
        return g * w, made, None


@pytest.mark.parametrize("rows", [1, 3, 36])
@pytest.mark.parametrize("loss", ["backward", "mean", "sum and count"])
@pytest.mark.parametrize("way", ["tensor", "view", "array"])
def test_a_function_may_keep_the_gradients_that_it_returns(way, loss, rows):
    class Layers(nn.Module):
        def __init__(self):
            super().__init__()
            self.ws = nn.ParameterList(torch.ones(8) for _ in range(3))

        def forward(self, x):
            for w in self.ws:
                x = Keeps.apply(x, w, way)
            return x

    model = Layers()
    with ts.KissingSpheres(2, concurrency=2) as spheres:
        parallel = ts.SphereParallel(model, spheres)
        x = torch.randn(rows, 8)
        for _ in range(2):  # gradients are added to those of the first step
            Keeps.kept.clear()
            if loss == "backward":
                parallel(x).sum().backward()
            elif loss == "mean":
                parallel.forward_backward(lambda out, y: out.mean(), x, x)
            else:
                parallel.forward_backward(lambda out, y: (out.sum(), 2 * len(out)), x, x)
            assert len(Keeps.kept) == 3 * min(rows, 12)
            for kept, copy in Keeps.kept:
                assert kept.tolist() == copy.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sparse_gradients_have_the_same_bits_in_any_order(dtype):
    """Half types too: they are rounded once, and not wherever the order makes a partial sum."""
    found = []
    for seed in range(4):
        fold = StreamingSum(12, range(12), 12)
        order = [fold.begin() for _ in range(12)]
        random.Random(seed).shuffle(order)
        for k in order:
            fold.add(k, [grad_of(k, 0, dtype).to_sparse()])
        (total,) = fold.finish()
        assert total.is_sparse
        found.append(total.to_dense().to(dtype))
    expected = tree([grad_of(k, 0, dtype) for k in range(12)])
    assert all(torch.equal(total, expected) for total in found)


@pytest.mark.parametrize("count", [2, 4, 5, 12])
def test_portions_of_large_gradients_have_the_bits_of_the_tree(count, monkeypatch):
    monkeypatch.setattr(
        "torch_spheres.reduction.streaming_sum._CHUNK_BYTES", 100
    )  # bytes; a gradient has 60 or 30
    shards = set(range(12 - count, 12))
    fold = StreamingSum(12, sorted(shards), 3)
    for _ in shards:
        k = fold.begin()
        fold.add(k, [grad_of(k, 0, torch.float32), None, grad_of(k, 2, torch.bfloat16)])
    sums = fold.finish()
    for i, dtype in ((0, torch.float32), (2, torch.bfloat16)):
        expected = tree([grad_of(k, i, dtype) if k in shards else None for k in range(12)])
        assert torch.equal(sums[i].to(dtype), expected)
    assert sums[1] is None


# ---- sets of gradients that are alive at once, in a model ----


class Watched(torch.autograd.Function):
    """The product with a weight; its gradient for the weight is counted for as long as it lives."""

    alive: ClassVar[weakref.WeakSet] = weakref.WeakSet()
    lock: ClassVar[threading.Lock] = threading.Lock()
    peak = 0

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        made = (g * x).sum(0)
        with Watched.lock:
            Watched.alive.add(made.untyped_storage())
            Watched.peak = max(Watched.peak, len(Watched.alive))
        return g * w, made


class OneWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(64))

    def forward(self, x):
        return Watched.apply(x, self.w)


@pytest.mark.parametrize("concurrency", [1, 2, 5])
@pytest.mark.parametrize(("levels", "extra"), [(2, 4), (3, 7), (4, 10)])
@pytest.mark.parametrize("way", ["backward", "forward_backward"])
def test_sets_alive_at_once(levels, extra, concurrency, way, monkeypatch):
    folds = []
    finish = StreamingSum.finish

    def finished(fold):
        folds.append((fold.limit, fold.peak))
        return finish(fold)

    monkeypatch.setattr(StreamingSum, "finish", finished)
    with ts.KissingSpheres(levels, concurrency=concurrency) as spheres:
        x = torch.randn(spheres.leaves, 64)
        model = OneWeight()
        parallel = ts.SphereParallel(model, spheres)
        assert soon(lambda: not Watched.alive)
        Watched.peak = 0
        if way == "backward":
            parallel(x).sum().backward()
        else:
            parallel.forward_backward(lambda out, y: out.sum(1).mean(), x, x)
        ((limit, peak),) = folds
        assert limit == concurrency + extra
        assert 1 <= peak <= limit
        # Without the GIL, Python frees what another thread has made when that one comes by: memory
        # follows the fold, which keeps to the limit, in a moment.
        assert 1 <= Watched.peak <= (limit if has_gil() else 2 * limit)
        expected = x.sum(0) if way == "backward" else x.mean(0)
        torch.testing.assert_close(model.w.grad, expected, rtol=1e-4, atol=1e-4)
        model.w.grad = None
        assert soon(lambda: not Watched.alive), "nothing is kept after the step"


def test_weights_are_never_copied():
    class Looks(nn.Linear):
        def forward(self, x):
            seen.add((self.weight.data_ptr(), self.bias.data_ptr()))
            return super().forward(x)

    seen = set()
    model = Looks(64, 64)
    with ts.KissingSpheres(3, concurrency=5) as spheres:
        parallel = ts.SphereParallel(model, spheres)
        for _ in range(2):
            parallel(torch.randn(200, 64)).sum().backward()
            parallel.forward_backward(
                lambda out, y: out.mean(), torch.randn(200, 64), torch.ones(200)
            )
        assert seen == {(model.weight.data_ptr(), model.bias.data_ptr())}
        assert 1 <= len(parallel._engine.pool) <= 5
        for replica in parallel._engine.pool._idle:
            assert all(p.grad is None for p in replica.module.parameters())
            assert digest(list(replica.module.parameters())) == digest(list(model.parameters()))
