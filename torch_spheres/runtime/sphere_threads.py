"""The threads of a pool: their tree, starting and stopping them, and what other packages ask of it.

`SpherePool` (pool.py) adds the methods by which users give work to the threads. The other packages
of this project use the methods of `SphereThreads` that begin with an underscore.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import time
import warnings
import weakref
from collections.abc import Iterator
from typing import Any, Self

from torch_spheres import _core
from torch_spheres._core import Topology
from torch_spheres.runtime import mkl_warmup, thread_hooks
from torch_spheres.runtime.arguments import as_index, as_timeout
from torch_spheres.runtime.cpu_count import usable_cores
from torch_spheres.runtime.malloc import keep_freed_memory
from torch_spheres.runtime.sample_counter import SampleCounter
from torch_spheres.runtime.step_counter import StepCounter

__all__ = ["SphereThreads"]

thread_hooks.install()
mkl_warmup.choose_kernels()


class SphereThreads:
    """One thread for each sphere of a tree. Arguments and errors are those of `KissingSpheres`."""

    def __init__(self, levels: int = 2, *, concurrency: int | None = None) -> None:
        cores = usable_cores()
        levels = as_index("levels", levels, 1, _core.MAX_LEVELS)
        concurrency = as_index("concurrency", cores if concurrency is None else concurrency, 1)
        self._topology = Topology(levels)
        # Other packages only hand it on to C++ objects, such as `_core.SumJob`.
        self._core = _core.System(levels, min(concurrency, self._topology.leaves))
        self._cores = cores
        self._samples = SampleCounter()
        self._steps = StepCounter()
        # The trace that is being recorded, whose name_thread() each thread calls.
        self._recorder: Any = None
        self._loader_workers: weakref.WeakSet[Any] = weakref.WeakSet()  # each has a stop()
        # A barrier, and shards that wait for each other, each need every leaf: one at a time.
        self._all_leaves = threading.Lock()
        # time.monotonic_ns() and time.process_time_ns() of the first start().
        self._first_start: tuple[int, int] | None = None
        _live.add(self)

    # ---- the tree ----

    @property
    def levels(self) -> int:
        """Levels of the tree, the root's included: 1 to 4."""
        return self._topology.levels

    @property
    def spheres_per_level(self) -> tuple[int, ...]:
        """Spheres of each level, from the root on: ``(1, 12, 144, 1728)[:levels]``."""
        return tuple(Topology.count(level) for level in range(self.levels))

    @property
    def total_spheres(self) -> int:
        """Spheres of all levels, the root included: 1, 13, 157 or 1885."""
        return self._topology.total

    @property
    def leaves(self) -> int:
        """Spheres that run work: 1, 12, 144 or 1728."""
        return self._topology.leaves

    @property
    def concurrency(self) -> int:
        """Leaves that run at once."""
        return self._core.concurrency

    @property
    def topology(self) -> Topology:
        """Arithmetic on sphere ids: parent, child, level, group, path, edges, leaf of an item."""
        return self._topology

    # ---- starting and stopping ----

    @property
    def running(self) -> bool:
        """Whether the threads run, in this process."""
        return self._core.running()

    def start(self) -> Self:
        """Starts one thread per sphere; does nothing when they run already.

        Raises:
            RuntimeError: the operating system refuses a thread (none is left running), or the
                spheres belong to the process that this one was forked from.
        """
        # Before the threads start: a thread that has a heap of its own keeps that heap.
        keep_freed_memory(self.levels)
        self._first_start = self._first_start or (time.monotonic_ns(), time.process_time_ns())
        self._core.start()
        return self

    def stop(self, timeout: float | None = None) -> None:
        """Stops the spheres: items that run finish, items that have not begun are not run.

        Waiting calls in other threads raise `StoppedError`. A RuntimeWarning reports items that
        were not run, and an item's exception, if no call has raised or will raise them; call `wait`
        first to have items run and exceptions raised. Does nothing to spheres that do not run;
        `start` starts them again.

        Args:
            timeout: seconds to wait for running items; None waits for ever (Ctrl-C is answered).

        Raises:
            TypeError: `timeout` is not a number.
            ValueError: `timeout` is negative.
            TimeoutError: items were still running. They go on; call `stop` again.
            RuntimeError: called from inside a work item, or in a forked child.
        """
        self._core.require_outside("stop()")
        self._stop_loader_workers()
        lost, error = self._core.stop(as_timeout(timeout))
        if lost:
            warnings.warn(
                f"stop(): {lost} work items had not begun and were not run; "
                "call wait() before stop() to have them run",
                RuntimeWarning,
                stacklevel=2,
            )
        if error is not None:
            warnings.warn(
                f"stop(): a work item had raised {error!r}, and nobody waited for it; "
                "call wait() before stop() to have it raised",
                RuntimeWarning,
                stacklevel=2,
            )
        self._steps.warn_if_silent()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None and self._core.running():
                self._core.wait(None)
        finally:
            # No warning of items that are dropped: the block's exception says more.
            self._stop_loader_workers()
            self._core.stop(None)
        if kind is None:
            self._steps.warn_if_silent()

    def __repr__(self) -> str:
        state = "running" if self.running else "stopped" if self._starts else "not started"
        return (
            f"{type(self).__name__}(levels={self.levels}, concurrency={self.concurrency}): "
            f"{self.total_spheres} spheres, {self.leaves} leaves, {state}"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError(
            f"{type(self).__name__} cannot be pickled or copied: threads belong to one process; "
            "make a new one in the other process"
        )

    # ---- for the other packages of this project ----

    @property
    def _starts(self) -> int:
        """How often the spheres were started."""
        return self._core.starts

    @property
    def _forked(self) -> bool:
        """Whether this is a forked child's copy, which has no threads."""
        return self._core.forked()

    def _ensure_started(self, what: str) -> None:
        """Starts spheres that were never started; raises if `what` needs spheres that run."""
        if not self._starts and not self._forked:
            self.start()
        self._core.require_running(what)

    def _on_own_thread(self) -> bool:
        """Whether the calling thread is one of these spheres'."""
        return self._core.on_own_thread()

    def _pause_item(self) -> None:
        """Sleeps in a work item, while another leaf runs, until `_resume_item` or for no reason."""
        self._core.pause()

    def _resume_item(self, leaf: int) -> None:
        """Ends the pause of the item that a leaf runs, or that item's next pause."""
        self._core.call_back(leaf)

    def _read_subtrees(self) -> tuple[int, list[tuple[Any, ...]]]:
        """Nanoseconds since `start`; figures of the root, then of each kissing sphere's subtree.

        The figures: sphere id, spheres in each state, items, stolen items, queued items, busy
        nanoseconds.
        """
        elapsed, subtrees = self._core.subtrees()
        return elapsed, subtrees

    @contextlib.contextmanager
    def _claim_all_leaves(self, what: str, timeout: float | None) -> Iterator[float | None]:
        """Context in which no other barrier or model's shards wait for leaves; gives time left."""
        self._core.require_outside(what)
        begin = time.monotonic()
        longest = -1 if timeout is None else min(timeout, threading.TIMEOUT_MAX)
        if not self._all_leaves.acquire(timeout=longest):
            raise TimeoutError(
                f"{what}: another barrier, or a model's shards, were still waiting for each other "
                f"after {timeout} s"
            )
        try:
            yield None if timeout is None else max(0.0, timeout - (time.monotonic() - begin))
        finally:
            self._all_leaves.release()

    def _stop_loader_workers(self) -> None:
        if not self._forked:
            for workers in list(self._loader_workers):
                workers.stop()


_live: weakref.WeakSet[SphereThreads] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    # Threads that still ran when the interpreter is torn down could not take the GIL any more.
    for spheres in list(_live):
        if spheres.running:
            spheres._core.stop(None)
    _core.join_dropped()


def _renew_stopped() -> None:
    # In a forked child: a thread of the parent may have held a lock of spheres that do not run.
    for spheres in list(_live):
        old = spheres._core
        if not old.forked():
            spheres._core = _core.System(spheres.levels, spheres.concurrency, old.starts)


os.register_at_fork(after_in_child=_renew_stopped)
