"""`LogicalWorker`: what a worker process is to a `DataLoader`, without a process.

A `WorkerPool` makes the workers of an iterator, each with a thread, and hands tasks to them.
"""

from __future__ import annotations

import contextvars
import copy
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from torch_spheres import _compat
from torch_spheres.data.data_pipes import DATA_PIPES, copy_pipe, seed_pipe, shard_pipe
from torch_spheres.data.dataset_copy import shallow_copy, shared_memory_in
from torch_spheres.data.device_transfer import Delivery, DeviceTransfer
from torch_spheres.data.fetch import Fetcher
from torch_spheres.data.loader_stats import Meter
from torch_spheres.data.resume import WorkerSnapshot, has_position
from torch_spheres.data.worker_info import LoadPosition, asked_for_info, thread_shows
from torch_spheres.runtime.caller_context import CallerContext
from torch_spheres.runtime.random_states import random_states
from torch_spheres.runtime.rebinding import rebound
from torch_spheres.runtime.rng import RandomSource

__all__ = ["LogicalWorker", "Result", "Task", "WorkerConfig"]


class Task(NamedTuple):
    """One batch to load."""

    number: int  # of the batch in the epoch, from 0
    index: Any  # what the sampler gave
    rows: Sequence[int] | None  # positions of the indices in the global batch, if they are a part


@dataclass
class Result:
    """What a worker has made of one task."""

    worker: int
    deliver: Delivery | None = None
    error: BaseException | None = None
    ended: bool = False  # the worker's iterable dataset is at its end: there is no batch
    snapshot: WorkerSnapshot | None = None  # of the worker, after the task


@dataclass(frozen=True)
class WorkerConfig:
    """What all workers of an iterator have in common."""

    dataset: Any
    iterable: bool
    auto_collation: bool
    make_fetcher: Callable[[Any], Fetcher]
    init_fn: Callable[[int], Any] | None
    workers: int
    base_seed: int
    shared_seed: int | None  # of all workers' DataPipes
    copy_dataset: bool  # workers have deep copies
    context: CallerContext
    transfer: DeviceTransfer
    meter: Meter


def _dataset_for_worker(config: WorkerConfig) -> tuple[Any, dict[int, Any]]:
    """One worker's copy of the dataset, on which it may set attributes; all copies by original id.

    The copy is shallow (see `shallow_copy`), or deep for a dataset that saves its position.
    """
    copies: dict[int, Any] = {}
    dataset = config.dataset
    if isinstance(dataset, DATA_PIPES):
        return copy_pipe(dataset), copies
    saves_position = config.iterable and config.workers > 1 and has_position(dataset)
    if not (config.copy_dataset or saves_position):
        return shallow_copy(dataset, copies), copies
    try:
        made = copy.deepcopy(dataset, shared_memory_in(dataset))
    except Exception as error:
        error.add_note(
            f"wrap() copies {type(dataset).__name__} for each logical worker, which was "
            "asked for with copy_dataset=True, or saves its position (state_dict)"
        )
        raise
    copies[id(dataset)] = made
    return made, copies


class LogicalWorker:
    """One logical worker; its tasks come one at a time, so nothing in it needs a lock.

    It goes on from `restored`. `abandoned` is set when nobody waits for batches any more.
    """

    def __init__(
        self,
        config: WorkerConfig,
        number: int,
        restored: WorkerSnapshot | None,
        abandoned: threading.Event,
    ) -> None:
        self._config, self.number, self._abandoned = config, number, abandoned
        self._restored = restored
        # A process would have its copy now, not when the first task comes.
        self._dataset, copies = _dataset_for_worker(config)
        # Methods of the dataset become methods of the worker's copy, as they are in a process.
        self._init_fn = rebound(config.init_fn, copies)
        self._make_fetcher = rebound(config.make_fetcher, copies)
        # Context variables that one task sets are there for the next, as in a process.
        self._context_variables = contextvars.copy_context()
        self._is_set_up = False
        self._fetcher: Fetcher | None = None
        self._failure: BaseException | None = None  # of worker_init_fn
        self._tasks_done = 0  # of this epoch
        self._ended = False
        self._streams_at_begin: dict[str, Any] | None = None  # of an iterable dataset's epoch
        self._info_was_read = False  # the info, which has the worker's random streams
        self._stream_states: dict[str, Any] | None = None

    def begin_epoch(self, shared_seed: int | None) -> None:
        """Has the next task make a new iterator of the dataset, as persistent workers do."""
        if isinstance(self._dataset, DATA_PIPES):
            seed_pipe(self._dataset, shared_seed)
        self._fetcher = self._streams_at_begin = None
        self._tasks_done = 0
        self._ended = False
        if self._restored is not None:
            self._restored = self._restored.streams_only()

    def run(self, task: Task) -> Result:
        """Does a task on the calling thread."""
        return self._context_variables.run(self._run, task)

    def _run(self, task: Task) -> Result:
        if self._ended:
            return Result(self.number, ended=True)
        try:
            with self._config.context(), self._config.meter.working():
                return self._load(task)
        except BaseException as error:  # noqa: BLE001
            # The loop's thread raises it. (Its traceback owns this frame: no variable may hold it.)
            return Result(self.number, error=error, snapshot=self.snapshot())

    def _load(self, task: Task) -> Result:
        config = self._config
        position = LoadPosition(config.base_seed, task.number, self._abandoned, task.rows)
        if self._failure is not None:
            raise self._failure
        if not self._is_set_up:
            self._set_up()
        with thread_shows(info=self._info), self._streams.active():
            if self._fetcher is None:
                samples = len(task.index) if config.iterable and config.auto_collation else 1
                self._fetcher = self._start_fetcher(samples)
            try:
                loaded = self._fetcher.fetch(task.index, position)
            except StopIteration:
                if not config.iterable:
                    raise
                self._ended = True
                return Result(self.number, ended=True, snapshot=self.snapshot())
            finally:
                self._tasks_done += 1
            return Result(self.number, config.transfer.start(loaded), snapshot=self.snapshot())

    def snapshot(self) -> WorkerSnapshot | None:
        """The worker's state between two tasks; None before its first."""
        if not self._is_set_up:
            return None
        fetcher = None if self._fetcher is None else self._fetcher.fetcher
        states = self._current_stream_states()
        return WorkerSnapshot.take(states, fetcher, self._tasks_done, self._streams_at_begin)

    def _current_stream_states(self) -> dict[str, Any]:
        """Reads Python's and numpy's streams only if the dataset can have drawn from them."""
        rng = self._info.rng
        self._info_was_read |= asked_for_info()
        if self._info_was_read or self._stream_states is None:
            self._stream_states = random_states(rng)
            return self._stream_states
        return {**self._stream_states, "torch": rng.torch_generator.get_state()}

    def _set_up(self) -> None:
        config, seed = self._config, self._config.base_seed + self.number
        # What a worker process's default generators would give.
        self._streams = RandomSource(lambda: seed)
        generators = (
            random.Random(seed),
            self._streams.generator(torch.device("cpu")),
            np.random.RandomState(_compat.numpy_seed(config.base_seed, self.number)),
        )
        self._info = _compat.worker_info(
            self.number, config.workers, seed, self._dataset, generators
        )
        self._is_set_up = True
        if isinstance(self._dataset, DATA_PIPES):
            seed_pipe(self._dataset, config.shared_seed)
            shard_pipe(self._dataset, config.workers, self.number)
        if self._init_fn is None:
            return
        with thread_shows(info=self._info), self._streams.active():
            try:
                before = dict(getattr(config.dataset, "__dict__", {}))
                self._init_fn(self.number)
                self._refuse_writes(before)
            except BaseException as error:
                error.add_note(f"in worker_init_fn of logical worker {self.number}")
                self._failure = error
                raise

    def _refuse_writes(self, before: dict[str, Any]) -> None:
        """Raises if worker_init_fn has set attributes of the dataset that all workers know."""
        original = self._config.dataset
        now = getattr(original, "__dict__", {})
        names = [n for n in {**before, **now} if now.get(n) is not before.get(n)]
        if names and original is not self._dataset:
            raise RuntimeError(
                f"worker_init_fn sets {names} on the {type(original).__name__} that the loader was "
                "given, of which each worker has a copy: set it on get_worker_info().dataset"
            )

    def _start_fetcher(self, samples: int) -> Fetcher:
        """A fetcher at the beginning of the epoch, or where the restored worker was."""
        make: Callable[[Any], Fetcher] = self._make_fetcher
        restored, info, iterable = self._restored, self._info, self._config.iterable
        if restored is None:
            if iterable:
                self._streams_at_begin = random_states(info.rng)
            return make(info.dataset)
        self._restored, self._tasks_done = None, restored.fetched
        self._streams_at_begin = restored.begin or (restored.streams if iterable else None)
        fetcher: Fetcher = restored.restore(info.dataset, make, samples, info.rng)
        restored.restore_streams(info.rng)
        self._stream_states = None
        return fetcher
