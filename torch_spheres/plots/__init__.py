"""Pictures, with matplotlib: the hierarchy as rings, a timeline of a trace, a loader's waits.

matplotlib is an extra (``pip install "torch_spheres[plots]"``) and is imported when something is
drawn. No picture changes matplotlib's settings or opens a window.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import TYPE_CHECKING, Any

from torch_spheres.loading.stats import CALLS_KEPT
from torch_spheres.plots.ring_data import RingData
from torch_spheres.plots.rings import RINGS_SIZE, draw_rings
from torch_spheres.plots.theme import canvas, find_theme
from torch_spheres.plots.timeline import MOST_ROWS, Timeline, draw_timeline
from torch_spheres.plots.waits import draw_waits
from torch_spheres.stats import Stats
from torch_spheres.trace import Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from torch_spheres.system import KissingSpheres

__all__ = ["plot_loader", "plot_rings", "plot_timeline"]

_LEAST_ROW = 10.0  # points


def plot_rings(
    spheres: KissingSpheres,
    ax: Axes | None = None,
    *,
    stats: Stats | None = None,
    trace: Trace | None = None,
    theme: str = "light",
) -> Axes:
    """See `KissingSpheres.plot`."""
    colours = find_theme(theme)
    if stats is not None and trace is not None:
        raise ValueError("plot() draws stats or a trace; give it one of the two")
    if trace is not None:
        _check_trace("trace", trace)
        if trace.levels != spheres.levels:
            raise ValueError(
                f"the trace is of {trace.levels} levels, and these spheres have {spheres.levels}"
            )
        data = RingData.of_trace(trace)
    else:
        data = RingData.of_stats(_checked(stats, spheres))
    on = canvas("plot()", ax, colours, RINGS_SIZE)
    draw_rings(on, data, colours)
    return on.ax


def _checked(stats: Any, spheres: KissingSpheres) -> Stats:
    if stats is None:
        return spheres.stats()
    if isinstance(stats, Trace):
        raise TypeError("stats must be None or from stats(), got a trace; give it as trace=")
    if not isinstance(stats, Stats):
        raise TypeError(f"stats must be None or from stats(), got {type(stats).__name__}")
    if len(stats) != spheres.total_spheres:
        raise ValueError(
            f"stats are of {len(stats)} spheres, and these are {spheres.total_spheres}"
        )
    return stats


def _check_trace(name: str, trace: Any) -> None:
    if not isinstance(trace, Trace):
        raise TypeError(
            f"{name} must be what `with spheres.trace() as trace` gives, got {type(trace).__name__}"
            + ("; plot() takes it as stats=" if isinstance(trace, Stats) else "")
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

    Bars are what a sphere did (running items, summing, standing at a barrier), and over them the
    phases of training; with the number of the item or shard where there is room. A line along a
    bar's lower edge: the item belonged to another sphere. Arrows are steals, from victim to thief,
    and gradients, to the thread that adds them, if there are few enough to be read. Where there is
    no room for all spheres the busiest are shown, and the picture says so.

    Args:
        trace: from ``with spheres.trace() as trace``.
        ax: where to draw. None: a new figure, which is one of pyplot's where
            ``matplotlib.pyplot`` is imported already, and otherwise its own. Title and legend stand
            above the axes: make the figure with ``layout="constrained"``, to have room for them.
        begin: milliseconds since the trace began, as on the axis. None: its beginning.
        end: milliseconds since the trace began. None: its end.
        theme: ``"light"`` or ``"dark"``; of the picture, and of the figure's background.

    Returns:
        The axes; ``ax.figure.savefig("timeline.png")`` saves them.

    Raises:
        ImportError: there is no matplotlib.
        TypeError: `trace` is no trace, `ax` no axes, or `begin` or `end` no number.
        ValueError: `begin` is not before `end`, they are not within the trace, or there is no such
            theme.
    """
    _check_trace("trace", trace)
    colours = find_theme(theme)
    first, last = _window(trace, begin, end)
    most = MOST_ROWS
    shown = Timeline.of(trace, first, last, most)
    on = canvas("plot_timeline()", ax, colours, (9.0, 1.7 + 0.22 * max(4, len(shown.rows))))
    room = max(1, int(on.height / _LEAST_ROW))
    if room < len(shown.rows):
        shown = Timeline.of(trace, first, last, room)
    draw_timeline(on, trace, shown, colours)
    return on.ax


def _window(trace: Trace, begin: object, end: object) -> tuple[float, float]:
    whole = max(1, trace.end_ns - trace.begin_ns) / 1e6
    first = 0.0 if begin is None else _milliseconds("begin", begin)
    last = whole if end is None else _milliseconds("end", end)
    if begin is not None and end is not None and not first < last:
        raise ValueError(f"begin must be before end, got {first:g} and {last:g} ms")
    if first >= whole or last <= 0:
        part = f"from {first:g} on" if last > 0 else f"up to {last:g}"
        raise ValueError(
            f"the trace goes from 0 to {whole:.6g} ms; there is nothing {part} (begin and end are "
            "milliseconds since it began)"
        )
    return max(0.0, first), min(whole, last)


def _milliseconds(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be None or a number of milliseconds, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value!r}")
    return float(value)


def plot_loader(loader: Any, ax: Axes | None = None, *, theme: str = "light") -> Axes:
    """Draws where a loop waited for its loader: shares of the time, from left to right.

    Of each moment it shows how much the loop spent in ``next()`` while no batch stood ready, how
    much though one did (it had to be finished or copied), and how much on its own work. The last
    10,000 calls are shown; time between epochs is left free.

    Args:
        loader: from `wrap`, after the loop has asked it for batches.
        ax: where to draw; None: a new figure, as of `plot_timeline`. Title and legend stand above
            the axes: make the figure with ``layout="constrained"``, which makes room for them.
        theme: ``"light"`` or ``"dark"``.

    Returns:
        The axes.

    Raises:
        ImportError: there is no matplotlib.
        TypeError: `loader` was not made by `wrap`, or `ax` is no axes.
        ValueError: the loop has not asked it for a batch yet, or there is no such theme.
    """
    # It knows KissingSpheres, which knows this module.
    from torch_spheres.loader import SphereLoader

    if not isinstance(loader, SphereLoader):
        raise TypeError(
            f"loader must be a wrapped one, got {type(loader).__name__}; loader = wrap(loader), "
            "and iterate over that"
        )
    colours = find_theme(theme)
    calls = loader._meter.calls()
    if not calls:
        raise ValueError(
            "there is nothing to draw yet: nobody has iterated over this loader since it was made"
        )
    on = canvas("plot_loader()", ax, colours, (9.0, 3.6))
    draw_waits(on, calls, loader.stats(), CALLS_KEPT, colours)
    return on.ax
