"""Logical workers: what worker processes are to a `DataLoader`, on the spheres' threads.

A worker is a queue of tasks that are done one after another, in its own random streams, with its
own `get_worker_info`, context variables and (on request) copy of the dataset. Which thread does a
task is up to the spheres: each task is a work item of theirs, so that a loader shares them with
whatever else they do.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from torch_spheres._core import Work
from torch_spheres.context import unset
from torch_spheres.errors import StoppedError
from torch_spheres.loading.progress import Snapshot
from torch_spheres.loading.worker import Plan, Result, Task, Worker
from torch_spheres.phases import phase_since
from torch_spheres.system import KissingSpheres

__all__ = ["Team"]

T = TypeVar("T")


@dataclass
class _Queue:
    """A worker's tasks. Whoever makes `busy` true does the first of them, and nobody else any."""

    worker: Worker
    tasks: deque[tuple[int, Task]] = field(default_factory=deque)
    busy: bool = False
    scheduled: bool = False  # a work item is on its way to do one
    work: Work | None = None  # that item

    @property
    def lost(self) -> bool:
        """Whether the spheres were stopped before they came to it."""
        return self.scheduled and self.work is not None and self.work.cancelled > 0


class Team:
    """The workers of one iterator, or of all of a loader with persistent workers.

    Nothing of it refers to the iterator, which closes it when it is dropped.
    """

    def __init__(self, plan: Plan, spheres: KissingSpheres, restored: dict[int, Snapshot]) -> None:
        self._spheres = spheres
        self._changed = threading.Condition()
        self._results: dict[int, Result] = {}
        self._closed = self._stopped = False
        self._over = threading.Event()  # for tasks under way: nobody waits for them
        self._queues = [
            _Queue(Worker(plan, w, restored.get(w), self._over)) for w in range(plan.workers)
        ]

    # ---- the consumer's side ----

    @property
    def over(self) -> bool:
        """Whether there will be no more results: it was closed, or the spheres were stopped."""
        return self._closed or self._stopped or any(queue.lost for queue in self._queues)

    def put(self, worker: int, task: int, what: Task) -> None:
        """Adds a task to a worker's queue."""
        queue = self._queues[worker]
        with self._changed:
            queue.tasks.append((task, what))
        self._schedule(queue)

    def result(self, task: int | None, timeout: float) -> tuple[int, Result]:
        """The result of a task, or the first that there is (None); waits for it.

        It stays here until it is dropped, so that an interrupted caller can come again.

        Raises:
            TimeoutError: there was none within `timeout` seconds (0: for ever).
            StoppedError: the spheres were stopped.
        """

        def found() -> tuple[int, Result] | None:
            number = min(self._results, default=None) if task is None else task
            if number is None or number not in self._results:
                return None
            return number, self._results[number]

        return self._wait_for(found, timeout)

    def drop(self, task: int) -> None:
        """A result that nobody will ask for again."""
        with self._changed:
            self._results.pop(task, None)

    @property
    def ready(self) -> int:
        """Results that nobody has dropped."""
        return len(self._results)

    def begin_epoch(self) -> dict[int, Snapshot]:
        """Waits for what is under way, drops it, and has the workers begin anew.

        Returns:
            Where they are now.

        Raises:
            StoppedError: the spheres were stopped.
        """

        def begun() -> dict[int, Snapshot] | None:
            if any(queue.busy or queue.tasks for queue in self._queues):
                return None
            self._results.clear()
            for queue in self._queues:
                queue.worker.begin_epoch()
            now = {queue.worker.number: queue.worker.snapshot() for queue in self._queues}
            return {number: snapshot for number, snapshot in now.items() if snapshot is not None}

        return self._wait_for(begun, 0)

    def _help(self) -> None:
        """Does a task that nobody is at, if there is one, on a thread that has to wait.

        On a sphere's own thread the workers may wait for that very thread.
        """
        with self._changed:
            waiting = [queue for queue in self._queues if queue.tasks and not queue.busy]
            if not waiting:
                return
            queue = min(waiting, key=lambda queue: queue.tasks[0][0])
        with unset():  # what this thread has set is for what it waits in the middle of
            again = self._do_task(queue)
        if again:
            self._schedule(queue, promised=True)

    def _wait_for(self, found: Callable[[], T | None], timeout: float) -> T:
        """What `found` returns under the lock, once it is not None."""
        end = time.monotonic() + timeout if timeout > 0 else None
        core = self._spheres._core
        if core.forked():  # before the lock is taken, which a thread of the parent may have held
            core.require_running("a wrapped loader")
        helps = core.on_own_thread()
        while True:
            self._reschedule()
            with self._changed:
                value = found()
                if value is not None:
                    return value
                if not helps or not any(q.tasks and not q.busy for q in self._queues):
                    left = _LOOK if end is None else min(_LOOK, end - time.monotonic())
                    if left <= 0:
                        raise TimeoutError
                    self._check_running()
                    self._changed.wait(left)
                    continue
            self._help()

    def _reschedule(self) -> None:
        """Tasks that no work item will come for: whoever was to hand it in was interrupted."""
        with self._changed:
            idle = [q for q in self._queues if q.tasks and not q.busy and not q.scheduled]
        for queue in idle:
            self._schedule(queue)

    def close(self) -> None:
        """Drops what has not begun; tasks that run finish and leave nothing."""
        if self._spheres._core.forked():
            return
        with self._changed:
            self._closed = True
            self._over.set()
            for queue in self._queues:
                queue.tasks.clear()
            self._results.clear()
            self._changed.notify_all()

    def _check_running(self) -> None:
        if self.over:
            raise StoppedError(
                "the spheres were stopped under a loader; stop them after the loop, or start() "
                "them and begin another one"
            )

    # ---- the spheres' side ----

    def _schedule(self, queue: _Queue, *, promised: bool = False, goes_on: bool = False) -> bool:
        """One task per work item: shards of a model that wait for a sphere get their turn.

        Args:
            queue: whose first task is to be done; by nobody new if somebody is at it already.
            promised: `scheduled` was set for the very work item that this hands in.
            goes_on: the caller does the task itself if this is False; until then the promise
                stands, or another thread would wait for room to hand the task in.

        False: the spheres take no more batches of work from one of their own threads.
        """
        try:
            # In here: Ctrl-C must not leave it set with no work item on its way.
            with self._changed:
                if not promised and (queue.scheduled or queue.busy or not queue.tasks):
                    return True
                promised = queue.scheduled = True
            self._spheres._ensure_started("a wrapped loader")
            # (What is collected is none of those who wait for all work that was distributed.)
            queue.work = self._spheres._core.submit(self._do_one, (queue,), collect=True)
        except StoppedError:
            with self._changed:
                self._stopped = True
                self._changed.notify_all()
        except BaseException as error:
            refused = isinstance(error, RuntimeError) and self._spheres._core.on_own_thread()
            # Ctrl-C too: whoever waits for the task next schedules it again.
            if promised and not (refused and goes_on):
                with self._changed:
                    queue.scheduled = False
            if refused:
                return False
            raise
        return True

    def _do_one(self, queue: _Queue) -> None:
        while self._do_task(queue, promised=True):
            if self._schedule(queue, promised=True, goes_on=True):
                return

    def _do_task(self, queue: _Queue, *, promised: bool = False) -> bool:
        """Does a worker's first task, if nobody else is at it; whether to schedule the next.

        `promised`: `scheduled` was set for this very call.
        """
        with self._changed:
            if promised:  # with the task in hand: a moment later others would schedule it again
                queue.scheduled = False
            if self._closed or queue.busy or not queue.tasks:
                return False
            queue.busy = True
            task, what = queue.tasks.popleft()
        began = time.monotonic_ns()
        result = queue.worker.run(what, task)
        if not result.ended:  # else there is no such batch
            phase_since(self._spheres, "load", task, began)
        with self._changed:
            queue.busy = False
            if not self._closed:
                self._results[task] = result
            del result
            again = bool(queue.tasks) and not queue.scheduled
            queue.scheduled |= again
            self._changed.notify_all()
        return again


_LOOK = 0.5  # seconds between two looks at whether the spheres still run
