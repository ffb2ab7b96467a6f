"""Batches gathered in C++ are those of `default_collate`, and only where that is certain."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from effort import rounds
from hypothesis import given, settings
from hypothesis import strategies as st
from loader_support import epochs, flat, same
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    StackDataset,
    Subset,
    TensorDataset,
    default_collate,
)
from torch.utils.data._utils.collate import default_collate_fn_map

import torch_spheres as ts
from torch_spheres import _core
from torch_spheres.data.tensor_gather import can_gather, prepare_gather


def gather(dataset, indices, system):
    """The batch, or None."""
    prepared = prepare_gather(dataset, indices)
    if prepared is None:
        return None
    batch, rows = prepared
    rows.finish(system)
    return batch


DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.complex64,
]
SHAPES = [(), (1,), (3,), (2, 5), (0,), (7, 1, 3)]


@pytest.fixture(scope="module")
def spheres():
    with ts.KissingSpheres(levels=2, concurrency=2) as running:
        yield running


def tensor(rows, dtype, shape):
    return (torch.randn(rows, *shape, dtype=torch.complex64).abs() * 3).to(dtype)


def check(dataset, indices, system=None):
    assert can_gather(dataset, default_collate)
    batch = gather(dataset, indices, system)
    assert batch is not None
    assert flat(batch) == flat(default_collate([dataset[i] for i in indices]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_type_and_shape(dtype, shape):
    dataset = TensorDataset(tensor(50, dtype, shape), torch.arange(50))
    check(dataset, [3, 49, 0, -1, -50, 3])


ROWS = 20
LEAVES = st.sampled_from(["tensors", "tensor", "array", "memmap"])


@pytest.fixture(scope="module")
def memmap(tmp_path_factory):
    path = tmp_path_factory.mktemp("gather") / "rows.npy"
    made = np.lib.format.open_memmap(path, mode="w+", dtype="float32", shape=(ROWS, 4))
    made[:] = np.random.rand(ROWS, 4)
    return made


def nested(kind, parts):
    if kind == "stack":
        return StackDataset(*parts)
    if kind == "dict":
        return StackDataset(**{f"part{k}": part for k, part in enumerate(parts)})
    return Subset(parts[0], random.Random(1).choices(range(-ROWS, ROWS), k=ROWS))


@settings(max_examples=rounds(80))
@given(data=st.data())
def test_any_nesting(spheres, memmap, data):
    def leaf():
        kind = data.draw(LEAVES)
        if kind == "tensors":
            return TensorDataset(tensor(ROWS, torch.float32, (3,)), torch.arange(ROWS))
        if kind == "tensor":
            return tensor(ROWS, data.draw(st.sampled_from(DTYPES)), ())
        return memmap if kind == "memmap" else np.random.rand(ROWS, 2, 2)

    def build(depth):
        kind = data.draw(st.sampled_from(["stack", "dict", "subset", "concat"]))
        if kind == "concat":
            part = build(depth - 1) if depth else TensorDataset(torch.rand(ROWS, 2))
            cut = data.draw(st.integers(1, ROWS - 1))
            return ConcatDataset(
                [Subset(part, range(cut)), Subset(part, range(cut, ROWS - 1)), Subset(part, [-1])]
            )
        if kind == "subset":
            part = build(depth - 1) if depth else TensorDataset(torch.rand(ROWS, 2))
            return nested(kind, [part])
        parts = [leaf() for _ in range(data.draw(st.integers(1, 3)))]
        return nested(kind, [*parts, build(depth - 1)] if depth else parts)

    dataset = build(data.draw(st.integers(0, 2)))
    assert len(dataset) == ROWS
    # A Concat takes negative indices in its own way, and a Subset of a range in the range's.
    indices = data.draw(st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=30))
    check(dataset, indices, spheres._core)


def test_large_batches_are_shared_with_the_spheres(spheres):
    rows = torch.randn(4000, 301)
    check(TensorDataset(rows), random.Random(2).choices(range(4000), k=3000), spheres._core)
    spheres.epoch()  # no leaf has a turn left over: whoever gathers finds one free
    before = spheres.stats().items_run
    gather(TensorDataset(rows), list(range(4000)), spheres._core)
    assert spheres.stats().items_run - before == -(-4000 // (65536 // 1204))


class Overriding(TensorDataset):
    def __getitem__(self, index):
        return super().__getitem__(index)


class Doubled(torch.Tensor):
    pass


def test_what_might_do_something_else_is_not_gathered():
    plain = TensorDataset(torch.arange(6.0))
    marked = TensorDataset(torch.arange(6.0))
    marked.__getitems__ = lambda indices: []
    for dataset in (
        Overriding(torch.arange(6.0)),
        marked,
        Subset(Overriding(torch.arange(6.0)), [1]),
        ConcatDataset([plain, Overriding(torch.arange(6.0))]),
        StackDataset(plain, [1, 2, 3, 4, 5, 6]),
        torch.arange(6.0),
        np.zeros((6, 2)),
    ):
        assert not can_gather(dataset, default_collate)
    assert not can_gather(plain, lambda samples: default_collate(samples))


def test_tensors_that_need_care_are_left_to_the_samples():
    rows = torch.randn(6, 4)
    for value in (
        rows.t(),
        rows[:, ::2],
        rows.clone().requires_grad_(),
        rows.to_sparse(),
        rows.as_subclass(Doubled),
        torch.randn(6, 2, dtype=torch.complex64).conj(),
        torch.nn.Parameter(rows.clone()),
    ):
        assert gather(TensorDataset(value), [1, 2], None) is None
    frozen = np.zeros((6, 2))
    frozen.flags.writeable = False
    for value in (frozen, np.zeros(6), np.zeros((6, 4))[:, ::2], np.zeros((6, 2), dtype=">f4")):
        assert gather(StackDataset(value), [1, 2], None) is None


def test_tensors_without_the_memory_that_they_claim():
    """Plain torch raises, or makes up zeros; reading there would be a crash."""
    shrunk = torch.zeros(10, 4)
    shrunk.untyped_storage().resize_(0)
    part = torch.zeros(10, 4)
    part.untyped_storage().resize_(80)
    for value in (shrunk, part, torch._efficientzerotensor((10, 6))):
        assert gather(TensorDataset(value), [0, 9], None) is None
    packed = torch.randint(0, 2, (8,), dtype=torch.uint8).view(torch.quint2x4)
    assert gather(TensorDataset(packed), [0], None) is None


def test_transforms_of_torch_func_are_respected():
    dataset = TensorDataset(torch.randn(6, 4))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.randn(6, 4), torch.ones(6, 4))
        assert gather(TensorDataset(dual), [1], None) is None
        assert gather(dataset, [1], None) is not None
    seen = []

    def inside(x):
        seen.append(gather(dataset, [1], None))
        return x

    torch.vmap(inside)(torch.ones(3))
    assert seen == [None]


def test_indices_that_need_care_are_left_to_the_samples():
    dataset = TensorDataset(torch.arange(6.0))
    for indices in ((1, 2), np.array([1, 2]), torch.tensor([1, 2]), {1}, range(3)):
        assert gather(dataset, indices, None) is None
    for indices in ([], [True], [np.int64(1)], [torch.tensor(1)], [6], [-7], [1.0], ["1"], [2**70]):
        assert gather(dataset, indices, None) is None
    assert gather(Subset(dataset, [torch.tensor(1)]), [0], None) is None
    assert gather(ConcatDataset([dataset, dataset]), [12], None) is None
    different = ConcatDataset([dataset, TensorDataset(torch.arange(6))])
    assert gather(different, [1, 7], None) is None
    check(different, [1, 2])


def test_modes_and_registered_collate_functions_are_respected():
    dataset = TensorDataset(torch.arange(6.0))

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    with Mode():
        assert gather(dataset, [1], None) is None
    with torch.inference_mode():
        batch = gather(dataset, [1], None)
        assert batch[0].is_inference() and default_collate([dataset[1]])[0].is_inference()
    known = default_collate_fn_map[torch.Tensor]
    try:
        default_collate_fn_map[torch.Tensor] = lambda batch, *, collate_fn_map=None: "mine"
        assert not can_gather(dataset, default_collate)
        assert [*ts.wrap(DataLoader(dataset, 2))] == [["mine"]] * 3
    finally:
        default_collate_fn_map[torch.Tensor] = known
    for kind in (tuple, dict, np.ndarray):
        before = dict(default_collate_fn_map)
        try:
            default_collate_fn_map[kind] = lambda batch, *, collate_fn_map=None: "mine"
            assert not can_gather(dataset, default_collate)
        finally:
            default_collate_fn_map.clear()
            default_collate_fn_map.update(before)
    assert can_gather(dataset, default_collate)


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_use_it_and_nothing_changes(spheres, workers):
    dataset = StackDataset(x=torch.randn(50, 3), y=torch.arange(50))
    plain = DataLoader(dataset, 7, shuffle=True, num_workers=workers)
    wrapped = ts.wrap(plain, spheres)
    torch.manual_seed(1)
    expected = epochs(plain)
    torch.manual_seed(1)
    same(epochs(wrapped), expected)
    assert wrapped.stats().way == "gather" and wrapped.stats().samples == 100


def test_the_dataset_may_change_between_batches(spheres):
    dataset = TensorDataset(torch.zeros(12, 2))
    iterator = iter(ts.wrap(DataLoader(dataset, 3), spheres))
    assert next(iterator)[0].sum() == 0
    dataset.tensors[0].fill_(1)
    assert next(iterator)[0].sum() == 6
    dataset.tensors = (torch.full((12, 4), 2.0),)
    assert next(iterator)[0].sum() == 24
    dataset.tensors = (torch.full((4, 12), 3.0).t(),)  # not contiguous: sample by sample
    assert next(iterator)[0].sum() == 36


@pytest.mark.parametrize("workers", [0, 1])
def test_an_index_out_of_range_is_the_datasets_own_error(spheres, workers):
    dataset = TensorDataset(torch.arange(6.0))
    loader = DataLoader(dataset, batch_sampler=[[0, 1], [9], [2]], num_workers=workers)
    iterator = iter(ts.wrap(loader, spheres))
    assert next(iterator)[0].tolist() == [0, 1]
    with pytest.raises(IndexError, match="index 9 is out of bounds"):
        next(iterator)
    assert next(iterator)[0].tolist() == [2]


def test_a_patched_class_is_not_gathered(monkeypatch):
    monkeypatch.setattr(TensorDataset, "__getitem__", lambda self, index: index)
    assert not can_gather(TensorDataset(torch.arange(3)), default_collate)


def test_bad_columns_are_refused():
    for columns in (
        [(np.zeros(3, dtype=np.int32), 0, 8, 8, 0)],
        [(np.zeros(3, dtype=np.float64), 0, 8, 8, 0)],
        [(np.zeros((2, 2), dtype=np.int64), 0, 8, 8, 0)],
        [(np.zeros(3, dtype=np.int64), 0, 8, 8)],
        [(np.zeros(6, dtype=np.int64)[::2], 0, 8, 8, 0)],
    ):
        with pytest.raises(ValueError, match=r"numbers must be a contiguous|a column is"):
            _core.Gather(columns, None)


def test_an_index_list_that_changes_while_it_is_read():
    """What is copied, and the memory for it, are of one moment."""

    class Shrinks(list):
        def __getitem__(self, i):
            del batch[1:]
            return super().__getitem__(i)

    data = TensorDataset(torch.arange(4000.0).reshape(1000, 4))
    batch = list(range(999, -1, -1))
    prepared = prepare_gather(Subset(data, Shrinks(range(1000))), batch)
    assert prepared is not None and len(batch) == 1
    (rows,), gather = prepared
    gather.finish()
    assert torch.equal(rows, data.tensors[0].flip(0))


def test_an_index_list_that_another_thread_changes():
    numbers, over = list(range(1000)), threading.Event()

    def change():
        while not over.is_set():
            numbers[:] = [2**40] * 10
            numbers[:] = range(1000)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(3000):
            array, low, high = _core.row_numbers(numbers)
            assert (len(array), low, high) in ((1000, 0, 999), (10, 2**40, 2**40))
    finally:
        over.set()
        thread.join()


def test_a_gather_that_is_in_use_refuses_another_thread():
    rows = torch.arange(1 << 25, dtype=torch.float32).reshape(1 << 15, 1 << 10)  # 128 MiB
    dataset, order = TensorDataset(rows), list(range(len(rows)))
    for _ in range(100):
        (out,), gather = prepare_gather(dataset, order)
        thread = threading.Thread(target=gather.finish)
        thread.start()
        refused = False
        while thread.is_alive() and not refused:
            try:
                gather.finish()
            except RuntimeError as error:
                assert "in use already" in str(error)  # noqa: PT017
                refused = True
        thread.join()
        assert torch.equal(out, rows)
        if refused:
            return
    pytest.fail("no thread met another one in 100 times")
