"""Pictures: the hierarchy as rings, a timeline of a trace, a loader's waits.

matplotlib is an extra, imported when something is drawn. No picture changes matplotlib's settings
or opens a window. `KissingSpheres.plot` draws the rings; the other two are functions here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch_spheres.observe.plots.rings import Activity, draw_rings
from torch_spheres.observe.plots.theme import picture, points
from torch_spheres.observe.plots.timeline import MOST_ROWS, Timeline, draw_timeline
from torch_spheres.observe.plots.waits import draw_waits
from torch_spheres.observe.stats import Stats
from torch_spheres.observe.trace import Trace
from torch_spheres.runtime.arguments import as_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from torch_spheres.spheres import KissingSpheres

__all__ = ["plot_loader", "plot_rings", "plot_timeline"]


def plot_rings(
    spheres: KissingSpheres, ax: Axes | None, stats: Stats | None, trace: Trace | None, theme: str
) -> Axes:
    """Draws the hierarchy as rings; see `KissingSpheres.plot`."""
    if stats is not None and trace is not None:
        raise ValueError("plot() draws stats or a trace; give it one of the two")
    if trace is not None:
        _check_trace(trace)
        shown = Activity.of_trace(trace)
    else:
        stats = spheres.stats() if stats is None else stats
        if not isinstance(stats, Stats):
            raise TypeError(f"stats must be None or from stats(), got {type(stats).__name__}")
        shown = Activity.of_stats(stats)
    drawn = len(shown.busy)
    if drawn != (total := spheres.total_spheres):
        raise ValueError(f"there is a figure of {drawn} spheres, and these are {total}")
    with picture("plot()", ax, theme, (7.4, 7.6)) as on:
        draw_rings(on, shown, spheres.levels, spheres.concurrency)
        return on


def _check_trace(trace: object) -> None:
    """Raises a TypeError if `trace` is no `Trace`."""
    if not isinstance(trace, Trace):
        raise TypeError(
            f"trace must be what `with spheres.trace() as trace` gives, got {type(trace).__name__}"
        )


def plot_timeline(
    trace: Trace,
    ax: Axes | None = None,
    *,
    begin: float | None = None,
    end: float | None = None,
    theme: str = "light",
) -> Axes:
    """Draws a trace as a Gantt chart: a row for each sphere that did anything, bars over time.

    Bars are states of a sphere, and over them phases of training, with the number of the item or
    shard where there is room; a line marks items that belonged to another sphere. Arrows are
    steals, from victim to thief, and gradients, to the thread that adds them. Bars, arrows and rows
    that would be too many to read are left out, and the title says so.

    Args:
        trace: from ``with spheres.trace() as trace``.
        ax: where to draw; title and legend are outside of the axes, so make their figure with
            ``layout="constrained"``. None: a new figure, made by ``matplotlib.pyplot`` if that is
            imported already.
        begin: milliseconds since the trace began, as on the axis. None: its beginning.
        end: milliseconds since the trace began. None: its end.
        theme: ``"light"`` or ``"dark"``; sets the figure's background too.

    Returns:
        The axes; ``ax.figure.savefig("timeline.png")`` saves them.

    Raises:
        ImportError: there is no matplotlib.
        TypeError: `trace` is no `Trace`, `ax` no axes, or `begin` or `end` no number.
        ValueError: `begin` is not before `end`, they are not within the trace, or there is no such
            theme.
    """
    _check_trace(trace)
    first, last = _window(trace, begin, end)
    with picture("plot_timeline()", ax, theme, (9.0, 9.0)) as on:
        shown = Timeline.of(trace, first, last, min(MOST_ROWS, int(points(on)[1] / 10) or 1))
        if ax is None:
            on.figure.set_size_inches(9.0, 1.7 + 0.22 * max(4, len(shown.rows)))  # type: ignore[union-attr]
        draw_timeline(on, shown)
        return on


def _window(trace: Trace, begin: Any, end: Any) -> tuple[float, float]:
    whole = max(1, trace.end_ns - trace.begin_ns) / 1e6
    first, last = (
        default if value is None else as_number(name, value, "None or a number of milliseconds")
        for name, value, default in (("begin", begin, 0.0), ("end", end, whole))
    )
    first, last = max(first, 0.0), min(last, whole)
    if not first < last:  # nor if one of them is NaN
        raise ValueError(
            f"begin must be before end, within the trace's 0 to {whole:.6g} milliseconds; got "
            f"begin={begin} and end={end}"
        )
    return first, last


def plot_loader(loader: Any, ax: Axes | None = None, *, theme: str = "light") -> Axes:
    """Draws where a loop waited for its loader: shares of the time, from left to right.

    At each moment the shares are: ``next()`` waited and no batch was ready; ``next()`` took its
    time though one was (a batch had to be finished or copied); the loop's own work. The last 10,000
    calls are shown, and the time between epochs is blank.

    Args:
        loader: from `wrap`, after the loop has asked it for batches.
        ax: where to draw; None: a new figure. See `plot_timeline`.
        theme: ``"light"`` or ``"dark"``.

    Returns:
        The axes.

    Raises:
        ImportError: there is no matplotlib.
        TypeError: `loader` was not made by `wrap`, or `ax` is no axes.
        ValueError: the loop has not asked it for a batch yet, or there is no such theme.
    """
    read = getattr(loader, "calls", None)
    if not callable(read):
        raise TypeError(
            f"loader must be a wrapped one, got {type(loader).__name__}; loader = wrap(loader), "
            "and iterate over that"
        )
    calls = read()
    if not calls:
        raise ValueError(
            "there is nothing to draw yet: nobody has iterated over this loader since it was made"
        )
    with picture("plot_loader()", ax, theme, (9.0, 3.6)) as on:
        draw_waits(on, calls, loader.stats())
        return on
