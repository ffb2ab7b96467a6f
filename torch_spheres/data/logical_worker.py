"""A logical worker: what a worker process is to a `DataLoader`, without a process."""

from __future__ import annotations

import contextvars
import copy
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from torch_spheres import _compat
from torch_spheres.data.data_pipes import DATA_PIPES, copy_pipe, seed_pipe, shard_pipe
from torch_spheres.data.dataset_copy import shallow_copy, shared_memory_in
from torch_spheres.data.device_transfer import Delivery, Transfer
from torch_spheres.data.fetch import Fetcher
from torch_spheres.data.loader_stats import Meter
from torch_spheres.data.resume import Snapshot, has_position
from torch_spheres.data.worker_info import Position, asked_for_info, shown
from torch_spheres.runtime.caller_context import CallerContext
from torch_spheres.runtime.rebinding import rebound
from torch_spheres.runtime.rng import RandomSource, random_states

__all__ = ["Plan", "Result", "Task", "Worker"]

Task = tuple[Any, Sequence[int] | None]  # what the sampler gave, and its places in the batch


@dataclass(frozen=True)
class Plan:
    """What all workers of a loader have in common."""

    dataset: Any
    iterable: bool
    auto_collation: bool
    make_fetcher: Callable[[Any], Fetcher]
    init_fn: Callable[[int], Any] | None
    workers: int
    base_seed: int
    shared_seed: int | None  # of all workers' DataPipes
    copies: bool
    context: CallerContext
    sender: Transfer
    meter: Meter


def _dataset_for_worker(plan: Plan) -> tuple[Any, dict[int, Any]]:
    """A copy for one worker, as a process has one: what it sets on its dataset is its own.

    The copy is shallow, and shares what the attributes hold; but for datasets inside of it, which
    are copied in the same way. One that saves its position is copied as a whole. With it, all
    copies by the original's id.
    """
    copies: dict[int, Any] = {}
    if isinstance(plan.dataset, DATA_PIPES):
        return copy_pipe(plan.dataset), copies
    if plan.copies or (plan.iterable and plan.workers > 1 and has_position(plan.dataset)):
        try:
            made = copy.deepcopy(plan.dataset, shared_memory_in(plan.dataset))
        except Exception as error:
            error.add_note(
                f"wrap() copies {type(plan.dataset).__name__} for each logical worker, which was "
                "asked for with copy_dataset=True, or saves its position (state_dict)"
            )
            raise
        copies[id(plan.dataset)] = made
        return made, copies
    return shallow_copy(plan.dataset, copies), copies


@dataclass
class Result:
    """Of one task."""

    worker: int
    deliver: Delivery | None = None
    error: BaseException | None = None
    ended: bool = False  # the worker's iterable dataset
    snapshot: Snapshot | None = None  # of the worker, after the task


class Worker:
    """One logical worker; its tasks come one at a time, so nothing in it needs a lock."""

    def __init__(
        self, plan: Plan, number: int, restored: Snapshot | None, over: threading.Event
    ) -> None:
        self._plan, self.number, self._over = plan, number, over
        self._restored = restored
        # Now, as a process would have it, not when the first task comes.
        self._dataset, copies = _dataset_for_worker(plan)
        # (A method of the dataset is one of the worker's copy, as it is in a process.)
        self._init_fn = rebound(plan.init_fn, copies)
        self._make_fetcher = rebound(plan.make_fetcher, copies)
        # (Variables that one task sets are there for the next, as in a process.)
        self._variables = contextvars.copy_context()
        self._ready = False
        self._fetcher: Fetcher | None = None
        self._failure: BaseException | None = None
        self.fetched = 0  # tasks, of this epoch
        self.ended = False
        self._began_at: dict[str, Any] | None = None  # of an iterable dataset's epoch
        self._asked = False  # for its info, which has its random streams
        self._known_states: dict[str, Any] | None = None  # of these

    def begin_epoch(self, shared_seed: int | None) -> None:
        """The next task makes a new iterator of the dataset, as persistent workers do."""
        if isinstance(self._dataset, DATA_PIPES):
            seed_pipe(self._dataset, shared_seed)
        self._fetcher = self._began_at = None
        self.fetched = 0
        self.ended = False
        if self._restored is not None:
            self._restored = self._restored.streams_only()

    def run(self, task: Task, batch: int) -> Result:
        """Does a task on the calling thread."""
        return self._variables.run(self._run, task, batch)

    def _run(self, task: Task, batch: int) -> Result:
        if self.ended:
            return Result(self.number, ended=True)
        try:
            with self._plan.context(), self._plan.meter.working():
                return self._load(*task, batch)
        except BaseException as error:  # noqa: BLE001
            # To the thread that asks for the batch. (In no variable of this frame, which the
            # error's traceback owns.)
            return Result(self.number, error=error, snapshot=self.snapshot())

    def _load(self, index: Any, places: Sequence[int] | None, batch: int) -> Result:
        plan = self._plan
        position = Position(plan.base_seed, batch, self._over, places)
        if self._failure is not None:
            raise self._failure
        if not self._ready:
            self._prepare()
        with shown(info=self._info), self._streams.active():
            if self._fetcher is None:
                samples = len(index) if plan.iterable and plan.auto_collation else 1
                self._fetcher = self._begin(samples)
            try:
                loaded = self._fetcher.fetch(index, position)
            except StopIteration:
                if not plan.iterable:
                    raise
                self.ended = True
                return Result(self.number, ended=True, snapshot=self.snapshot())
            finally:
                self.fetched += 1
            return Result(self.number, plan.sender.send(loaded), snapshot=self.snapshot())

    def snapshot(self) -> Snapshot | None:
        """Where it is, between two tasks; None if it has not begun."""
        if not self._ready:
            return None
        inner = None if self._fetcher is None else self._fetcher.fetcher
        return Snapshot.of(self._states(), inner, self.fetched, self._began_at)

    def _states(self) -> dict[str, Any]:
        """Of its random streams; two of the three only if somebody can have drawn from them."""
        rng = self._info.rng
        self._asked |= asked_for_info()
        if self._asked or self._known_states is None:
            self._known_states = random_states(rng)
            return self._known_states
        return {**self._known_states, "torch": rng.torch_generator.get_state()}

    def _prepare(self) -> None:
        plan, seed = self._plan, self._plan.base_seed + self.number
        # What a process worker's default generators would give.
        self._streams = RandomSource(lambda: seed)
        generators = (
            random.Random(seed),
            self._streams.generator(torch.device("cpu")),
            np.random.RandomState(_compat.numpy_seed(plan.base_seed, self.number)),
        )
        self._info = _compat.worker_info(self.number, plan.workers, seed, self._dataset, generators)
        self._ready = True
        if isinstance(self._dataset, DATA_PIPES):
            seed_pipe(self._dataset, plan.shared_seed)
            shard_pipe(self._dataset, plan.workers, self.number)
        if self._init_fn is None:
            return
        with shown(info=self._info), self._streams.active():
            try:
                before = dict(getattr(plan.dataset, "__dict__", {}))
                self._init_fn(self.number)
                self._refuse_writes(before)
            except BaseException as error:
                error.add_note(f"in worker_init_fn of logical worker {self.number}")
                self._failure = error
                raise

    def _refuse_writes(self, before: dict[str, Any]) -> None:
        """Raises if worker_init_fn has set attributes of the dataset that all workers know."""
        original = self._plan.dataset
        now = getattr(original, "__dict__", {})
        names = [n for n in {**before, **now} if now.get(n) is not before.get(n)]
        if names and original is not self._dataset:
            raise RuntimeError(
                f"worker_init_fn sets {names} on the {type(original).__name__} that the loader was "
                "given, of which each worker has a copy: set it on get_worker_info().dataset"
            )

    def _begin(self, samples: int) -> Fetcher:
        make: Callable[[Any], Fetcher] = self._make_fetcher
        restored, dataset = self._restored, self._info.dataset
        if restored is None:
            if self._plan.iterable:
                self._began_at = random_states(self._info.rng)
            return make(dataset)
        self._restored, self.fetched = None, restored.fetched
        self._began_at = restored.begin or (restored.streams if self._plan.iterable else None)
        fetcher: Fetcher = restored.restore(dataset, make, samples, self._info.rng)
        restored.restore_streams(self._info.rng)
        self._known_states = None
        return fetcher
