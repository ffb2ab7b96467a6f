"""Random numbers while a dataset loads: a logical worker's own, or a watch over who draws any."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from torch_spheres.random import Active

__all__ = ["GlobalStates", "Noticing", "Watching", "WorkerStreams"]


class WorkerStreams:
    """What a process worker's default generators would give: seeded by *base seed + worker*.

    Args:
        seed: of this worker.
        cpu: its generator for the CPU, seeded.
    """

    def __init__(self, seed: int, cpu: torch.Generator) -> None:
        self._seed = seed
        self._generators = {torch.device("cpu"): cpu}

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


class Noticing:
    """Notices draws and lets them through: for loading in the order of the plain loader."""

    def __init__(self) -> None:
        self.drew = False

    def active(self) -> Active:
        """Has the calling thread's draws noticed inside the block."""
        return Active(self)

    def generator(self, device: torch.device) -> torch.Generator:
        """The default one."""
        self.drew = True
        if device.type == "cpu":
            return torch.default_generator
        module = torch.get_device_module(device)
        index = module.current_device() if device.index is None else device.index
        found: torch.Generator = module.default_generators[index]
        return found

    def instead_of(self, given: torch.Generator, op: Any) -> torch.Generator:
        """The same."""
        del op
        self.drew = True
        return given


class Watching(Noticing):
    """Notices draws and keeps them away from everybody's generators: what was loaded is void."""

    def generator(self, device: torch.device) -> torch.Generator:
        """Some other one."""
        self.drew = True
        return torch.Generator(device)

    def instead_of(self, given: torch.Generator, op: Any) -> torch.Generator:
        """Some other one: the owner's stays where it was."""
        del op
        return self.generator(given.device)


@dataclass(frozen=True)
class GlobalStates:
    """Of Python's and numpy's process-wide generators."""

    python: Any
    numpy: Any

    @staticmethod
    def now() -> GlobalStates:
        """As they are."""
        numpy_state: Any = np.random.get_state(legacy=True)
        kind, keys, *rest = numpy_state
        return GlobalStates(random.getstate(), (kind, keys.tobytes(), *rest))

    def restore(self) -> None:
        """As they were."""
        random.setstate(self.python)
        kind, keys, *rest = self.numpy
        np.random.set_state((kind, np.frombuffer(keys, dtype=np.uint32), *rest))
