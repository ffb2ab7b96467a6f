"""Logical workers: what worker processes are to a `DataLoader`, in threads of this one.

A worker is a thread with a queue of tasks, which are done one after another: with its own random
streams, `get_worker_info`, context variables, thread-local variables and copy of the dataset. So
what a dataset opens for itself belongs to one thread, and samples that wait (for a disk, for a
server, for each other) keep nobody from running: *n* workers have *n* batches in the making,
whatever the spheres are at.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import TypeVar

from torch_spheres.data.logical_worker import Plan, Result, Task, Worker
from torch_spheres.data.resume import Snapshot
from torch_spheres.errors import StoppedError
from torch_spheres.runtime.pool import SpherePool
from torch_spheres.runtime.thread_hooks import take_one_intra_op_thread
from torch_spheres.runtime.trace_hooks import phase_since

__all__ = ["Team", "WorkerThread"]

T = TypeVar("T")
_LOOK = 0.5  # seconds between two looks at whether the spheres still run
_PATIENCE = 5.0  # seconds, at the end of the program, for samples that are being loaded


class WorkerThread(threading.Thread):
    """A logical worker's thread.

    Attributes:
        pid: of the process that it is in, where users of worker processes look for one.
        tasks: with their numbers; None ends it.
        left: tasks that were given to it and are not done.
    """

    def __init__(self, team: Team, worker: Worker) -> None:
        super().__init__(name=f"loader worker {worker.number}", daemon=True)
        self.pid = os.getpid()
        self.worker = worker
        self.tasks: SimpleQueue[tuple[int, Task] | None] = SimpleQueue()
        self.left = 0
        self._team = team

    @property
    def exitcode(self) -> int | None:
        """0 once it has ended, as of a process; None before."""
        return None if self.is_alive() else 0

    def terminate(self) -> None:
        """Has it end after the sample that it is at: a thread cannot be ended in the middle."""
        self.tasks.put(None)

    def run(self) -> None:
        """Does tasks until there will be none."""
        take_one_intra_op_thread()
        while (given := self.tasks.get()) is not None:
            self._team.do(self, *given)


class Team:
    """The workers of one iterator, or of all of a loader with persistent workers.

    Nothing of it refers to the iterator, which closes it when it is dropped.

    Raises:
        StoppedError: the spheres were stopped.
        RuntimeError: the system has no more threads to give.
    """

    def __init__(self, plan: Plan, spheres: SpherePool, restored: dict[int, Snapshot]) -> None:
        spheres._ensure_started("a wrapped loader")
        self._spheres = spheres
        self._changed = threading.Condition()
        self._results: dict[int, Result] = {}
        self._closed = self._stopped = False
        self._over = threading.Event()  # for tasks under way: nobody waits for them
        made = [Worker(plan, w, restored.get(w), self._over) for w in range(plan.workers)]
        self.threads = [WorkerThread(self, worker) for worker in made]
        _live.add(self)
        spheres._loader_workers.add(self)
        try:
            for thread in self.threads:
                thread.start()
        except BaseException:
            self.close()
            raise

    # ---- the consumer's side ----

    @property
    def over(self) -> bool:
        """Whether there will be no more results: it was closed, or the spheres were stopped."""
        return self._closed or self._stopped

    def put(self, worker: int, task: int, what: Task) -> None:
        """Adds a task to a worker's queue."""
        thread = self.threads[worker]
        with self._changed:
            thread.left += 1
            thread.tasks.put((task, what))

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

    def begin_epoch(self, shared_seed: int | None) -> dict[int, Snapshot]:
        """Waits for what is under way, drops it, and has the workers begin anew.

        Args:
            shared_seed: of DataPipes.

        Returns:
            Where they are now.

        Raises:
            StoppedError: the spheres were stopped.
        """

        def begun() -> dict[int, Snapshot] | None:
            if any(thread.left for thread in self.threads):
                return None
            self._results.clear()
            for thread in self.threads:
                thread.worker.begin_epoch(shared_seed)
            now = {t.worker.number: t.worker.snapshot() for t in self.threads}
            return {number: snapshot for number, snapshot in now.items() if snapshot is not None}

        return self._wait_for(begun, 0)

    def _wait_for(self, found: Callable[[], T | None], timeout: float) -> T:
        """What `found` returns under the lock, once it is not None."""
        end = time.monotonic() + timeout if timeout > 0 else None
        if (
            self._spheres._forked
        ):  # before the lock is taken, which a thread of the parent may have held
            self._spheres._ensure_started("a wrapped loader")
        with self._changed:
            while (value := found()) is None:
                left = _LOOK if end is None else min(_LOOK, end - time.monotonic())
                if left <= 0:
                    raise TimeoutError
                if self.over:
                    raise StoppedError(
                        "the spheres were stopped under a loader; stop them after the loop, or "
                        "start() them and begin another one"
                    )
                ended = [t.name for t in self.threads if t.left and not t.is_alive()]
                if ended:  # someone called `terminate`: what is in its queue is never done
                    raise RuntimeError(
                        f"{', '.join(ended)} exited unexpectedly, with batches to load; begin "
                        "another iterator (with persistent_workers: of a loader wrapped anew)"
                    )
                self._changed.wait(left)
        return value

    def close(self) -> None:
        """Drops what has not begun; tasks that run finish and leave nothing."""
        if self._spheres._forked:
            return
        with self._changed:
            self._closed = True
            self._results.clear()
        self._end()

    def stop(self) -> None:
        """The spheres are being stopped; what has been loaded stays."""
        with self._changed:
            self._stopped = True
        self._end()

    def _end(self) -> None:
        self._over.set()
        for thread in self.threads:
            thread.tasks.put(None)
        with self._changed:
            self._changed.notify_all()

    # ---- the workers' side ----

    def do(self, thread: WorkerThread, task: int, what: Task) -> None:
        """Does a worker's task on its thread, unless nobody waits for it."""
        began = time.monotonic_ns()
        result = None if self.over else thread.worker.run(what, task)
        if result is not None and not result.ended:  # else there is no such batch
            phase_since(self._spheres, "load", task, began)
        with self._changed:
            thread.left -= 1
            if result is not None and not self._closed:
                self._results[task] = result
            del result
            self._changed.notify_all()


_live: weakref.WeakSet[Team] = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    """Before the interpreter ends: a thread that comes back to it then, out of torch, would abort.

    One that waits for something for longer than a few seconds is left alone, as worker processes
    are ended after so many.
    """
    teams = [team for team in list(_live) if not team._spheres._forked]
    for team in teams:
        team.close()
    end = time.monotonic() + _PATIENCE
    for team in teams:
        for thread in team.threads:
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join(max(0.0, end - time.monotonic()))
