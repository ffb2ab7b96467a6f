"""Where a loader and its workers are in their epoch, and how to come back there.

An epoch is repeated from what its sampler draws from (`draw_source` in sampler_state.py): the state
from before the first draw is saved, and on resumption the same index lists are asked for again and
dropped, without loading anything. The process-wide generator is left as the caller restored it.
"""

from __future__ import annotations

import contextlib
import copy
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from torch_spheres import _compat
from torch_spheres.data.fetch import Fetcher
from torch_spheres.data.sampler_state import draw_source, from_state
from torch_spheres.runtime.rng import numpy_state, restore_random_states

__all__ = [
    "FAILED",
    "Bookmark",
    "Progress",
    "Snapshot",
    "Sources",
    "has_position",
    "shape_of",
    "shared_states",
]

FAILED = "failed"
_setting_epochs = threading.Lock()


def shared_states() -> Any:
    """Of Python's and numpy's process-wide generators."""
    return random.getstate(), numpy_state(np.random)


def has_position(value: Any) -> bool:
    """Whether it can save where it is, as torchdata has it."""
    return callable(getattr(value, "state_dict", None)) and callable(
        getattr(value, "load_state_dict", None)
    )


def _loses_rows(dataset: Any) -> bool:
    """Whether it is one of Hugging Face's that shuffle rows in a buffer, which its state has not.

    What it gives depends on its seed and its epoch alone, so it can be read over.
    """
    if not type(dataset).__module__.startswith("datasets."):
        return False
    inner = getattr(dataset, "_ex_iterable", None)
    while inner is not None:
        if "Shuffled" in type(inner).__name__:
            return True
        inner = getattr(inner, "ex_iterable", None)
    return False


@dataclass
class Snapshot:
    """After a task: random streams, and how far an iterable dataset has come."""

    fetched: int
    """Tasks that the worker has done in the epoch."""
    streams: dict[str, Any] | None
    holder: str
    """Whose `progress` is the state: the dataset's ``"iterator"``, the ``"dataset"``, or ``""``;
    `FAILED`: there should be one, and `progress` says what its ``state_dict()`` raised."""
    progress: Any = None
    begin: dict[str, Any] | None = None
    """The streams when the epoch began, of an iterable dataset that may have to be read again."""

    @staticmethod
    def of(
        streams: dict[str, Any] | None,
        fetcher: Any,
        fetched: int,
        begin: dict[str, Any] | None = None,
    ) -> Snapshot:
        """On the worker's thread."""
        snapshot = Snapshot(fetched, streams, "", begin=begin)
        iterator = getattr(fetcher, "dataset_iter", None)
        if iterator is None:  # map-style: the sampler's position is all there is
            return snapshot
        if _loses_rows(fetcher.dataset):
            snapshot.progress = {"epoch": getattr(fetcher.dataset, "epoch", None)}
            return snapshot
        for holder, value in (("iterator", iterator), ("dataset", fetcher.dataset)):
            if has_position(value):
                try:
                    snapshot.progress = copy.deepcopy(value.state_dict())
                    snapshot.holder = holder
                except Exception as error:  # noqa: BLE001
                    # Whoever asks for the loader's state is told; nobody else needs it.
                    snapshot.progress = f"{type(value).__name__}: {error!r}"
                    snapshot.holder = FAILED
                break
        return snapshot

    def restore(
        self, dataset: Any, make: Callable[[Any], Fetcher], samples: int, rng: Any = None
    ) -> Fetcher:
        """What `make` makes of the dataset, where it was after the last task.

        By its own state, or else by dropping what each task took: so many samples.

        Args:
            dataset: the worker's.
            make: is given the dataset.
            samples: of each task.
            rng: the worker's random streams, which are where the epoch began meanwhile.

        Raises:
            RuntimeError: the dataset draws from the process's own generators, so that it does not
                give again what it gave.
        """
        if rng is not None and (begin := self.begin or self.streams) is not None:
            restore_random_states(begin, rng)
        if self.holder == "dataset":
            dataset.load_state_dict(copy.deepcopy(self.progress))
        if self.holder == "" and self.progress and self.progress["epoch"] is not None:
            with _setting_epochs:  # copies may share the memory that it is in
                if dataset.epoch != self.progress["epoch"]:
                    dataset.set_epoch(self.progress["epoch"])
        before = shared_states()
        fetcher = make(dataset)
        iterator: Any = getattr(fetcher.fetcher, "dataset_iter", None)
        if self.holder == "iterator":
            iterator.load_state_dict(copy.deepcopy(self.progress))
        elif self.holder == "" and iterator is not None and self.fetched:
            for _ in range(self.fetched * samples):
                next(iterator, None)
            if before != shared_states():
                raise RuntimeError(
                    f"{type(dataset).__name__} draws from Python's random or numpy.random, which "
                    "are not at the place where its epoch began, so that other samples would come "
                    "than those that were left: shuffle with torch, or with get_worker_info().rng, "
                    "or give the dataset state_dict() and load_state_dict()"
                )
        return fetcher

    def restore_streams(self, rng: Any) -> None:
        """Last, because what was fetched once more has drawn from them."""
        if self.streams is not None and rng is not None:
            restore_random_states(self.streams, rng)

    def streams_only(self) -> Snapshot:
        """For a worker that has not gone on with its epoch when the next one begins."""
        return Snapshot(0, self.streams, "")


@dataclass
class Progress:
    """What `state_dict` returns, as a dict of plain values and tensors."""

    batch_size: int | None
    drop_last: bool
    num_workers: int
    iterable: bool
    source: str  # what the sampler draws from
    start: dict[str, Any]  # that, and the loader's generator, before the epoch's first draw
    now: dict[str, Any]  # when this was saved: others may draw from a given generator, too
    begun: bool  # if not, this is of the epoch to come
    base_seed: int | None = None  # of the epoch; None: it draws one when it begins
    fresh: bool = True  # the epoch draws it itself: later ones of persistent workers do not
    tasks: int = 0  # index lists, up to the last whose batch was handed out
    yielded: int = 0  # batches handed out: fewer, where workers have come to their end
    digest: int = 0  # of the index lists: the same must come again
    next_worker: int = 0
    ended: list[int] = field(default_factory=list)  # workers at their iterable dataset's end
    workers: dict[int, dict[str, Any]] = field(default_factory=dict)  # a `Snapshot` of each

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
        return from_state(Progress, state, "a wrapped loader", shape_of(loader))

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


class Bookmark:
    """Where an iterator is, for who asks when it is gone: it holds neither dataset nor workers.

    Args:
        sources: what its epoch is drawn from.
        in_order: whether batches come in the order of their index lists.

    Attributes:
        at: after the batch that was handed out last.
        base_seed: of the epoch.
        snapshots: of the workers.
        finished: all of the epoch was handed out.
    """

    at: Progress
    base_seed: int

    def __init__(self, sources: Sources, in_order: bool) -> None:
        self._sources, self._in_order = sources, in_order
        self.snapshots: dict[int, Snapshot] = {}
        self.finished = False

    def progress(self) -> Progress:
        """After the batch that was handed out last.

        Raises:
            RuntimeError: batches come out of order, or the iterable dataset's own
                ``state_dict()`` has failed.
        """
        if not self._in_order:
            raise RuntimeError(
                "a loader with in_order=False has no position to save; use in_order=True"
            )
        for snapshot in self.snapshots.values():
            if snapshot.holder == FAILED:
                raise RuntimeError(f"the dataset has no state to save: {snapshot.progress}")
        return replace(
            self.at,
            now=self._sources.capture(),
            base_seed=self.base_seed,
            workers={w: dict(vars(snapshot)) for w, snapshot in self.snapshots.items()},
        )


class Sources:
    """What a loader and its sampler draw from."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        sampler: Any = loader._index_sampler
        if not hasattr(sampler, "state_dict"):
            sampler = getattr(sampler, "sampler", sampler)
        self.kind, self._capture, self._restore = draw_source(sampler)
        self._generator = loader.generator

    def capture(self) -> dict[str, Any]:
        """All of it, now."""
        own = None if self._generator is None else self._generator.get_state()
        return {"sampler": self._capture(), "loader": own, "global": torch.get_rng_state()}

    def restore(self, saved: dict[str, Any], *, sampler: bool = True) -> None:
        """All but the global generator, and but for a sampler's own state without `sampler`."""
        if self.kind == "generator" or (sampler and self.kind == "sampler"):
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
