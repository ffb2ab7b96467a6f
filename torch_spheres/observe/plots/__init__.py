"""Pictures, with matplotlib: the hierarchy as rings, a timeline of a trace, a loader's waits.

matplotlib is an extra (``pip install "torch_spheres[plots]"``) and is imported when something is
drawn. No picture changes matplotlib's settings or opens a window.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch_spheres.observe.plots.theme import picture, points
from torch_spheres.observe.plots.timeline import MOST_ROWS, Timeline, draw_timeline
from torch_spheres.observe.plots.waits import draw_waits
from torch_spheres.observe.trace import Trace
from torch_spheres.runtime.arguments import as_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["check_trace", "plot_loader", "plot_timeline"]


def check_trace(trace: object) -> None:
    """Raises a TypeError if it is none."""
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

    Bars are states of a sphere and over them phases of training, with the number of the item or
    shard where there is room, and a line below items that belonged to another sphere. Arrows are
    steals, from victim to thief, and gradients, to the thread that adds them. What is too much to
    be read, as rows of all but the busiest spheres, is left out, and the picture says so.

    Args:
        trace: from ``with spheres.trace() as trace``.
        ax: where to draw. None: a new figure, which is one of pyplot's where
            ``matplotlib.pyplot`` is imported already, and otherwise its own. Title and legend stand
            outside of the axes: make the figure with ``layout="constrained"``, to have room.
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
    check_trace(trace)
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
    if not first < last:  # or one of them is not a number
        raise ValueError(
            f"begin must be before end, within the trace's 0 to {whole:.6g} milliseconds; got "
            f"begin={begin} and end={end}"
        )
    return first, last


def plot_loader(loader: Any, ax: Axes | None = None, *, theme: str = "light") -> Axes:
    """Draws where a loop waited for its loader: shares of the time, from left to right.

    Of each moment it shows how much the loop spent in ``next()`` while no batch stood ready, how
    much though one did (it had to be finished or copied), and how much on its own work. The last
    10,000 calls are shown; time between epochs is left free.

    Args:
        loader: from `wrap`, after the loop has asked it for batches.
        ax: where to draw; None: a new figure. Both as of `plot_timeline`.
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
