"""Loaders in work items, in other loaders' datasets, on spheres without room."""

from __future__ import annotations

import signal
import threading
import time

import pytest
import torch
from loader_support import Numbers, eventually, wrapped
from torch.utils.data import DataLoader, Dataset, TensorDataset

import torch_spheres as ts
from torch_spheres.loading.team import Team

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("concurrency", [1, 2, 4])
def test_inside_a_work_item_of_the_same_spheres(workers, concurrency):
    """The item's own thread loads: the others may be as busy."""
    plain = DataLoader(Numbers(20), 4, num_workers=workers)

    def count(_):
        loader = ts.wrap(plain, spheres)
        return sum(len(batch[1]) for batch in loader)

    with ts.KissingSpheres(levels=2, concurrency=concurrency) as spheres:
        assert spheres.map(count, range(12)) == [20] * 12


class Outer(Dataset):
    """Its samples come from loaders on the same spheres."""

    def __init__(self, spheres, workers):
        self.spheres, self.inner = spheres, DataLoader(Numbers(8), 4, num_workers=workers)

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return sum(int(b[1].sum()) for b in ts.wrap(self.inner, self.spheres)) + index


@pytest.mark.parametrize("outer", [0, 2, 3])
@pytest.mark.parametrize("inner", [0, 2])
def test_a_loader_inside_the_dataset_of_another(outer, inner):
    for concurrency in (1, 2):
        with ts.KissingSpheres(levels=2, concurrency=concurrency) as spheres:
            loader = wrapped(Outer(spheres, inner), spheres, outer)
            assert [batch.tolist() for batch in loader] == [[28, 29], [30, 31], [32, 33]]


def test_a_full_runtime_and_a_long_queue(monkeypatch):
    """64 batches are in flight: tasks follow each other on one sphere, in a loop."""
    refused, kept = [], []
    schedule = Team._schedule

    def counting(team, queue, **promised):
        taken = schedule(team, queue, **promised)
        refused.append(not taken)
        # It is still promised, or the loop's thread would wait for room to hand it in.
        kept.append(taken or queue.scheduled)
        return taken

    monkeypatch.setattr(Team, "_schedule", counting)
    with ts.KissingSpheres(levels=2, concurrency=2) as spheres:
        first, gate = threading.Event(), threading.Event()

        class Waits(Numbers):
            def __getitem__(self, index):
                assert index > 0 or first.wait(60)
                return super().__getitem__(index)

        loader = wrapped(Waits(4000), spheres, 1, prefetch_factor=1500)
        iterator = iter(loader)
        fill_up(spheres, gate, already=1)
        first.set()
        rows = sum(len(batch[1]) for batch in iterator)
        gate.set()
        assert rows == 4000 and any(refused) and all(kept)


def test_a_task_is_handed_in_once(spheres, monkeypatch):
    """Though others look for tasks just before a sphere takes one in hand."""
    calls, do_one, do_task = [], Team._do_one, Team._do_task

    def counting(team, queue):
        calls.append(1)
        do_one(team, queue)

    def late(team, queue, **promised):
        time.sleep(0.02)
        return do_task(team, queue, **promised)

    monkeypatch.setattr(Team, "_do_one", counting)
    monkeypatch.setattr(Team, "_do_task", late)
    batches = len([*wrapped(Numbers(12), spheres, 1, prefetch_factor=4)])
    assert batches > 4 and len(calls) == batches


def fill_up(spheres, gate, already=0):
    """Until there are 64 batches in flight, the most that there may be."""
    return [
        spheres._core.submit(lambda _: gate.wait(60), (0,), collect=True)
        for _ in range(64 - already)
    ]


def test_ctrl_c_while_a_task_waits_for_room(monkeypatch):
    """The batch that was on its way to the loop, and the task, are there when it comes again."""
    scheduling, schedule = threading.Event(), Team._schedule

    def telling(team, queue, **promised):
        scheduling.set()
        return schedule(team, queue, **promised)

    def interrupt(thread):
        assert scheduling.wait(60)
        time.sleep(0.3)  # most likely it waits for room by now
        signal.pthread_kill(thread, signal.SIGINT)

    with ts.KissingSpheres(levels=2, concurrency=2) as spheres:
        gate = threading.Event()
        iterator = iter(wrapped(Numbers(12), spheres, 1, prefetch_factor=1))
        eventually(lambda: iterator._team.ready == 1)
        held = fill_up(spheres, gate)
        monkeypatch.setattr(Team, "_schedule", telling)
        watcher = threading.Thread(target=interrupt, args=(threading.get_ident(),))
        watcher.start()
        with pytest.raises(KeyboardInterrupt):
            next(iterator)
        watcher.join()
        gate.set()
        for work in held:
            work.wait(60)
        rows = [int(i) for batch in iterator for i in batch[1]]
        assert rows == list(range(12))


def test_ctrl_c_just_before_a_task_is_scheduled(spheres, monkeypatch):
    """And once more, when the next call is about to make up for it."""

    def interrupted(team, queue, **promised):
        raise KeyboardInterrupt

    iterator = iter(wrapped(Numbers(12), spheres, 1, prefetch_factor=1, timeout=60))
    eventually(lambda: iterator._team.ready == 1)
    with monkeypatch.context() as patch:
        patch.setattr(Team, "_schedule", interrupted)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                next(iterator)
    assert [int(i) for batch in iterator for i in batch[1]] == list(range(12))


@pytest.mark.parametrize("kind", ["samples", "tensors"])
def test_an_iterator_from_outside_goes_on_in_a_work_item(kind):
    """What is under way for it may be waiting for that item's very thread."""
    dataset = Numbers(60) if kind == "samples" else TensorDataset(torch.randn(60, 60000))
    with ts.KissingSpheres(levels=2, concurrency=1) as spheres:
        loader = wrapped(dataset, spheres, 2, persistent_workers=True)
        for _ in range(5):
            gate = threading.Event()
            held = spheres._core.submit(lambda _, gate=gate: gate.wait(60), (0,), collect=True)
            iterator = iter(loader)
            rest = spheres._core.submit(
                lambda _, iterator=iterator: (len([*iterator]), len([*loader])), (0,), collect=True
            )
            gate.set()
            held.wait(60)
            rest.wait(60)
            assert rest.results == [(30, 30)]


def test_a_new_epoch_in_a_work_item_while_tasks_are_under_way():
    with ts.KissingSpheres(levels=2, concurrency=1) as spheres:
        loader = wrapped(Numbers(60), spheres, 2, persistent_workers=True)
        gate = threading.Event()
        held = spheres._core.submit(lambda _: gate.wait(60), (0,), collect=True)
        iter(loader)
        rest = spheres._core.submit(lambda _: len([*loader]), (0,), collect=True)
        gate.set()
        held.wait(60)
        rest.wait(60)
        assert rest.results == [30]


def test_what_a_waiting_sphere_has_set_is_not_the_datasets():
    """A task that is done in the middle of somebody's inference is not part of it."""
    seen = []

    class Looks(Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            modes = torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
            seen.append((*modes, torch.is_grad_enabled(), str(torch.ones(1).device)))
            return torch.ones(1) * index

    with ts.KissingSpheres(levels=2, concurrency=1) as spheres:
        gate = threading.Event()
        held = spheres._core.submit(lambda _: gate.wait(60), (0,), collect=True)
        iterator = iter(wrapped(Looks(), spheres, 2))

        def go_on(_):
            with torch.inference_mode(), torch.autocast("cpu"), torch.device("meta"):
                batches = [*iterator]
                assert torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")
                assert torch.ones(1).device.type == "meta"
            return batches

        work = spheres._core.submit(go_on, (0,), collect=True)
        gate.set()
        held.wait(60)
        work.wait(60)
        batches = work.results[0]
    assert seen == [(False, False, True, "cpu")] * 8
    assert [b.flatten().tolist() for b in batches] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert not any(b.is_inference() for b in batches)
