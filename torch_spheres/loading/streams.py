"""Random numbers while a dataset loads: a logical worker's own, and those that threads share."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from torch_spheres import _compat
from torch_spheres.random import Active

__all__ = ["WorkerStreams", "numpy_state", "shared_states"]


class WorkerStreams:
    """What a process worker's default generators would give: seeded by *base seed + worker*.

    Args:
        seed: of this worker.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def active(self) -> Active:
        """On the calling thread: default random numbers are this worker's inside the block."""
        return Active(self)

    def generator(self, device: torch.device) -> torch.Generator:
        """The worker's generator on a device."""
        generator = self._generators.get(device)
        if generator is None:
            generator = torch.Generator(device).manual_seed(self._seed)
            self._generators[device] = generator
        return generator

    def instead_of(self, given: torch.Generator, op: Any) -> torch.Generator:
        """The same: what a dataset does with a generator of its own is its own affair."""
        del op
        return given


def numpy_state(generator: Any) -> Any:
    """Plain values, which compare by ``==``, ``set_state`` takes and ``torch.load`` gives back.

    Args:
        generator: a `RandomState`, or `numpy.random`.
    """
    state = generator.get_state(legacy=False)
    return _compat.pytree.tree_map_only(np.ndarray, np.ndarray.tolist, state)


def shared_states() -> Any:
    """Of Python's and numpy's process-wide generators."""
    return random.getstate(), numpy_state(np.random)
