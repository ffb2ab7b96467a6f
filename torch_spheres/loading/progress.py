"""Where a loader is in its epoch, and how to come back there.

An epoch is repeated from what its sampler draws from (`source_of` in sampler.py): the state from
before the first draw is saved, and on resumption the same index lists are asked for again and
dropped, without loading anything. The process-wide generator is left as the caller has restored it.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch.utils.data import DataLoader

from torch_spheres import _compat
from torch_spheres.loading.snapshots import Snapshot
from torch_spheres.sampler import check_state, source_of

__all__ = ["Progress", "Sources", "shape_of"]


@dataclass
class Progress:
    """What `state_dict` returns, as a dict of plain values and tensors."""

    batch_size: int | None
    drop_last: bool
    num_workers: int
    iterable: bool
    source: str
    """What the sampler draws from."""
    start: dict[str, Any]
    """The state of that, and of the loader's generator, before the epoch's first draw."""
    now: dict[str, Any]
    """The same, when this was saved: others may draw from a given generator, too."""
    begun: bool
    """Whether the epoch has; if not, this is the epoch to come."""
    base_seed: int | None = None
    """The epoch's; None: it draws one when it begins."""
    fresh: bool = True
    """Whether the epoch has drawn its base seed itself: later ones of persistent workers do not."""
    tasks: int = 0
    """Index lists, up to the last whose batch was handed out."""
    yielded: int = 0
    """Batches that were handed out: fewer, where workers have come to their end."""
    digest: int = 0
    """Of those: the same must come again."""
    next_worker: int = 0
    ended: list[int] = field(default_factory=list)
    """Workers whose iterable dataset is at its end."""
    workers: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Random streams and the iterable dataset's progress, of each worker."""

    def snapshots(self) -> dict[int, Snapshot]:
        """Of the workers, as they were when the last batch was handed out."""
        return {w: Snapshot(**saved) for w, saved in self.workers.items()}

    def as_dict(self) -> dict[str, Any]:
        """A copy; nothing in it changes when the loader goes on."""
        return copy.deepcopy(vars(self))

    @staticmethod
    def of(state: Mapping[str, Any], loader: DataLoader[Any]) -> Progress:
        """Checks a saved state against the loader that is to go on from it.

        Raises:
            ValueError: it is no such state, or was saved by another kind of loader.
        """
        names = [f.name for f in fields(Progress)]
        check_state(state, "a wrapped loader", names, shape_of(loader))
        return Progress(**copy.deepcopy({name: state[name] for name in names}))

    @staticmethod
    def to_come(loader: DataLoader[Any]) -> Progress:
        """Of an epoch that has not begun."""
        now = Sources(loader).capture()
        return Progress(**shape_of(loader), start=now, now=now, begun=False)


def shape_of(loader: DataLoader[Any]) -> dict[str, Any]:
    """What a loader has to have in common with the one whose state it goes on from."""
    return {
        "batch_size": loader.batch_size,
        "drop_last": loader.drop_last,
        "num_workers": loader.num_workers,
        "iterable": loader._dataset_kind == _compat.DatasetKind.Iterable,
        "source": Sources(loader).kind,
    }


class Sources:
    """What a loader and its sampler draw from."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        sampler: Any = loader._index_sampler
        if not hasattr(sampler, "state_dict"):
            sampler = getattr(sampler, "sampler", sampler)
        self.kind, self._capture, self._restore = source_of(sampler)
        self._generator = loader.generator

    def capture(self) -> dict[str, Any]:
        """All of it, now."""
        own = None if self._generator is None else self._generator.get_state()
        return {"sampler": self._capture(), "loader": own, "global": torch.get_rng_state()}

    def restore(self, saved: dict[str, Any]) -> None:
        """All but the global generator."""
        if self.kind != "global":
            self._restore(saved["sampler"])
        self.restore_generators(saved)

    def restore_generators(self, saved: dict[str, Any]) -> None:
        """Those that were given, and that others may draw from as well."""
        if self.kind == "generator":
            self._restore(saved["sampler"])
        if self._generator is not None and saved["loader"] is not None:
            self._generator.set_state(saved["loader"])

    @contextlib.contextmanager
    def repeating(self, state: torch.Tensor | None) -> Iterator[None]:
        """A block in which the global generator is at `state`; afterwards where it was."""
        with torch.random.fork_rng(devices=[]):
            if state is not None:
                torch.set_rng_state(state)
            yield
