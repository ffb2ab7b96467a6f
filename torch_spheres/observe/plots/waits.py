"""Draws where a loop waited for its loader, for `plot_loader`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from torch_spheres.observe.plots.theme import COLOURS, describe, points
from torch_spheres.observe.table import duration

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from torch_spheres.data.loader_stats import Call, LoaderStats

__all__ = ["draw_waits", "shares"]

_MOST_STEPS = 240
_LAYERS = ("waited, no batch was ready", "waited, though one was ready", "the loop's own work")


def shares(calls: Sequence[Call], steps: int) -> tuple[float, NDArray[np.float64]]:
    """Divides the time from the first to the last call into equal steps.

    Returns:
        The seconds of all steps, and an array with a row for each of `_LAYERS`, whose shares (0 to
        1) of a step add up to 1 except between epochs.
    """
    ended = np.array([call.ended for call in calls])
    asked = ended - [call.waited for call in calls]
    since = ended - [call.since for call in calls]
    since[0] = asked[0]  # the time before the first known call is not shown
    ready = np.array([bool(call.ready) for call in calls])
    edges = np.linspace(asked[0], max(ended[-1], asked[0] + 1e-9), steps + 1)

    def covered(begins: NDArray[np.float64], ends: NDArray[np.float64]) -> Any:
        # The time covered up to a moment grows within intervals, and not between them.
        moments = np.maximum.accumulate([edges[0], *np.column_stack([begins, ends]).ravel()])
        seconds = np.column_stack([np.zeros(len(begins)), ends - begins]).cumsum()
        return np.diff(np.interp(edges, moments, [0.0, *seconds])) / np.diff(edges)

    layers = (asked[~ready], ended[~ready]), (asked[ready], ended[ready]), (since, asked)
    return edges[-1] - edges[0], np.array([covered(*layer) for layer in layers])


def draw_waits(ax: Axes, calls: Sequence[Call], stats: LoaderStats) -> None:
    """Draws on the axes."""
    from matplotlib.ticker import PercentFormatter

    seconds, shown = shares(calls, min(_MOST_STEPS, max(8, int(points(ax)[0] / 5))))
    unit, scale = ("s", 1.0) if seconds >= 1 else ("ms", 1e3)
    edges = np.linspace(0, seconds * scale, shown.shape[1] + 1)
    layers = ax.stackplot(
        edges, np.column_stack([shown, shown[:, -1]]), step="post", labels=_LAYERS, linewidth=0,
        colors=[COLOURS["steal"], COLOURS["late"], COLOURS["unused"]],
    )  # fmt: skip
    ax.set(xlim=(0, edges[-1]), ylim=(0, 1), xlabel=f"time, {unit}", ylabel="share of the time")
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    waited, elapsed = duration(stats.waited), duration(stats.elapsed)
    lines = [
        f"The loop waited {waited} of {elapsed} ({stats.waiting:.0%})",
        f"{stats.batches:,} batches, longest wait {duration(max(c.waited for c in calls))}",
    ]
    if len(calls) < stats.batches:
        lines.append(f"shown: the last {len(calls):,} calls")
    describe(ax, lines, layers, below=4.5)
