"""Samplers of every kind, and spheres that only remember, for the sampler's tests."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from effort import rounds
from hypothesis import settings
from hypothesis import strategies as st
from torch.utils.data import (
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

WORLDS = (1, 2, 3, 4, 6, 12)
thorough = settings(max_examples=rounds(40))


class FakeSpheres:
    """The part of KissingSpheres that the sampler uses, in the calling thread."""

    def __init__(self, levels: int) -> None:
        self.levels = levels
        self.leaves = 12 ** (levels - 1)
        self.items: list[list[int]] = []  # of the latest call

    def map(self, fn: Callable[[list[int]], Any], items: list[list[int]]) -> list[Any]:
        self.items = items
        return [fn(item) for item in items]

    def distribute_work(self, items: list[list[int]], fn: Callable[[list[int]], Any]) -> str:
        self.map(fn, items)
        return "handle"


# ---- samplers of every kind ----------------------------------------------------------------


class TrackingSampler(Sampler[int]):
    """Its state is its position in the epoch, as torchdata's StatefulDistributedSampler's is."""

    def __init__(self, n: int) -> None:
        self.n, self.epoch, self.yielded, self.next_yielded = n, 0, 0, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.yielded, self.next_yielded = self.next_yielded, 0
        order = random.Random(self.epoch).sample(range(self.n), self.n)
        for index in order[self.yielded :]:
            self.yielded += 1
            yield index

    def __len__(self) -> int:
        return self.n

    def state_dict(self) -> dict[str, int]:
        return {"yielded": self.yielded}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next_yielded = state["yielded"]


class OwnRandomSampler(Sampler[int]):
    """Its state is that of its random numbers, and knows no position."""

    def __init__(self, n: int) -> None:
        self.n, self.random = n, random.Random(5)

    def __iter__(self) -> Iterator[int]:
        return iter(self.random.sample(range(self.n), self.n))

    def __len__(self) -> int:
        return self.n

    def state_dict(self) -> dict[str, Any]:
        return {"random": self.random.getstate()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        version, numbers, gauss = state["random"]
        self.random.setstate((version, tuple(numbers), gauss))


class CountingSampler(Sampler[int]):
    """Seeds its generator from an epoch that it counts itself, as accelerate's does."""

    def __init__(self, n: int) -> None:
        self.n, self.epoch = n, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        yield from random.Random(self.epoch).sample(range(self.n), self.n)
        self.epoch += 1

    def __len__(self) -> int:
        return self.n


def given_generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


SAMPLERS: dict[str, Callable[[int], Any]] = {
    "list": lambda n: list(range(n, 0, -1)),
    "sequential": lambda n: SequentialSampler(range(n)),
    "random": lambda n: RandomSampler(range(n)),
    "random, generator": lambda n: RandomSampler(range(n), generator=given_generator()),
    "random, replacement": lambda n: RandomSampler(range(n), replacement=True, num_samples=3 * n),
    "random, replacement, generator": lambda n: RandomSampler(
        range(n), replacement=True, num_samples=3 * n, generator=given_generator()
    ),
    "random, two rounds": lambda n: RandomSampler(
        range(n), num_samples=2 * n + n // 2, generator=given_generator()
    ),
    "subset": lambda n: SubsetRandomSampler(range(n)),
    "subset, generator": lambda n: SubsetRandomSampler(range(n), given_generator()),
    "weighted, generator": lambda n: WeightedRandomSampler(
        [1.0 + i for i in range(n)], n, generator=given_generator()
    ),
    "distributed": lambda n: DistributedSampler(range(n), num_replicas=1, rank=0, seed=4),  # type: ignore[arg-type]
    "tracking": TrackingSampler,
    "own random": OwnRandomSampler,
    "counting": CountingSampler,
}
every_sampler = st.sampled_from(sorted(SAMPLERS))


def saved(state: Any) -> Any:
    """The state as it comes back from a file."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def draws(sampler: Any) -> torch.Tensor:
    """The state of what a sampler from SAMPLERS draws from."""
    generator = getattr(sampler, "generator", None)
    return torch.get_rng_state() if generator is None else generator.get_state()
