"""Index lists and draws are those of torch's samplers, at the same moments."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import BatchSampler, RandomSampler, SequentialSampler

from torch_spheres.loading.index_lists import index_lists


def moments(lists, generator):
    """Each list with the states of both generators after it, and those at the end."""
    out = []
    iterator = iter(lists)
    while True:
        part = next(iterator, None)
        own = None if generator is None else generator.get_state().tolist()
        out.append((part, torch.get_rng_state().tolist(), own))
        if part is None:
            return out


@pytest.mark.parametrize("rows", [1, 7, 12, 13])
@pytest.mark.parametrize("size", [1, 3, 4, 12, 20])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("kind", ["random", "own", "counted", "sequential"])
def test_they_are_those_of_torch(rows, size, drop_last, kind):
    def run(iterate):
        torch.manual_seed(3)
        generator = torch.Generator().manual_seed(1) if kind == "own" else None
        inner = (
            SequentialSampler(range(rows))
            if kind == "sequential"
            else RandomSampler(
                range(rows),
                generator=generator,
                num_samples=(rows or None) if kind == "counted" else None,
            )
        )
        batches = BatchSampler(inner, size, drop_last)
        return [step for _ in range(2) for step in moments(iterate(batches), generator)]

    assert run(index_lists) == run(iter)


def test_it_is_used_for_torchs_own_classes_only(monkeypatch):
    class Mine(RandomSampler):
        pass

    plain = BatchSampler(RandomSampler(range(9)), 2, drop_last=False)
    assert index_lists(plain).gi_code is not iter(plain).gi_code
    for other in (
        BatchSampler(Mine(range(9)), 2, drop_last=False),
        BatchSampler(RandomSampler(range(9), replacement=True), 2, drop_last=False),
        BatchSampler(RandomSampler(range(9), num_samples=5), 2, drop_last=False),
    ):
        assert index_lists(other).gi_code is iter(other).gi_code
    monkeypatch.setattr(RandomSampler, "__iter__", lambda self: iter([5, 5, 5]))
    assert [*index_lists(plain)] == [[5, 5], [5]]


def test_a_batch_size_that_changes_in_mid_epoch_is_followed():
    for iterate in (iter, index_lists):
        batches = BatchSampler(SequentialSampler(range(9)), 2, drop_last=False)
        lists = iterate(batches)
        assert next(lists) == [0, 1]
        batches.batch_size = 4
        assert [*lists] == [[2, 3, 4, 5], [6, 7, 8]]
