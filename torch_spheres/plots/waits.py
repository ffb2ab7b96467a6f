"""Where a loop waited for its loader: how each moment was divided between waiting and its own work.

Each bar is a stretch of time, as high as its share. So a few calls look like a timeline, and ten
thousand like a curve.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from torch_spheres.plots.theme import Canvas, Theme, duration, header, plain_axes

if TYPE_CHECKING:
    from torch_spheres.loading.stats import Call, LoaderStats

__all__ = ["Waits", "draw_waits"]

_BAR = 5.0  # points
_MOST_BARS = 240


@dataclass(frozen=True, slots=True)
class Waits:
    """Shares of equal stretches of time, 0 to 1; what is missing was between epochs."""

    seconds: float
    """All of the time that is shown, from the begin of the first call to the end of the last."""
    empty: NDArray[np.float64]
    """Waited, and no batch stood ready."""
    late: NDArray[np.float64]
    """Waited, though one stood ready: to have it finished, copied or handed over."""
    worked: NDArray[np.float64]
    """The loop's own work."""
    epochs: tuple[float, ...]
    """When epochs began, in seconds."""

    @staticmethod
    def of(calls: Sequence[Call], bars: int) -> Waits:
        """From at least one call."""
        ended = np.array([call.ended for call in calls])
        waited = np.array([call.waited for call in calls])
        since = np.array([call.since for call in calls])
        # What came before the first call that is known is not shown.
        since[0] = waited[0]
        begin = float((ended - waited)[0])
        seconds = max(1e-9, float(ended[-1]) - begin)
        edges = begin + np.linspace(0, seconds, bars + 1)
        ready = np.array([bool(call.ready) for call in calls])
        share = seconds / bars
        return Waits(
            seconds=seconds,
            empty=_covered(edges, (ended - waited)[~ready], ended[~ready]) / share,
            late=_covered(edges, (ended - waited)[ready], ended[ready]) / share,
            worked=_covered(edges, ended - since, ended - waited) / share,
            epochs=tuple(call.ended - call.waited - begin for call in calls if call.first),
        )


def _covered(
    edges: NDArray[np.float64], begins: NDArray[np.float64], ends: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Seconds of each stretch that intervals cover, which do not overlap."""
    # How much is covered up to a moment grows linearly within intervals, and not between them.
    order = np.argsort(begins)
    begins, ends = begins[order], ends[order]
    moments = np.column_stack([begins, ends]).ravel()
    lengths = np.concatenate([[0.0], np.cumsum(ends - begins)])
    sums = np.column_stack([lengths[:-1], lengths[1:]]).ravel()
    if not len(moments):
        return np.zeros(len(edges) - 1)
    return np.diff(np.interp(edges, np.maximum.accumulate(moments), sums))


def draw_waits(
    on: Canvas, calls: Sequence[Call], stats: LoaderStats, kept: int, theme: Theme
) -> None:
    """Draws on the whole of the axes."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.ticker import PercentFormatter

    ax, text = on.ax, min(10.0, max(5.5, 0.019 * on.width))
    shown = Waits.of(calls, min(_MOST_BARS, max(8, int(on.width / _BAR))))
    plain_axes(ax, theme, text)
    unit, scale = ("s", 1.0) if shown.seconds >= 1 else ("ms", 1e3)
    edges = np.linspace(0, shown.seconds * scale, len(shown.empty) + 1)
    layers = (
        ("empty", shown.empty, theme.waited, "waited, no batch was ready"),
        ("late", shown.late, theme.late, "waited, though one was ready"),
        ("worked", shown.worked, theme.unused, "the loop's own work"),
    )
    handles: list[Patch | Line2D] = []
    floor = np.zeros_like(shown.empty)
    for name, shares, colour, label in layers:
        ax.stairs(
            floor + shares, edges, baseline=floor, fill=True, color=colour, linewidth=0, gid=name
        )
        floor = floor + shares
        if shares.any():
            handles.append(Patch(facecolor=colour, label=label))
    if len(shown.epochs) * 4 < on.width:
        for epoch in shown.epochs:
            ax.axvline(epoch * scale, color=theme.ink, linewidth=0.7, dashes=(3, 2), gid="epoch")
        if shown.epochs:
            handles.append(
                Line2D([], [], color=theme.ink, linewidth=0.7, dashes=(3, 2), label="epoch begins")
            )
    ax.set_xlim(0, edges[-1])
    ax.set_ylim(0, 1)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    ax.set_xlabel(f"time, {unit}")
    ax.set_ylabel("share of the time")
    title = f"The loop waited {duration(stats.waited)} of {duration(stats.elapsed)}"
    title += f" ({100 * stats.waiting:.0f} %)"
    header(on, theme, text, title, _notes(calls, stats, kept), handles)


def _notes(calls: Sequence[Call], stats: LoaderStats, kept: int) -> list[str]:
    waits = [call.waited for call in calls if call.ready is not None] or [calls[0].waited]
    batches = f"{stats.batches:,} {'batch' if stats.batches == 1 else 'batches'}"
    notes = [
        f"{batches}, loaded by {_WAYS[stats.way]}",
        f"waits: median {duration(statistics.median(waits))}, longest {duration(max(waits))}",
    ]
    if len(calls) == kept:
        notes.append(f"shown: the last {kept:,} calls")
    return notes


_WAYS = {
    "gather": "copying rows in C++",
    "spheres": "the spheres",
    "caller": "the loop's own thread",
    "process": "worker processes",
}
