"""The index lists of torch's own samplers, cut from one list instead of joined index by index.

For a dataset in memory, handing 60,000 indices one by one through two generators takes as long as
gathering the rows. Lists, draws and the moments of the draws are those of torch's classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import BatchSampler, RandomSampler, SequentialSampler

__all__ = ["index_lists"]

_KINDS = (BatchSampler, RandomSampler, SequentialSampler)
_ITERS = {kind: kind.__iter__ for kind in _KINDS}  # as torch has them


def index_lists(sampler: Any) -> Iterator[Any]:
    """``iter(sampler)``."""
    inner: Any = getattr(sampler, "sampler", None)
    ours = type(sampler) is BatchSampler and type(inner) in (RandomSampler, SequentialSampler)
    if not ours or any(kind.__iter__ is not known for kind, known in _ITERS.items()):
        return iter(sampler)
    if type(inner) is SequentialSampler:
        return _sequential(sampler, inner)
    if (
        inner.replacement
        or inner.num_samples != len(inner.data_source)
        or len(inner.data_source) == 0
    ):
        return iter(sampler)
    return _random(sampler, inner)


def _sequential(batches: BatchSampler, sampler: Any) -> Iterator[list[int]]:
    yield from _cut(batches, range(len(sampler.data_source)), None)


def _random(batches: BatchSampler, sampler: RandomSampler) -> Iterator[list[int]]:
    # (A generator: it begins, and draws, when the first list is asked for.)
    generator = sampler.generator
    if generator is None:
        seed = int(torch.empty((), dtype=torch.int64).random_().item())
        generator = torch.Generator()
        generator.manual_seed(seed)
    order = torch.randperm(len(sampler.data_source), generator=generator).tolist()
    yield from _cut(batches, order, generator)


def _cut(
    batches: BatchSampler, order: Sequence[int], generator: torch.Generator | None
) -> Iterator[list[int]]:
    begin = 0
    while True:
        end = begin + batches.batch_size
        if end > len(order) and generator is not None:
            # Asked past its end, a RandomSampler draws another permutation, and takes none of it.
            torch.randperm(len(order), generator=generator)
            generator = None
        part = list(order[begin:end])
        if not part or (batches.drop_last and end > len(order)):
            return
        yield part
        begin = end
