"""What a wrapped loader saves of an epoch, and how an iterator comes back to that position.

An epoch is repeated from what its sampler draws from (`draw_source` in sampler_state.py): the state
from before the first draw is saved, and on resumption the same index lists are asked for again and
dropped, without loading anything. The process-wide generator is left as the caller restored it.

`SphereLoader` saves and loads a `LoaderState`; its iterators keep an `EpochPosition`; logical
workers take a `WorkerSnapshot` after each task.
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
from torch_spheres.runtime.random_states import numpy_state, restore_random_states

__all__ = [
    "EpochPosition",
    "LoaderRandomState",
    "LoaderState",
    "WorkerSnapshot",
    "has_position",
    "required_options",
    "shared_states",
]

_FAILED = "failed"
_set_epoch_lock = threading.Lock()


def shared_states() -> Any:
    """States of Python's and numpy's process-wide generators."""
    return random.getstate(), numpy_state(np.random)


def has_position(value: Any) -> bool:
    """Whether a dataset or iterator can save its position, by torchdata's protocol."""
    return callable(getattr(value, "state_dict", None)) and callable(
        getattr(value, "load_state_dict", None)
    )


def _shuffles_in_a_buffer(dataset: Any) -> bool:
    """Whether a Hugging Face dataset has a shuffle buffer, whose rows its state does not contain.

    Its rows depend on its seed and its epoch alone, so that it can be read again.
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
class WorkerSnapshot:
    """A worker's state after a task. The field names are keys of saved states."""

    fetched: int  # tasks that the worker has done in the epoch
    streams: dict[str, Any] | None  # states of its random streams
    holder: str  # whose `progress` is saved: "iterator" or "dataset", "" (nobody's) or `_FAILED`
    progress: Any = None  # `_FAILED`: what state_dict() raised
    begin: dict[str, Any] | None = None  # `streams` when an iterable dataset's epoch began

    @staticmethod
    def take(
        streams: dict[str, Any] | None,
        fetcher: Any,
        fetched: int,
        begin: dict[str, Any] | None = None,
    ) -> WorkerSnapshot:
        """A snapshot with the state of torch's fetcher; on the thread that loads."""
        snapshot = WorkerSnapshot(fetched, streams, "", begin=begin)
        iterator = getattr(fetcher, "dataset_iter", None)
        if iterator is None:  # map-style: the sampler's position is all there is
            return snapshot
        if _shuffles_in_a_buffer(fetcher.dataset):
            snapshot.progress = {"epoch": getattr(fetcher.dataset, "epoch", None)}
            return snapshot
        for holder, value in (("iterator", iterator), ("dataset", fetcher.dataset)):
            if has_position(value):
                try:
                    snapshot.progress = copy.deepcopy(value.state_dict())
                    snapshot.holder = holder
                except Exception as error:  # noqa: BLE001
                    # Only `EpochPosition.save` raises it: a loop that saves nothing goes on.
                    snapshot.progress = f"{type(value).__name__}: {error!r}"
                    snapshot.holder = _FAILED
                break
        return snapshot

    def restore(
        self, dataset: Any, make: Callable[[Any], Fetcher], samples: int, rng: Any = None
    ) -> Fetcher:
        """Has `make` make a fetcher of the dataset, which stands where it stood after the task.

        The dataset's own state is loaded, or else the samples of each task are read again and
        dropped, with the random streams `rng` as they were when the epoch began.

        Raises:
            RuntimeError: the dataset draws from the process's own generators, so that it does not
                give again what it gave.
        """
        if rng is not None and (begin := self.begin or self.streams) is not None:
            restore_random_states(begin, rng)
        if self.holder == "dataset":
            dataset.load_state_dict(copy.deepcopy(self.progress))
        if self.holder == "" and self.progress and self.progress["epoch"] is not None:
            with _set_epoch_lock:  # copies may share the memory that holds the epoch
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
        """Sets the random streams; after `restore`, which draws from them."""
        if self.streams is not None and rng is not None:
            restore_random_states(self.streams, rng)

    def streams_only(self) -> WorkerSnapshot:
        """The snapshot with which a worker begins the next epoch instead of going on with this."""
        return WorkerSnapshot(0, self.streams, "")


@dataclass
class LoaderState:
    """What `SphereLoader.state_dict` returns as a dict: the field names are its keys."""

    batch_size: int | None
    drop_last: bool
    num_workers: int
    iterable: bool
    source: str  # the kind of the sampler's `DrawSource`
    start: dict[str, Any]  # `LoaderRandomState.capture` before the epoch's first draw
    now: dict[str, Any]  # the same when this was saved: others may draw from a given generator
    begun: bool  # False: this is the state of the epoch to come
    base_seed: int | None = None  # None: the epoch draws one when it begins
    fresh: bool = True  # the epoch draws its base seed; later ones of persistent workers do not
    tasks: int = 0  # index lists, up to the last whose batch was handed out
    yielded: int = 0  # batches handed out: fewer, where workers have come to their end
    digest: int = 0  # checksum of the index lists: the same must come again
    next_worker: int = 0
    ended: list[int] = field(default_factory=list)  # workers at their iterable dataset's end
    workers: dict[int, dict[str, Any]] = field(default_factory=dict)  # their `WorkerSnapshot`s

    def snapshots(self) -> dict[int, WorkerSnapshot]:
        """The workers' snapshots when the last batch was handed out."""
        return {w: WorkerSnapshot(**saved) for w, saved in self.workers.items()}

    def as_dict(self) -> dict[str, Any]:
        """A deep copy: nothing in it changes when the loader goes on."""
        return copy.deepcopy(vars(self))

    @staticmethod
    def from_dict(state: Mapping[str, Any], loader: DataLoader[Any]) -> LoaderState:
        """Checks a saved state against the loader that is to go on from it.

        Raises:
            ValueError: it is no such state, or was saved by another kind of loader.
        """
        return from_state(LoaderState, state, "a wrapped loader", required_options(loader))

    @staticmethod
    def of_next_epoch(loader: DataLoader[Any]) -> LoaderState:
        """The state of an epoch that has not begun."""
        now = LoaderRandomState(loader).capture()
        return LoaderState(**required_options(loader), start=now, now=now, begun=False)


def required_options(loader: DataLoader[Any]) -> dict[str, Any]:
    """What has to be the same of the loader that saved a state and the one that loads it."""
    return {
        "batch_size": loader.batch_size,
        "drop_last": loader.drop_last,
        "num_workers": loader.num_workers,
        "iterable": loader._dataset_kind == _compat.DatasetKind.Iterable,
        "source": LoaderRandomState(loader).kind,
    }


class EpochPosition:
    """Where an iterator is in its epoch.

    The loader keeps it when the iterator is gone, so it holds neither dataset nor workers.
    """

    state: LoaderState  # after the batch that was handed out last; `save` fills in the rest
    base_seed: int

    def __init__(self, random_state: LoaderRandomState, in_order: bool) -> None:
        self._random_state, self._in_order = random_state, in_order
        self.snapshots: dict[int, WorkerSnapshot] = {}  # of the workers
        self.finished = False  # all of the epoch was handed out

    def save(self) -> LoaderState:
        """The state after the batch that was handed out last.

        Raises:
            RuntimeError: batches come out of order, or the iterable dataset's own
                ``state_dict()`` has failed.
        """
        if not self._in_order:
            raise RuntimeError(
                "a loader with in_order=False has no position to save; use in_order=True"
            )
        for snapshot in self.snapshots.values():
            if snapshot.holder == _FAILED:
                raise RuntimeError(f"the dataset has no state to save: {snapshot.progress}")
        return replace(
            self.state,
            now=self._random_state.capture(),
            base_seed=self.base_seed,
            workers={w: dict(vars(snapshot)) for w, snapshot in self.snapshots.items()},
        )


class LoaderRandomState:
    """What a loader and its sampler draw from; `kind` is that of the sampler's `DrawSource`."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        sampler: Any = loader._index_sampler
        if not hasattr(sampler, "state_dict"):
            sampler = getattr(sampler, "sampler", sampler)
        self.kind, self._capture, self._restore = draw_source(sampler)
        self._generator = loader.generator

    def capture(self) -> dict[str, Any]:
        """The current states of the sampler, the loader's generator and torch's default one."""
        own = None if self._generator is None else self._generator.get_state()
        return {"sampler": self._capture(), "loader": own, "global": torch.get_rng_state()}

    def restore(self, saved: dict[str, Any], *, generators_only: bool = False) -> None:
        """Restores all but torch's default generator; or without a sampler's own state."""
        if self.kind == "generator" or (self.kind == "sampler" and not generators_only):
            self._restore(saved["sampler"])
        if self._generator is not None and saved["loader"] is not None:
            self._generator.set_state(saved["loader"])

    @contextlib.contextmanager
    def default_generator_at(self, state: torch.Tensor | None) -> Iterator[None]:
        """Sets torch's default generator (None: leaves it), and puts it back after the block."""
        with torch.random.fork_rng(devices=[]):
            if state is not None:
                torch.set_rng_state(state)
            yield
