"""`KissingSpheres`: the pool of `runtime`, with the methods that show what it does.

Those methods are implemented in `observe`.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, TextIO

from torch_spheres.observe.displays import as_html
from torch_spheres.observe.live import Live
from torch_spheres.observe.plots import plot_rings
from torch_spheres.observe.readings import Rates, Reading
from torch_spheres.observe.sphere_stats import sphere_stats
from torch_spheres.observe.stats import Stats
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
        levels: 1 to 4, for 1, 13, 157 or 1885 spheres. The spheres of the last level, the *leaves*
            (1, 12, 144 or 1728), run work; the others hand it down.
        concurrency: how many leaves run at once, at least 1; more than there are leaves means all.
            None: the cores that this process may use.

    A ``with`` block starts the threads; at its end it waits for outstanding work and stops them.
    Or call `start` and `stop`. The first use starts spheres that were never started, and the end of
    the program stops spheres that still run.

    Work item *k* belongs to the leaf whose path from the root is *k* written in base 12, least
    significant digit first. Leaves that run out of work steal items from their siblings, so an item
    may run on another sphere than its own. With fewer cores than leaves it usually does, because
    the same few threads stay warm.

    All methods may be called from any thread. Inside a work item `distribute_work`, `send` and
    `stats` work, and methods that wait raise RuntimeError. In a child of ``os.fork()`` the parent's
    spheres raise RuntimeError: make new ones there.

    Raises:
        TypeError: `levels` or `concurrency` is not an integer.
        ValueError: `levels` or `concurrency` is out of range.
    """

    def __init__(self, levels: int = 2, *, concurrency: int | None = None) -> None:
        super().__init__(levels, concurrency=concurrency)
        self._origin = next(_origins)

    def stats(self) -> Stats:
        """Reads every sphere's figures, whether the spheres run or not.

        Returns:
            A snapshot; see `Stats` for the difference of two.
        """
        now, cpu = time.monotonic_ns(), time.process_time_ns()
        begin, cpu_before = self._first_start or (now, cpu)
        return Stats(
            spheres=sphere_stats(self._core),
            concurrency=self._core.concurrency,
            cores=self._cores,
            begin_ns=begin,
            time_ns=now,
            cpu_ns=max(0, cpu - cpu_before),  # in the child of a fork() the clock begins at 0
            origin=self._origin,
        )

    def print_stats(self, file: TextIO | None = None) -> None:
        """Prints a table with a row per level and the busiest and idlest leaves.

        Args:
            file: where to print; None: stdout.
        """
        print(format_stats(self.stats()), file=sys.stdout if file is None else file)

    def live(
        self,
        refresh_per_second: float = 4.0,
        *,
        file: TextIO | None = None,
        plain: bool | None = None,
        plain_seconds: float = 10.0,
    ) -> Live:
        """Shows what the spheres do while a ``with`` block runs.

        Args:
            refresh_per_second: how often the display is drawn, in Hz.
            file: a terminal, or a text file for plain lines. None: a notebook's cell, or stderr.
            plain: whether to print plain lines. None: unless there is a terminal or a notebook.
            plain_seconds: seconds from one plain line to the next; the last line is printed at the
                end, if there was one before.

        Returns:
            The display, a context manager. Its ``advance(samples)`` counts samples of the loop.

        Raises:
            TypeError: a number, `file` or `plain` is something else.
            ValueError: a number is not more than 0.
            ImportError: on ``with``, in a terminal: rich is missing.
            RuntimeError: on ``with``: another display is shown.
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
        """Writes figures to TensorBoard every few steps.

        The figures are `Stats.utilization`, `imbalance`, `steal_rate`, `items_per_second` and
        `cores_used`, the median and the 95th percentile of item times in seconds, items queued now
        and at most ever in one queue, and messages per second.

        Args:
            writer: ``torch.utils.tensorboard.SummaryWriter()``, or anything with
                ``add_scalar(tag, value, global_step)``.
            every: steps from one writing to the next; the figures are those of the time between.
            optimizer: the optimizer whose steps are counted. None: every optimizer that has a
                `GradientHook` on these spheres, now or later; in a loop without any call
                ``log.step()``.
            tag: how the figures' names begin, as in ``spheres/utilization``.
            first_step: steps done before, in training that is resumed.

        Returns:
            A `StatsLog`, a context manager with ``step()``, ``write()`` and ``close()``, which
            writes the rest. It need not be kept. If no step was counted, `close` warns, and `stop`
            too unless an `optimizer` was given.

        Raises:
            TypeError: an argument is of another type.
            ValueError: `every` is less than 1, or `first_step` less than 0.

        The writer's exceptions are raised by ``log.step()``, or by ``optimizer.step()`` after its
        update. Logs that were made after this one then do not count the step.
        """
        return StatsLog(self, writer, every, optimizer, tag, first_step)

    def prometheus_collector(
        self, *, per_sphere: bool | None = None, labels: Mapping[str, str] | None = None
    ) -> SphereCollector:
        """Makes a collector for a registry of `prometheus_client`, read at each scrape.

        ::

            from prometheus_client import REGISTRY, start_http_server

            REGISTRY.register(spheres.prometheus_collector())
            start_http_server(8000)

        The registry keeps the spheres alive until ``registry.unregister(collector)``, and takes one
        such collector: several `KissingSpheres` need a ``CollectorRegistry()`` each.

        Args:
            per_sphere: as of `Stats.to_prometheus`.
            labels: as of `Stats.to_prometheus`.

        Returns:
            The collector.

        Raises:
            ImportError: prometheus_client is missing.
            TypeError: as `Stats.to_prometheus`.
            ValueError: a label has no valid name, or one that is used already.
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

        A wedge's colour shows busy time (grey: never busy), the band outside it the sphere's state.
        Chords are stolen items, from the victim to the thief, where they are wide, and wider for
        more items.

        Args:
            ax: where to draw. None: a new figure. See `plot_timeline`.
            stats: a snapshot, or a difference of two, to be drawn. None: a new snapshot.
            trace: a trace to be drawn instead, from ``with spheres.trace() as trace``.
            theme: ``"light"`` or ``"dark"``.

        Returns:
            The axes; ``ax.figure.savefig("spheres.png")`` saves them.

        Raises:
            ImportError: there is no matplotlib.
            TypeError: `ax`, `stats` or `trace` is of another type.
            ValueError: both `stats` and `trace` are given, they have another number of spheres, or
                there is no such theme.
        """
        return plot_rings(self, ax, stats, trace, theme)

    def trace(self, capacity: int = 65536) -> Recording:
        """Records a `Trace` of what the spheres do in a ``with`` block.

        ::

            with spheres.trace() as trace:
                ...
            trace.save("run.json")  # for Perfetto, chrome://tracing

        The block starts spheres that do not run. They may be stopped and started in it.

        Args:
            capacity: events that are kept of each thread, of 32 bytes each; 1 to 2**24. Older ones
                are overwritten, and `Trace.lost` counts them. An item is one or two events.

        Returns:
            A `Trace` to enter, once; it can be read when the block has ended.

        Raises:
            TypeError: `capacity` is not an integer.
            ValueError: `capacity` is out of range.
            RuntimeError: on entering the block: another trace of these spheres is being recorded.
        """
        return Recording(self, capacity)
