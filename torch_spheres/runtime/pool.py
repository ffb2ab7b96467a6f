"""`SpherePool`: the hierarchy of worker threads, and the work, barriers and messages given to it.

`KissingSpheres` (spheres.py) is this pool and what can be seen of it; the packages in between take
either, and know nothing of displays. Whoever has to hear of a pool's life registers with it.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

from torch_spheres import _core
from torch_spheres._core import NativeFunction, Topology, Work
from torch_spheres.runtime import mkl_warmup, thread_hooks
from torch_spheres.runtime.arguments import as_index, as_timeout, native_items, python_items
from torch_spheres.runtime.malloc import keep_freed_memory
from torch_spheres.runtime.sample_counter import SampleCounter

__all__ = ["SpherePool", "usable_cores"]

T = TypeVar("T")
R = TypeVar("R")

thread_hooks.install()
mkl_warmup.settle()


class Recorder(Protocol):
    """Records a trace of a pool; made by ``KissingSpheres.trace()``."""

    def name_thread(self) -> None:
        """Remembers what the calling thread is called."""


class StepLog(Protocol):
    """Counts the steps of optimizers that have a `GradientHook` on a pool."""

    def step(self) -> None:
        """Counts a step."""

    def warn_if_silent(self) -> None:
        """Is called when the pool stops; `stacklevel` 4 is who stops it."""


class Stoppable(Protocol):
    """Threads of its own that end when the pool stops."""

    def stop(self) -> None:
        """Ends them."""


def usable_cores() -> int:
    """Cores that this process may use: CPU affinity, and the cgroup's quota rounded up."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        cores = os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        # "max 100000" means no quota: int() says ValueError.
        cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(1, cores)


class SpherePool:
    """See `KissingSpheres`, which users make; its arguments and errors are these."""

    def __init__(self, levels: int = 2, *, concurrency: int | None = None) -> None:
        cores = usable_cores()
        levels = as_index("levels", levels, 1, _core.MAX_LEVELS)
        concurrency = as_index("concurrency", cores if concurrency is None else concurrency, 1)
        self._topology = Topology(levels)
        self._core = _core.System(levels, min(concurrency, self._topology.leaves))
        self._cores = cores
        self._samples = SampleCounter()
        # Held by who has items wait for each other, and by barriers: each needs all leaves to come.
        self._together = threading.Lock()
        # time.monotonic_ns() and time.process_time_ns() of the first start().
        self._began: tuple[int, int] | None = None
        self._recording: Recorder | None = None  # of the trace that is under way
        self._loading: weakref.WeakSet[Stoppable] = weakref.WeakSet()  # loaders' workers
        self._step_logs: list[StepLog] = []
        # Optimizers with a GradientHook whose step() has begun.
        self._stepping: weakref.WeakSet[Any] = weakref.WeakSet()
        _live.add(self)

    # ---- shape ----

    @property
    def levels(self) -> int:
        """Levels of the tree, the root's included."""
        return self._topology.levels

    @property
    def spheres_per_level(self) -> tuple[int, ...]:
        """``(1, 12, 144, 1728)[:levels]``."""
        return tuple(Topology.count(level) for level in range(self.levels))

    @property
    def total_spheres(self) -> int:
        """1, 13, 157 or 1885: the root is counted."""
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

    # ---- life ----

    @property
    def running(self) -> bool:
        """Whether the threads run, in this process."""
        return self._core.running()

    def start(self) -> Self:
        """Starts one thread per sphere; does nothing when they run already.

        Raises:
            RuntimeError: the system has no more threads to give (none is left running), or the
                spheres belong to the process that this one was forked from.
        """
        # Before its threads come: those that have a heap of their own keep it.
        keep_freed_memory(self.levels)
        self._began = self._began or (time.monotonic_ns(), time.process_time_ns())
        self._core.start()
        return self

    def stop(self, timeout: float | None = None) -> None:
        """Stops the spheres: items that run finish, items that have not begun are not run.

        Waiting calls in other threads raise `StoppedError`. Items that are lost in this way, and an
        item's exception, are reported as a RuntimeWarning if nobody was told and nobody waits; call
        `wait` first to have them run or raised. Spheres that do not run are left alone; `start`
        starts them again.

        Args:
            timeout: seconds to wait for running items; None waits for ever (Ctrl-C is answered).

        Raises:
            TimeoutError: items were still running. They go on; call `stop` again.
            RuntimeError: called from inside a work item, or in a forked child.
        """
        self._core.require_outside("stop()")
        self._end_loading()
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
        self._warn_of_silent_logs()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None and self._core.running():
                self._core.wait(None)
        finally:
            # With an exception under way the items that are dropped are not worth a warning.
            self._end_loading()
            self._core.stop(None)
        if kind is None:
            self._warn_of_silent_logs()

    def _end_loading(self) -> None:
        """Has the workers of loaders load no more."""
        if not self._forked:
            for workers in list(self._loading):
                workers.stop()

    # ---- for the other packages of this project ----

    @property
    def _starts(self) -> int:
        """How often the spheres were started."""
        return self._core.starts

    @property
    def _forked(self) -> bool:
        """Whether this is a forked child's copy, which has no threads."""
        return self._core.forked()

    def _count_step(self, optimizer: Any) -> None:
        """Counts a step of an optimizer for the logs; once, however many hooks it has."""
        if optimizer in self._stepping:
            self._stepping.discard(optimizer)
            for log in tuple(self._step_logs):
                log.step()

    def _warn_of_silent_logs(self) -> None:
        for log in self._step_logs:
            log.warn_if_silent()

    def _ensure_started(self, what: str) -> None:
        if not self._starts and not self._forked:
            self.start()
        self._core.require_running(what)

    # ---- work ----

    def distribute_work(self, items: Iterable[T], fn: Callable[[T], Any] | NativeFunction) -> Work:
        """Has ``fn(item)`` called for every item, on the leaves; does not wait.

        Args:
            items: any objects; they are read here and now. For a `NativeFunction`: integers.
            fn: a callable, whose results are dropped (see `map`), or a `NativeFunction`, which runs
                without the GIL.

        Returns:
            A handle with ``wait(timeout=None)`` and ``done()``. `wait` waits for all handles.

        The first exception ends the hand-out of this batch, whose other items are not run; the
        waiting call raises that same object, with a note of its item and sphere. At most 64 batches
        are in flight; this call waits for room when there are more (inside a work item it raises
        RuntimeError instead).

        Raises:
            TypeError: `fn` is not callable, `items` not iterable, or an item for a `NativeFunction`
                not an integer.
            OverflowError: an item for a `NativeFunction` does not fit 64 bits.
            StoppedError: the spheres were stopped.
        """
        if isinstance(fn, NativeFunction):
            numbers = native_items(items)
            self._ensure_started("distribute_work()")
            return self._core.submit_native(fn, numbers)
        objects = python_items(items, fn)
        self._ensure_started("distribute_work()")
        return self._core.submit(fn, objects, collect=False)

    def map(self, fn: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """``[fn(item) for item in items]``, on the leaves: results in the order of the items.

        Raises:
            What the first item that failed raised, with a note of the item and the sphere.
            KeyboardInterrupt: items that run finish in the background, the others are not run.
            TypeError: `fn` is not callable or `items` not iterable.
            RuntimeError: called from inside a work item, where it might wait for itself.
            StoppedError: the spheres were stopped.
        """
        objects = python_items(items, fn)
        self._ensure_started("map()")
        self._core.require_outside("map()")
        work = self._core.submit(fn, objects, collect=True)
        try:
            work.wait(None)
        except BaseException:
            self._core.cancel(work)  # does nothing to a batch that is finished
            del work  # it owns the error, whose traceback owns this frame
            raise
        results: list[R] = work.results
        return results

    def wait(self, timeout: float | None = None) -> None:
        """Waits until everything that was given to `distribute_work` is done.

        Args:
            timeout: seconds; None waits for ever. Ctrl-C is answered at once either way.

        Raises:
            What the first item that failed raised; each error is raised once.
            TimeoutError: there is work left. It goes on; call `wait` again.
            StoppedError: the spheres were stopped with items that had not begun.
            RuntimeError: called from inside a work item, or in a forked child.
        """
        self._core.wait(as_timeout(timeout))

    # ---- meetings ----

    def barrier(self, level: int, timeout: float | None = None) -> None:
        """Waits until all spheres of a level have finished the work they were given before.

        They stand still (state WAITING) until the last one arrives, then all go on. Work that is
        submitted after the call is for later: the barrier comes though other threads never stop
        submitting.

        Raises:
            ValueError: there is no such level.
            The error of a work item that fails meanwhile: the barrier opens and is given up.
            StoppedError: the spheres were stopped.
            TimeoutError: not all arrived within `timeout` seconds; they go on when they have.
        """
        level = as_index("level", level, 0, self.levels - 1)
        self._ensure_started("barrier()")
        with self._alone("barrier()", as_timeout(timeout)) as left:
            self._core.barrier(level, left)

    def epoch(self, timeout: float | None = None) -> int:
        """Ends an epoch: a barrier over all spheres, reported up the tree to the root.

        Returns the number of epochs ended so far, this one included. Raises as `barrier`.
        """
        self._ensure_started("epoch()")
        with self._alone("epoch()", as_timeout(timeout)) as left:
            return self._core.epoch(left)

    @contextlib.contextmanager
    def _alone(self, what: str, timeout: float | None) -> Iterator[float | None]:
        """While no items wait for each other, as the shards of synchronised batch norm do."""
        self._core.require_outside(what)
        begin = time.monotonic()
        longest = -1 if timeout is None else min(timeout, threading.TIMEOUT_MAX)
        if not self._together.acquire(timeout=longest):
            raise TimeoutError(
                f"{what}: another barrier, or a model's shards, were still waiting for each other "
                f"after {timeout} s"
            )
        try:
            yield None if timeout is None else max(0.0, timeout - (time.monotonic() - begin))
        finally:
            self._together.release()

    # ---- messages ----

    def send(self, source: int, target: int, value: object) -> None:
        """Puts a value into a sphere's mailbox, along an edge: to a parent, child or sibling.

        Raises:
            ValueError: no such sphere, or the two do not touch.
            OverflowError: 128 messages wait there already; nothing was sent.
        """
        self._core.send(self._as_id("source", source), self._as_id("target", target), value)

    def receive(self, sphere: int, timeout: float | None = None) -> Any:
        """Takes the oldest value out of a sphere's mailbox; waits for one.

        Raises:
            ValueError: no such sphere.
            TimeoutError: none came within `timeout` seconds (None waits for ever, 0 not at all).
            StoppedError: none was there and the spheres were stopped.
        """
        return self._core.receive(self._as_id("sphere", sphere), as_timeout(timeout))

    def _as_id(self, name: str, value: Any) -> int:
        return as_index(f"{name}, a sphere's id,", value, 0, self.total_spheres - 1)

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


# Threads that still run when the interpreter is torn down could not take the GIL any more.
_live: weakref.WeakSet[SpherePool] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    for spheres in list(_live):
        if spheres.running:
            spheres._core.stop(None)
    _core.join_dropped()


def _renew_stopped() -> None:
    """In a forked child: a thread of the parent may have held a lock of spheres that do not run."""
    for spheres in list(_live):
        old = spheres._core
        if not old.forked():
            spheres._core = _core.System(spheres.levels, spheres.concurrency, old.starts)


os.register_at_fork(after_in_child=_renew_stopped)
