"""Draws a trace as a Gantt chart, for `plot_timeline`.

Each sphere has a row, with bars for what it did and arrows for what it got.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from torch_spheres._core import Topology
from torch_spheres.observe.plots.theme import COLOURS, LABELS, describe, points
from torch_spheres.observe.table import counted, duration

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from torch_spheres.observe.trace import Arrow, Slice, Trace

__all__ = ["MOST_ROWS", "Timeline", "draw_timeline"]

MOST_ROWS = 36
_MOST_BARS = 20_000
_MOST_ARROWS = 60
_BAR = 0.78  # of a row's height
_BARS = ("processing", "accumulating", "waiting", "forward", "backward", "sum", "load", "steal")
"""States, phases and stolen items, in the order in which they are drawn."""


@dataclass(frozen=True, slots=True)
class Timeline:
    """The part of a trace that is drawn."""

    trace: Trace
    begin: float
    """Milliseconds since the trace began, as all times in the picture."""
    end: float
    rows: dict[int, int]
    """The row of each sphere or other thread, by its id; row 0 is at the top."""
    bars: list[Slice]
    """States other than idle and ready, phases and items, of the spheres that have a row."""
    arrows: list[Arrow]
    """Steals and gradients between the rows; none if there are too many to read."""
    notes: list[str]
    """Lines of the title on what is left out."""

    @staticmethod
    def of(trace: Trace, begin: float, end: float, most_rows: int) -> Timeline:
        """The part between two moments, of the spheres that were busiest in it."""
        first, last = (trace.begin_ns + round(ms * 1e6) for ms in (begin, end))
        bars = [s for s in trace.slices if s.kind == "item" or s.name in _BARS]
        bars = [s for s in bars if s.end_ns > first and s.begin_ns < last]
        arrows = [a for a in trace.arrows if a.kind in ("steal", "gradient")]
        arrows = [a for a in arrows if a.received_ns >= first and a.sent_ns <= last]
        busy: Counter[int] = Counter()
        for s in bars:
            busy[s.sphere] += min(s.end_ns, last) - max(s.begin_ns, first)
        active = len(busy)
        # Other threads steal pieces of a sum while they wait, which take microseconds.
        drawn = [a for a in arrows if a.target >= 0 or a.kind == "gradient"]
        if len(drawn) > _MOST_ARROWS:
            drawn = []
        for arrow in drawn:
            busy.update({arrow.source: 0, arrow.target: 0})
        ranked = sorted(busy, key=lambda sphere: (-busy[sphere], sphere))[:most_rows]
        # Other threads, which wait for the spheres, are at the top, above the root.
        rows = {s: y for y, s in enumerate(sorted(ranked, key=lambda s: (s >= 0, abs(s))))}
        bars = [s for s in bars if s.sphere in rows]
        drawn = [a for a in drawn if a.source in rows and a.target in rows]
        notes = []
        if active > len(rows):
            notes.append(f"the {len(rows)} busiest of {active:,} that did anything")
        if len(bars) > _MOST_BARS:
            notes.append(f"the {_MOST_BARS:,} longest of {len(bars):,} bars")
            bars = sorted(bars, key=lambda s: -s.duration_ns)[:_MOST_BARS]
            bars.sort(key=lambda s: s.begin_ns)
        hidden = Counter(a.kind for a in arrows)
        hidden.subtract(a.kind for a in drawn)
        notes += [f"{counted(n, kind)} without an arrow" for kind, n in hidden.items() if n]
        if trace.lost:
            notes.append(f"{trace.lost:,} events were lost: the oldest are missing")
        return Timeline(trace, begin, end, rows, bars, drawn, notes)

    def ms(self, ns: int) -> float:
        """A moment of the trace, on the axis."""
        return (ns - self.trace.begin_ns) / 1e6


def draw_timeline(ax: Axes, shown: Timeline) -> None:
    """Draws on the axes."""
    from matplotlib import rcParams
    from matplotlib.patches import Patch

    rows, ink, threads = shown.rows, rcParams["text.color"], shown.trace.threads
    names = [Topology.path_string(s) if s >= 0 else threads.get(s, "a thread") for s in rows]
    ax.set(xlim=(shown.begin, shown.end), xlabel="ms since the trace began")
    ax.set(ylim=(max(1, len(rows)) - 0.5, -0.5), yticks=range(len(rows)), yticklabels=names)
    ax.hlines(range(len(rows)), shown.begin, shown.end, "0.5", linewidth=0.3, zorder=0)
    handles = _bars(ax, shown)
    _numbers(ax, shown)
    for arrow in shown.arrows:
        source, target = rows[arrow.source], rows[arrow.target]
        edge = target - math.copysign(
            _BAR / 2, target - source
        )  # of the bar that the arrow leads to
        colour = COLOURS["steal"] if arrow.kind == "steal" else ink
        style = {"arrowstyle": "-|>", "color": colour, "shrinkA": 0, "shrinkB": 0}
        ax.annotate(
            "", (shown.ms(arrow.received_ns), edge), (shown.ms(arrow.sent_ns), source),
            arrowprops=style, annotation_clip=False, zorder=11, gid=f"arrow {arrow.kind}",
        )  # fmt: skip
    if any(arrow.kind == "gradient" for arrow in shown.arrows):
        handles.append(Patch(facecolor=ink, label="gradients, to who adds them"))
    total = Topology(shown.trace.levels).total
    title = f"{duration((shown.end - shown.begin) / 1e3)} of {counted(total, 'sphere')}"
    describe(ax, [title, *shown.notes], handles, below=4.5)
    if not rows:
        ax.text(0.5, 0.5, "nothing was run", ha="center", transform=ax.transAxes)


def _bars(ax: Axes, shown: Timeline) -> list[Any]:
    """Draws states, phases over them, and lines along stolen items; returns legend entries."""
    from matplotlib.patches import Patch

    spans: dict[str, dict[int, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for s in shown.bars:
        stolen = s.sphere >= 0 and s.owner not in (None, s.sphere)
        if s.kind != "item" or stolen:
            row = spans["steal" if s.kind == "item" else s.name][shown.rows[s.sphere]]
            row.append((shown.ms(s.begin_ns), s.duration_ns / 1e6))
    handles = {}
    for depth, name in enumerate(_BARS, 2):
        for y, found in spans[name].items():
            high = (y + 0.3 * _BAR, 0.2 * _BAR) if name == "steal" else (y - _BAR / 2, _BAR)
            # The edge keeps the shortest ones visible.
            ax.broken_barh(found, high, color=COLOURS[name], linewidth=0.4, zorder=depth, gid=name)
            handles[LABELS[name]] = Patch(facecolor=COLOURS[name], label=LABELS[name])
    return list(handles.values())


def _numbers(ax: Axes, shown: Timeline) -> None:
    """Writes the numbers of shards and batches on phases, or else of items, where there is room."""
    from matplotlib import rcParams

    width, height = points(ax)
    size = min(8.0, 0.6 * height / max(1, len(shown.rows)))
    numbered = [s for s in shown.bars if s.item is not None]
    begins, rows = [], []
    for s in [s for s in numbered if s.kind == "phase"] or numbered:
        begin, end = max(shown.begin, shown.ms(s.begin_ns)), min(shown.end, shown.ms(s.end_ns))
        text = f"{s.item}" if s.count == 1 else f"{s.item}\u2026"
        room = (end - begin) * width / (shown.end - shown.begin)
        if room > 0.75 * size * len(text) + 2:
            begins.append(begin)
            rows.append(shown.rows[s.sphere])
            ax.text(
                (begin + end) / 2, rows[-1], text, fontsize=size, ha="center",
                va="center_baseline", color="black", zorder=13, gid="number",
            )  # fmt: skip
    low, high = np.array(rows) - _BAR / 2, np.array(rows) + _BAR / 2
    ax.vlines(begins, low, high, rcParams["axes.facecolor"], linewidth=0.8, zorder=12)
