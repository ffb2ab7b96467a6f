"""`KissingSpheres`: the pool of worker threads, with what can be seen of it."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, TextIO

from torch_spheres.observe.displays import as_html
from torch_spheres.observe.live import Live
from torch_spheres.observe.plots import check_trace
from torch_spheres.observe.plots.rings import Activity, draw_rings
from torch_spheres.observe.plots.theme import picture
from torch_spheres.observe.readings import Rates, Reading
from torch_spheres.observe.stats import Stats, sphere_stats
from torch_spheres.observe.table import format_stats
from torch_spheres.observe.tensorboard import ScalarWriter, StatsLog
from torch_spheres.observe.trace_recorder import Recording
from torch_spheres.runtime.pool import SpherePool

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes

    from torch_spheres.observe.prometheus import SphereCollector
    from torch_spheres.observe.trace import Trace

__all__ = ["KissingSpheres"]

_origins = itertools.count(1)


class KissingSpheres(SpherePool):
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
        super().__init__(levels, concurrency=concurrency)
        self._origin = next(_origins)

    def stats(self) -> Stats:
        """A frozen snapshot of every sphere's figures; ``after - before`` is what came between."""
        now, cpu = time.monotonic_ns(), time.process_time_ns()
        begin, cpu_before = self._first_start or (now, cpu)
        return Stats(
            spheres=sphere_stats(self._core),
            concurrency=self._core.concurrency,
            cores=self._cores,
            begin_ns=begin,
            time_ns=now,
            cpu_ns=max(0, cpu - cpu_before),  # the child of a fork() begins at 0
            origin=self._origin,
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
        """A display of what the spheres do while a ``with`` block runs: see `Live`.

        Args:
            refresh_per_second: how often it is drawn.
            file: a terminal; default: a notebook's cell, or stderr. Where it is none, lines are
                printed.
            plain: whether to print lines; None: where there is neither a terminal nor a notebook.
            plain_seconds: seconds from line to line. A last one comes at the end if there was one.

        Raises:
            ImportError: rich is missing (on ``with``, in a terminal; not for plain lines).
            RuntimeError: another display is shown (on ``with``).
            TypeError, ValueError: a number is none, or not more than 0; `file` is no text file.
        """
        return Live(self, refresh_per_second, file, plain, plain_seconds)

    def _repr_html_(self) -> str:
        now = Reading.of(self)
        return as_html(Rates(now, now))

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
            optimizer: whose ``step()`` counts. None: that of each optimizer that is given a
                `GradientHook` on these spheres, before or after; in a loop without any, call
                ``log.step()``.
            tag: what the names begin with, as in ``spheres/utilization``.
            first_step: steps done before, in training that goes on.

        Returns:
            A handle with ``step()``, ``write()`` and ``close()``, which is a context manager too;
            ``close()`` writes the rest. It need not be kept. Where no step has been counted
            `close` warns, and `stop` as well unless an `optimizer` was given.

        Written are `Stats.utilization`, `imbalance`, `steal_rate`, `items_per_second`,
        `cores_used`, the median and the 95th percentile of item times (seconds), items queued now
        and at most ever in one queue, and messages per second.

        An error of the writer is raised where the step is counted: by ``optimizer.step()``, whose
        update has been made then, or by ``log.step()``. Logs that were made after this one do not
        count that step.

        Raises:
            TypeError: an argument is of another kind.
            ValueError: `every` is less than 1, or `first_step` less than 0.
        """
        return StatsLog(self, writer, every, optimizer, tag, first_step)

    def prometheus_collector(
        self, *, per_sphere: bool | None = None, labels: Mapping[str, str] | None = None
    ) -> SphereCollector:
        """For a registry of `prometheus_client`, which asks it for the figures at each scrape.

        ::

            from prometheus_client import REGISTRY, start_http_server

            REGISTRY.register(spheres.prometheus_collector())
            start_http_server(8000)

        It may be asked from any thread. The registry keeps the spheres until
        ``registry.unregister(collector)``. A registry takes one collector: several `KissingSpheres`
        of a process need a ``CollectorRegistry()`` each.

        Arguments and errors are those of `Stats.to_prometheus`.
        """
        from torch_spheres.observe.prometheus import SphereCollector

        return SphereCollector(self.stats, per_sphere, labels)

    def plot(
        self,
        ax: Axes | None = None,
        *,
        stats: Stats | None = None,
        trace: Trace | None = None,
        theme: str = "light",
    ) -> Axes:
        """Draws the hierarchy as rings: the root in the middle, a wedge for each sphere.

        Wedges are coloured by busy time, and those that were never busy grey; the band outside a
        wedge says what the sphere does at the moment. Chords are items that were stolen, from the
        victim to the wide end at the thief, the wider the more.

        Args:
            ax: where to draw. None: a new figure. As of `plot_timeline`.
            stats: what to draw, from `stats`, or a difference of two. None: as they are now.
            trace: what to draw instead, from ``with spheres.trace() as trace``.
            theme: ``"light"`` or ``"dark"``.

        Returns:
            The axes; ``ax.figure.savefig("spheres.png")`` saves them.

        Raises:
            ImportError: there is no matplotlib.
            TypeError: `ax`, `stats` or `trace` is something else.
            ValueError: both `stats` and `trace` are given, they are of another number of spheres,
                or there is no such theme.
        """
        if stats is not None and trace is not None:
            raise ValueError("plot() draws stats or a trace; give it one of the two")
        if trace is not None:
            check_trace(trace)
            shown = Activity.of_trace(trace)
        else:
            stats = self.stats() if stats is None else stats
            if not isinstance(stats, Stats):
                raise TypeError(f"stats must be None or from stats(), got {type(stats).__name__}")
            shown = Activity.of_stats(stats)
        drawn = len(shown.busy)
        if drawn != (total := self.total_spheres):
            raise ValueError(f"there is a figure of {drawn} spheres, and these are {total}")
        with picture("plot()", ax, theme, (7.4, 7.6)) as on:
            draw_rings(on, shown, self.levels, self.concurrency)
            return on

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
