"""The sum tree's bits against the reference in plain torch."""

from __future__ import annotations

import functools
import subprocess
import sys
import threading

import pytest
import torch
from effort import rounds
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import tree
from torch.utils._pytree import tree_map_only

import torch_spheres as ts
from torch_spheres import _compat, _core
from torch_spheres.reduction.tree_sum import tree_sums

FAST = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
POWERS = 10.0 ** torch.arange(-4, 4, dtype=torch.float64)
OTHER = [torch.int32, torch.int64, torch.complex64, torch.complex128]


@pytest.fixture(scope="module", params=["exchange", "methods"], autouse=True)
def _views(request):
    """Tensors are read through torch's C interface, where it has one, and through Python."""
    if request.param == "exchange" and _compat.dlpack_exchange is None:
        pytest.skip(f"torch {torch.__version__} has no such interface")
    _core.read_tensors_by(_compat.dlpack_exchange if request.param == "exchange" else None)
    yield
    _core.read_tensors_by(_compat.dlpack_exchange)


def shards_of(shape, dtype, count, seed, absent=()):
    generator = torch.Generator().manual_seed(seed)
    shards = []
    for k in range(count):
        # Magnitudes far apart: another order of additions gives other bits.
        t = torch.randn(shape, generator=generator, dtype=torch.float64)
        t *= POWERS[torch.randint(len(POWERS), shape, generator=generator)]
        shards.append(None if k in absent else t.to(dtype))
    return shards


def assert_same_bits(actual, expected):
    assert (actual is None) == (expected is None)
    if expected is not None:
        assert actual.dtype == expected.dtype and actual.shape == expected.shape
        raw = torch.int16 if expected.element_size() == 2 else torch.int32
        assert torch.equal(actual.reshape(-1).view(raw), expected.reshape(-1).view(raw))


def test_another_order_would_be_noticed():
    shards = shards_of((1000,), torch.float32, 12, 0)
    left_to_right = shards[0]
    for t in shards[1:]:
        left_to_right = left_to_right + t
    assert not torch.equal(left_to_right, tree(shards))
    assert not torch.equal(tree(shards[::-1]), tree(shards))


@pytest.mark.parametrize("dtype", FAST + OTHER, ids=str)
@pytest.mark.parametrize("count", [1, 12, 144, 1728])
def test_bits_for_every_dtype_and_depth(dtype, count):
    shards = shards_of((7, 5), dtype, count, count, absent={3, 17, 100} if count > 12 else {3})
    assert_same_bits(ts.tree_sum(shards), tree(shards))


@settings(max_examples=rounds(200))
@given(
    mask=st.integers(0, 4095),
    dtype=st.sampled_from(FAST),
    numel=st.integers(0, 300),
    seed=st.integers(0, 2**32),
)
def test_any_subset_of_absent_children(mask, dtype, numel, seed):
    absent = {k for k in range(12) if not mask >> k & 1}
    shards = shards_of((numel,), dtype, 12, seed, absent)
    assert_same_bits(ts.tree_sum(shards), tree(shards))


@settings(max_examples=rounds(30))
@given(present=st.sets(st.integers(0, 143), min_size=1), seed=st.integers(0, 2**32))
def test_any_subset_of_absent_leaves(present, seed):
    shards = shards_of((33,), torch.bfloat16, 144, seed, set(range(144)) - present)
    assert_same_bits(ts.tree_sum(shards), tree(shards))


def test_all_absent_is_none():
    assert ts.tree_sum([None] * 12) is None


def test_minus_zero_survives_absent_siblings():
    shards = [torch.tensor([-0.0])] + [None] * 11
    total = ts.tree_sum(shards)
    assert torch.signbit(total).item()
    assert total.data_ptr() != shards[0].data_ptr()


@functools.cache
def large(levels):
    """Shards, one of them absent, and their sum: the same for all tests."""
    numel = 100_003 if levels == 3 else 1_000_003
    shards = shards_of((numel,), torch.float32, 12 ** (levels - 1), 1, {2})
    return shards, tree(shards)


@pytest.mark.parametrize("concurrency", [1, 2, 12])
@pytest.mark.parametrize("levels", [2, 3])
def test_large_tensors_on_spheres_have_the_same_bits(levels, concurrency):
    with ts.KissingSpheres(levels, concurrency=concurrency) as spheres:
        shards, total = large(levels)
        assert_same_bits(ts.tree_sum(shards, spheres=spheres), total)
        # It was shared out: to the leaves, which count their time as accumulating, and to the
        # thread that waits here, for which the root counts.
        stats = spheres.stats()
        assert stats.items_run > 0
        assert all(s.accumulating_ns > 0 for s in stats if s.items_run > 0 and s.id != 0)


@pytest.mark.parametrize("dtype", FAST, ids=str)
def test_out_may_be_a_shard_or_overlap_one(dtype):
    shards = shards_of((1001,), dtype, 12, 2)
    expected = tree(shards)
    aliased = [t.clone() for t in shards]
    assert ts.tree_sum(aliased, out=aliased[5]) is aliased[5]
    assert_same_bits(aliased[5], expected)
    buffer = torch.empty(1100, dtype=dtype)
    overlapping = [t.clone() for t in shards]
    overlapping[0] = buffer[:1001].copy_(shards[0])
    out = buffer[50:1051]
    assert ts.tree_sum(overlapping, out=out) is out
    assert_same_bits(out, expected)


def test_layouts():
    shards = [t.t() for t in shards_of((30, 40), torch.float32, 12, 3)]
    assert not shards[0].is_contiguous()
    assert_same_bits(ts.tree_sum(shards).contiguous(), tree(shards).contiguous())
    expanded = [torch.tensor([0.1 * (k + 1)]).expand(100) for k in range(12)]
    assert_same_bits(ts.tree_sum(expanded), tree(expanded).contiguous())


def test_pending_negation_is_not_forgotten():
    negated = torch.complex(torch.ones(3), torch.ones(3)).conj().imag
    assert negated.is_neg()
    assert torch.equal(ts.tree_sum([negated] * 12), torch.full((3,), -12.0))
    out = torch.zeros(3)
    assert torch.equal(ts.tree_sum([negated, *[None] * 11], out=out), -torch.ones(3))


def test_tensors_that_require_grad_are_summed_as_values():
    weight = torch.nn.Parameter(torch.ones(3))
    total = ts.tree_sum([weight] * 12)
    assert not total.requires_grad
    assert torch.equal(total, torch.full((3,), 12.0))


def test_zeros_that_torch_does_not_store():
    zeros = torch._efficientzerotensor((3,))
    assert ts.tree_sum([zeros] * 12).tolist() == [0, 0, 0]
    assert ts.tree_sum([torch.ones(3), *[zeros] * 11]).tolist() == [1, 1, 1]


class Wrapped(torch.Tensor):
    """Has its values elsewhere, as tensors distributed over processes have."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        bare = tree_map_only(Wrapped, lambda t: t.inner, (args, kwargs or {}))
        return tree_map_only(torch.Tensor, Wrapped, func(*bare[0], **bare[1]))


def test_subclasses_go_through_torch():
    shards = shards_of((50,), torch.float32, 12, 6, {1})
    total = ts.tree_sum([None if t is None else Wrapped(t) for t in shards])
    assert type(total) is Wrapped
    assert_same_bits(total.inner, tree(shards))


def test_inside_a_transform():
    shards = shards_of((5, 4), torch.float32, 12, 7)
    stacked = torch.stack(shards)
    total = torch.func.vmap(lambda rows: ts.tree_sum([*rows]), in_dims=1)(stacked)
    assert_same_bits(total, tree(shards))


def test_sparse_goes_through_torch():
    shards = [torch.eye(4).mul(0.1 * (k + 1)).to_sparse() for k in range(12)]
    total = ts.tree_sum(shards)
    assert total.is_sparse
    assert torch.equal(total.to_dense(), tree([s.to_dense() for s in shards]))


def test_empty_and_scalar_tensors():
    assert ts.tree_sum([torch.empty(0)] * 12).shape == (0,)
    scalars = [torch.tensor(0.1 * (k + 1)) for k in range(12)]
    assert_same_bits(ts.tree_sum(scalars), tree(scalars))


def test_sums_under_way_refuse_another_thread():
    job, shards = _core.SumJob(1), [torch.ones(100_000)] * 12
    total, more = torch.empty(100_000), torch.empty(100_000)
    assert job.try_add(shards, total)
    with ts.KissingSpheres(concurrency=1) as spheres:
        begun, gate = threading.Event(), threading.Event()
        held = spheres.distribute_work([0], lambda _: (begun.set(), gate.wait(60)))
        assert begun.wait(60)  # before that, it is the item that is queued
        runner = threading.Thread(target=job.run, args=(spheres._core,))
        runner.start()
        while not spheres.stats().queued:  # until the sums wait for the item
            threading.Event().wait(0.001)
        try:
            with pytest.raises(RuntimeError, match="SumJob is in use already"):
                job.try_add(shards, more)
            with pytest.raises(RuntimeError, match="SumJob is in use already"):
                job.run()
        finally:
            gate.set()
            runner.join()
        held.wait(60)
    assert (total == 12).all()


def test_many_tensors_at_once():
    tensors = [shards_of((n,), torch.float32, 12, n) for n in (1, 10, 100_000, 3, 0, 70_000)]
    with ts.KissingSpheres() as spheres:
        sums = tree_sums(tensors, spheres=spheres)
    for total, shards in zip(sums, tensors, strict=True):
        assert_same_bits(total, tree(shards))


@pytest.mark.parametrize("count", [0, 2, 11, 13, 143])
def test_wrong_number_of_shards(count):
    with pytest.raises(ValueError, match=f"1, 12, 144 or 1728 shards, got {count}"):
        ts.tree_sum([torch.zeros(1)] * count)


@pytest.mark.parametrize(
    "odd", [torch.zeros(3), torch.zeros(2, dtype=torch.float64), torch.zeros(2).to_sparse()]
)
def test_mismatched_shards(odd):
    with pytest.raises(ValueError, match="shard 4"):
        ts.tree_sum([*[torch.zeros(2)] * 4, odd, *[None] * 7])
    with pytest.raises(ValueError, match="out is"):
        ts.tree_sum([torch.zeros(2)] * 12, out=odd)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", FAST, ids=str)
def test_bits_on_cuda(dtype):
    shards = shards_of((1000,), dtype, 12, 5, {7})
    total = ts.tree_sum([None if t is None else t.cuda() for t in shards])
    assert total.is_cuda
    assert_same_bits(total.cpu(), tree(shards))


def test_cpp_adds_the_tensors_of_a_program_that_uses_nothing_else():
    program = """
import torch
import torch_spheres as ts
from torch_spheres.reduction import tree_sum
tree_sum._add_unusual = None
assert ts.tree_sum([torch.ones(3)] * 12).tolist() == [12, 12, 12]
"""
    subprocess.run([sys.executable, "-P", "-c", program], check=True)
