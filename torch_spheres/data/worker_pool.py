"""`WorkerPool`: the logical workers of an iterator, in threads of this process.

A worker is a thread with a queue of tasks, which are done one after another: with its own random
streams, `get_worker_info`, context variables, thread-local variables and copy of the dataset. So
what a dataset opens for itself belongs to one thread, and samples that wait (for a disk, for a
server, for each other) block no other worker: *n* workers load *n* batches at a time, whatever the
spheres do.
"""

from __future__ import annotations

import atexit
import math
import os
import threading
import time
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import TypeVar

from torch_spheres.data.logical_worker import LogicalWorker, Result, Task, WorkerConfig
from torch_spheres.data.resume import WorkerSnapshot
from torch_spheres.errors import StoppedError
from torch_spheres.runtime.pool import SpherePool
from torch_spheres.runtime.thread_hooks import take_one_intra_op_thread
from torch_spheres.runtime.trace_hooks import phase_since

__all__ = ["WorkerPool", "WorkerThread"]

T = TypeVar("T")
_CHECK_INTERVAL = 0.5  # seconds between two checks of whether the pool and its threads still run
_EXIT_TIMEOUT = 5.0  # seconds, at the end of the program, for samples that are being loaded


class WorkerThread(threading.Thread):
    """A logical worker's thread.

    Attributes:
        pid: of this process, for users of torch's iterator, which has processes here.
        worker: does the tasks.
        tasks: to be done; None ends the thread.
        unfinished: tasks that were given to it and are not done.
    """

    def __init__(self, pool: WorkerPool, worker: LogicalWorker) -> None:
        super().__init__(name=f"loader worker {worker.number}", daemon=True)
        self.pid = os.getpid()
        self.worker = worker
        self.tasks: SimpleQueue[Task | None] = SimpleQueue()
        self.unfinished = 0
        self._pool = pool

    @property
    def exitcode(self) -> int | None:
        """0 once the thread has ended, as of a process; None before."""
        return None if self.is_alive() else 0

    def terminate(self) -> None:
        """Ends the thread after the tasks that it has: one cannot be stopped in the middle."""
        self.tasks.put(None)

    def run(self) -> None:
        """Does tasks until there will be none."""
        take_one_intra_op_thread()
        while (task := self.tasks.get()) is not None:
            self._pool.do(self, task)


class WorkerPool:
    """The workers of one iterator, with persistent workers for all epochs of it.

    Nothing here refers to the iterator, which closes the pool when it is dropped. Workers go on
    from the snapshots in `restored`, and end when the spheres stop.

    Raises:
        StoppedError: the spheres were stopped.
        RuntimeError: the system has no more threads to give.
    """

    def __init__(
        self, config: WorkerConfig, spheres: SpherePool, restored: dict[int, WorkerSnapshot]
    ) -> None:
        spheres._ensure_started("a wrapped loader")
        self._spheres = spheres
        self._changed = threading.Condition()
        self._results: dict[int, Result] = {}
        self._closed = self._stopped = False
        self._abandoned = threading.Event()  # tells tasks under way that nobody waits for them
        workers = [
            LogicalWorker(config, number, restored.get(number), self._abandoned)
            for number in range(config.workers)
        ]
        self.threads = [WorkerThread(self, worker) for worker in workers]
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
    def ended(self) -> bool:
        """Whether there will be no more results: `close` was called, or the spheres stopped."""
        return self._closed or self._stopped

    def put(self, worker: int, task: Task) -> None:
        """Adds a task to a worker's queue."""
        thread = self.threads[worker]
        with self._changed:
            thread.unfinished += 1
            thread.tasks.put(task)

    def result(self, number: int | None, timeout: float) -> tuple[int, Result]:
        """Waits for the result of a task (None: of any), and returns it with the task's number.

        The pool keeps the result until `drop`, so that an interrupted caller can ask again.

        Raises:
            TimeoutError: there was none within `timeout` seconds (0: no limit).
            StoppedError: the spheres were stopped.
            RuntimeError: a worker was terminated with tasks in its queue.
        """

        def find() -> tuple[int, Result] | None:
            found = min(self._results, default=-1) if number is None else number
            return (found, self._results[found]) if found in self._results else None

        return self._wait_for(find, timeout)

    def drop(self, number: int) -> None:
        """Drops the result of a task, if there is one."""
        with self._changed:
            self._results.pop(number, None)

    @property
    def ready(self) -> int:
        """The number of results that were not dropped."""
        return len(self._results)

    def begin_epoch(self, shared_seed: int | None) -> dict[int, WorkerSnapshot]:
        """Waits for tasks under way, drops their results, and has the workers begin anew.

        `shared_seed` is for DataPipes. Returns a snapshot of each worker that has done a task.

        Raises:
            StoppedError: the spheres were stopped.
        """

        def begun() -> dict[int, WorkerSnapshot] | None:
            if any(thread.unfinished for thread in self.threads):
                return None
            self._results.clear()
            for thread in self.threads:
                thread.worker.begin_epoch(shared_seed)
            now = {t.worker.number: t.worker.snapshot() for t in self.threads}
            return {number: snapshot for number, snapshot in now.items() if snapshot is not None}

        return self._wait_for(begun, 0)

    def _wait_for(self, find: Callable[[], T | None], timeout: float) -> T:
        """Calls `find` under the lock until it returns something."""
        end = time.monotonic() + timeout if timeout > 0 else math.inf
        if self._spheres._forked:
            # Raises, before the lock is taken: a thread of the parent may have held it.
            self._spheres._ensure_started("a wrapped loader")
        with self._changed:
            while (value := find()) is None:
                left = min(_CHECK_INTERVAL, end - time.monotonic())
                if left <= 0:
                    raise TimeoutError
                if self.ended:
                    raise StoppedError(
                        "the spheres were stopped under a loader; stop them after the loop, or "
                        "start() them and begin another one"
                    )
                ended = [t.name for t in self.threads if t.unfinished and not t.is_alive()]
                if ended:  # by `terminate`
                    raise RuntimeError(
                        f"{', '.join(ended)} exited unexpectedly, with batches to load; begin "
                        "another iterator (with persistent_workers: of a loader wrapped anew)"
                    )
                self._changed.wait(left)
        return value

    def close(self) -> None:
        """Drops all results and waiting tasks; the results of running tasks will be dropped."""
        if self._spheres._forked:
            return
        with self._changed:
            self._closed = True
            self._results.clear()
        self._end_threads()

    def stop(self) -> None:
        """Ends the workers when the spheres stop; what has been loaded stays."""
        with self._changed:
            self._stopped = True
        self._end_threads()

    def _end_threads(self) -> None:
        self._abandoned.set()
        for thread in self.threads:
            thread.tasks.put(None)
        with self._changed:
            self._changed.notify_all()

    # ---- the workers' side ----

    def do(self, thread: WorkerThread, task: Task) -> None:
        """Does a worker's task on its thread, unless nobody waits for it."""
        began = time.monotonic_ns()
        result = None if self.ended else thread.worker.run(task)
        if result is not None and not result.ended:  # else there is no batch
            phase_since(self._spheres, "load", task.number, began)
        with self._changed:
            thread.unfinished -= 1
            if result is not None and not self._closed:
                self._results[task.number] = result
            del result
            self._changed.notify_all()


_live: weakref.WeakSet[WorkerPool] = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    """Ends all workers before the interpreter ends: a thread that came back to it would abort.

    A thread that takes longer than `_EXIT_TIMEOUT` is left alone.
    """
    pools = [pool for pool in list(_live) if not pool._spheres._forked]
    for pool in pools:
        pool.close()
    end = time.monotonic() + _EXIT_TIMEOUT
    for pool in pools:
        for thread in pool.threads:
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join(max(0.0, end - time.monotonic()))
