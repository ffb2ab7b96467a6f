"""Loaders in work items, and in other loaders' datasets."""

from __future__ import annotations

import threading

import pytest
import torch
from loader_support import Numbers, wrapped
from torch.utils.data import Dataset, TensorDataset

import torch_spheres as ts

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


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
