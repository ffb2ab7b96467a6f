"""`KissingSpheres`: the hierarchy of worker threads."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import math
import os
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO, TypeVar

from torch_spheres import _core, _threads
from torch_spheres._core import NativeFunction, Topology, Work
from torch_spheres.arguments import as_index, as_timeout, native_items, python_items
from torch_spheres.exporters import ScalarWriter, StatsLog, open_log
from torch_spheres.live import Live
from torch_spheres.memory import keep_freed_memory
from torch_spheres.plots import plot_rings
from torch_spheres.recording import Recording
from torch_spheres.snapshot import Began, snapshot
from torch_spheres.stats import Stats
from torch_spheres.stats_table import format_stats
from torch_spheres.watching.readings import Reading, Rows
from torch_spheres.watching.report import report
from torch_spheres.watching.svg import picture

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes

    from torch_spheres.trace import Trace

__all__ = ["KissingSpheres", "usable_cores"]

T = TypeVar("T")
R = TypeVar("R")

_threads.install()


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


class KissingSpheres:
    """A hierarchy of worker threads, twelve children to a parent.

    Args:
        levels: 1 to 4, for 1, 13, 157 or 1885 spheres. Those of the last level, the *leaves*
            (1, 12, 144, 1728), run work; those above hand it down.
        concurrency: how many leaves run at once, at least 1. More than there are leaves means all
            of them. Default: the cores that this process may use.

    Use it in a ``with`` block, which starts the threads, waits for outstanding work at its end and
    stops them; or call `start` and `stop`. The first use starts spheres that were never started,
    and the end of the program stops those that still run.

    Work item *k* belongs to the leaf whose path from the root is *k* written in base 12, least
    significant digit first. Leaves that run out of work take items from their siblings, so an item
    may run on another sphere than its own; with fewer cores than leaves it usually does, because
    the same few threads stay warm.

    Raises:
        TypeError: `levels` or `concurrency` is not an integer.
        ValueError: it is out of range.

    Thread safety: every method may be called from any thread. Inside a work item, on a sphere's
    own thread, `distribute_work`, `send` and `stats` work; methods that wait raise RuntimeError.
    After ``os.fork()`` the child's copy raises RuntimeError: make a new one there.
    """

    def __init__(self, levels: int = 2, *, concurrency: int | None = None) -> None:
        cores = usable_cores()
        if concurrency is None:
            concurrency = cores
        levels = as_index("levels", levels)
        concurrency = as_index("concurrency", concurrency)
        if not 1 <= levels <= _core.MAX_LEVELS:
            raise ValueError(f"levels must be 1 to {_core.MAX_LEVELS}, got {levels}")
        self._topology = Topology(levels)
        if concurrency < 1:
            raise ValueError(f"concurrency must be at least 1, got {concurrency}")
        leaves = self._topology.leaves
        self._core = _core.System(levels, min(concurrency, leaves))
        self._started = False
        self._rows = Rows()
        self._cores, self._origin = cores, next(_origins)
        self._began: Began | None = None  # counting: the first start()
        self._logs: list[StatsLog] = []  # that count the steps of GradientHooks' optimizers
        self._recording: Recording | None = None  # the trace that is under way
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
        # Before its threads come, or each would have a heap of its own.
        keep_freed_memory(self.levels)
        self._began = self._began or (time.monotonic_ns(), time.process_time_ns())
        self._core.start()
        self._started = True
        report(self)
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
        lost, error = self._core.stop(as_timeout(timeout))
        report(self)
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

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None and self._core.running():
                self._core.wait(None)
        finally:
            # With an exception under way the items that are dropped are not worth a warning.
            self._core.stop(None)
            report(self)

    def _ensure_started(self, what: str) -> None:
        if not self._started and not self._core.forked():
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

        They stand still (state WAITING) until the last one arrives, then all go on.

        Raises:
            ValueError: there is no such level.
            The error of a work item that fails meanwhile: the barrier opens and is given up.
            StoppedError: the spheres were stopped.
            TimeoutError: not all arrived within `timeout` seconds; they go on when they have.
        """
        level = as_index("level", level)
        if not 0 <= level < self.levels:
            raise ValueError(f"level must be 0 to {self.levels - 1}, got {level}")
        self._ensure_started("barrier()")
        self._core.barrier(level, as_timeout(timeout))

    def epoch(self, timeout: float | None = None) -> int:
        """Ends an epoch: a barrier over all spheres, reported up the tree to the root.

        Returns the number of epochs ended so far, this one included. Raises as `barrier`.
        """
        self._ensure_started("epoch()")
        return self._core.epoch(as_timeout(timeout))

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
        sphere = as_index(name, value)
        if not 0 <= sphere < self.total_spheres:
            raise ValueError(
                f"{name}: there is no sphere {sphere}; ids are 0 to {self.total_spheres - 1}"
            )
        return sphere

    # ---- statistics ----

    def stats(self) -> Stats:
        """A frozen snapshot of every sphere's figures; ``after - before`` is what came between."""
        return snapshot(
            self._core,
            self.concurrency,
            cores=self._cores,
            origin=self._origin,
            began=self._began,
        )

    def print_stats(self, file: TextIO | None = None) -> None:
        """Prints a table: a row per level, the busiest and idlest leaves. Default: stdout."""
        print(format_stats(self.stats()), file=sys.stdout if file is None else file)

    def live(
        self,
        refresh_per_second: float = 4.0,
        *,
        file: TextIO | None = None,
        plain: bool | None = None,
        plain_seconds: float = 10.0,
    ) -> Live:
        """A display of what the spheres do, in the terminal, for a ``with`` block: see `Live`.

        Args:
            refresh_per_second: how often it is drawn.
            file: a terminal; default: stderr. Where it is none, lines are printed.
            plain: whether to print lines; None: where there is no terminal.
            plain_seconds: seconds from line to line. A last one comes at the end if there was one.

        Raises:
            ImportError: rich is missing (on ``with``; not for plain lines).
            RuntimeError: another display is shown (on ``with``).
            TypeError, ValueError: a number is none, or not more than 0.
        """
        return Live(self, refresh_per_second, file=file, plain=plain, plain_seconds=plain_seconds)

    def _repr_html_(self) -> str:
        return picture(Reading.of(self), started=self._started, forked=self._core.forked())

    def log_to(
        self,
        writer: ScalarWriter,
        every: int = 100,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        tag: str = "spheres",
        first_step: int = 0,
    ) -> StatsLog:
        """Writes the figures that matter to TensorBoard each `every` steps.

        Args:
            writer: ``torch.utils.tensorboard.SummaryWriter()``, or anything with
                ``add_scalar(tag, value, global_step)``.
            every: steps from one writing to the next; the figures are of the time between.
            optimizer: whose ``step()`` counts. None: that of each optimizer with a `GradientHook`
                on these spheres, now or later; in a loop without any, call ``log.step()``.
            tag: what the names begin with, as in ``spheres/utilization``.
            first_step: steps done before, in training that goes on.

        Returns:
            A handle with ``step()``, ``write()`` and ``close()``, which is a context manager too;
            ``close()`` writes the rest. It need not be kept.

        Written are `Stats.utilization`, `imbalance`, `steal_rate`, `items_per_second`,
        `cores_used`, the median and the 95th percentile of item times (seconds), items queued now
        and at most ever in one queue, and messages per second.

        An error of the writer is raised where the step is counted: by ``optimizer.step()``, whose
        update has been made then, or by ``log.step()``.

        Raises:
            TypeError: an argument is of another kind.
            ValueError: `every` is less than 1.
        """
        every, first_step = as_index("every", every), as_index("first_step", first_step)
        return open_log(self, writer, every, optimizer, tag, first_step)

    def plot(
        self,
        ax: Axes | None = None,
        *,
        stats: Stats | None = None,
        trace: Trace | None = None,
        theme: str = "light",
    ) -> Axes:
        """Draws the hierarchy as rings: the root in the middle, a wedge for each sphere.

        Wedges are coloured by busy time, and those that did nothing grey; the band outside a wedge
        says what the sphere does at the moment. Chords are items that were stolen, from the victim
        to the wide end at the thief, the wider the more. Paths stand where there is room for them.

        Args:
            ax: where to draw. None: a new figure, which is one of pyplot's where
                ``matplotlib.pyplot`` is imported already, and otherwise its own.
            stats: what to draw, from `stats`, or a difference of two. None: as they are now.
            trace: what to draw instead, from ``with spheres.trace() as trace``.
            theme: ``"light"`` or ``"dark"``; of the picture, and of the figure's background.

        Returns:
            The axes; ``ax.figure.savefig("spheres.png")`` saves them.

        Raises:
            ImportError: there is no matplotlib: ``pip install "torch_spheres[plots]"``.
            TypeError: `ax`, `stats` or `trace` is something else.
            ValueError: both `stats` and `trace` are given, they are of another number of spheres,
                or there is no such theme.
        """
        return plot_rings(self, ax, stats=stats, trace=trace, theme=theme)

    def trace(self, capacity: int = 65536) -> Recording:
        """Records what the spheres do in a ``with`` block; it can be read and saved afterwards.

        ::

            with spheres.trace() as trace:
                ...
            trace.save("run.json")  # for Perfetto, chrome://tracing

        Spheres that do not run are started. They may be stopped and started in the block.

        Args:
            capacity: events to keep of each thread, of 32 bytes each; 1 to 2**24. Older ones are
                overwritten, and `Trace.lost` counts them. An item is one or two events.

        Raises:
            TypeError: `capacity` is not an integer.
            ValueError: it is out of range.
            RuntimeError, on entering the block: another trace of these spheres is being recorded.
        """
        return Recording(self, capacity)

    def __repr__(self) -> str:
        state = "running" if self.running else "stopped" if self._started else "not started"
        return (
            f"KissingSpheres(levels={self.levels}, concurrency={self.concurrency}): "
            f"{self.total_spheres} spheres, {self.leaves} leaves, {state}"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError(
            "KissingSpheres cannot be pickled or copied: threads belong to one process; "
            "make a new one in the other process"
        )


_origins = itertools.count(1)
# Threads that still run when the interpreter is torn down could not take the GIL any more.
_live: weakref.WeakSet[KissingSpheres] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    for spheres in list(_live):
        if spheres.running:
            spheres._core.stop(None)
