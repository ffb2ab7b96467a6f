"""Rows gathered by spheres: in the background, in work items, while others stop or fork."""

from __future__ import annotations

import os
import random
import threading

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import torch_spheres as ts
from torch_spheres.data.tensor_gather import prepare_gather


def test_rows_are_gathered_while_nobody_waits(spheres):
    dataset = TensorDataset(torch.randn(4000, 301))
    prepared = [prepare_gather(dataset, random.choices(range(4000), k=500)) for _ in range(80)]
    for _, rows in prepared:  # more than there may be batches in flight: the rest waits
        rows.start(spheres._core)
        rows.start(spheres._core)
    for batch, rows in prepared[::2]:
        rows.finish(spheres._core)
        rows.finish(spheres._core)  # once more is no harm
        assert rows.bytes == batch[0].nbytes
    del prepared, rows, batch  # those that nobody has waited for end first
    again = prepare_gather(dataset, [*range(4000)])
    again[1].start(spheres._core)
    again[1].finish(spheres._core)
    assert torch.equal(again[0][0], dataset.tensors[0])


def test_spheres_that_stop_leave_the_rest_to_the_caller():
    dataset = TensorDataset(torch.randn(4000, 301))
    for _ in range(20):
        with ts.KissingSpheres(levels=2, concurrency=1) as spheres:
            gate = threading.Event()
            spheres._core.submit(lambda _, gate=gate: gate.wait(0.01), (0,), collect=True)
            batch, rows = prepare_gather(dataset, [*range(4000)])
            rows.start(spheres._core)
            stopper = threading.Thread(target=spheres.stop)
            stopper.start()
            gate.set()
            rows.finish(spheres._core)
            stopper.join()
        assert torch.equal(batch[0], dataset.tensors[0])


def test_a_half_used_loader_of_tensors_may_be_dropped_or_forked(spheres):
    rows = torch.randn(2000, 1000)
    for _ in range(10):
        iterator = iter(ts.wrap(DataLoader(TensorDataset(rows), 200, num_workers=2), spheres))
        next(iterator)
        pid = os.fork()
        if pid == 0:
            del iterator  # must not wait for threads that are not here
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        del iterator


def test_memory_that_a_tensor_has_given_up_is_read_to_the_end():
    """`.data` gives it other memory while rows are on their way."""
    dataset = TensorDataset(torch.ones(4000, 1000))
    with ts.KissingSpheres(levels=2, concurrency=1) as spheres:
        gate = threading.Event()
        held = spheres._core.submit(lambda _: gate.wait(60), (0,), collect=True)
        iterator = iter(ts.wrap(DataLoader(dataset, 500, num_workers=2), spheres))
        dataset.tensors[0].data = torch.full((4000, 1000), 2.0)
        junk = torch.full((4000, 1000), 3.0)  # where the old memory would be
        gate.set()
        held.wait(60)
        values = [batch.unique().tolist() for (batch,) in iterator]
    del junk
    # Four were on their way; those after them are of what is there now.
    assert values == [[1.0]] * 4 + [[2.0]] * 4


@pytest.mark.parametrize("started", [False, True])
def test_a_work_item_finishes_what_others_began(started):
    """Its own thread may be the one that should copy the rows."""
    dataset = TensorDataset(torch.randn(2000, 301))
    with ts.KissingSpheres(levels=2, concurrency=1) as spheres:
        gate = threading.Event()
        held = spheres._core.submit(lambda _: gate.wait(60), (0,), collect=True)
        batch, rows = prepare_gather(dataset, [*range(1999, -1, -1)])

        def finish(_):
            rows.finish(spheres._core)
            return torch.equal(batch[0], dataset.tensors[0].flip(0))

        work = spheres._core.submit(finish, (0,), collect=True)
        if started:
            rows.start(spheres._core)
        gate.set()
        held.wait(60)
        work.wait(60)
        assert work.results == [True]


def test_busy_spheres_keep_nobody_waiting():
    dataset = TensorDataset(torch.randn(2000, 301))
    with ts.KissingSpheres(levels=2, concurrency=1) as spheres:
        gate = threading.Event()
        held = spheres._core.submit(lambda _: gate.wait(60), (0,), collect=True)
        batch, rows = prepare_gather(dataset, [*range(2000)])
        rows.start(spheres._core)
        assert not rows.done
        rows.finish(spheres._core)
        assert torch.equal(batch[0], dataset.tensors[0])
        gate.set()
        held.wait(60)
