"""A Gantt chart of a trace: a row for each sphere, bars for what it did, arrows for what it got."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from torch_spheres._core import Topology
from torch_spheres.plots.theme import Canvas, Theme, header, ink_on, plain_axes

if TYPE_CHECKING:
    from torch_spheres.trace import Arrow, Slice, Trace

__all__ = ["MOST_ROWS", "Timeline", "draw_timeline"]

MOST_ROWS = 36
_MOST_ARROWS = 60
_MOST_NUMBERS = 400
_MOST_BORDERS = 4000
_BAR = 0.78  # of a row's height
_STATES = {
    "processing": "running items",
    "accumulating": "summing gradients",
    "waiting": "at a barrier",
}
_PHASES = {
    "forward": "forward",
    "backward": "backward",
    "sum": "summing gradients",
    "load": "loading a batch",
}


@dataclass(frozen=True, slots=True)
class Timeline:
    """What is drawn of a trace, as plain values. Times are milliseconds since the trace began."""

    begin: float
    end: float
    rows: tuple[int, ...]
    """Ids of spheres, and negative ones of other threads, from top to bottom."""
    active: int
    """How many did anything: there may be no room for all."""
    bars: tuple[Slice, ...]
    """States other than idle and ready, and phases, of the rows."""
    items: tuple[Slice, ...]
    """Of the rows."""
    arrows: tuple[Arrow, ...]
    """Steals and gradients between the rows; none if there are too many to be read."""
    hidden: dict[str, int] = field(default_factory=dict)
    """How many arrows of a kind are left out."""

    @staticmethod
    def of(trace: Trace, begin: float, end: float, most_rows: int) -> Timeline:
        """The part between two moments, of the spheres that were busiest in it."""
        first, last = (trace.begin_ns + round(ms * 1e6) for ms in (begin, end))
        inside = [s for s in trace.slices if s.end_ns > first and s.begin_ns < last]
        bars = [s for s in inside if s.name in (_PHASES if s.kind == "phase" else _STATES)]
        items = [s for s in inside if s.kind == "item"]
        busy: dict[int, int] = defaultdict(int)
        for part in [*bars, *items]:
            busy[part.sphere] += min(part.end_ns, last) - max(part.begin_ns, first)
        arrows = [
            arrow
            for arrow in trace.arrows
            if arrow.kind in ("steal", "gradient")
            and arrow.received_ns >= first
            and arrow.sent_ns <= last
        ]
        active = len(busy)
        # What other threads steal while they wait are pieces of a sum, of some microseconds.
        drawn = [a for a in arrows if a.target >= 0 or a.kind == "gradient"]
        ends = {end for arrow in drawn for end in (arrow.source, arrow.target)} - {*busy}
        if len(drawn) <= _MOST_ARROWS and active + len(ends) <= most_rows:
            busy.update(dict.fromkeys(ends, 0))  # room for who was stolen from, too
        ranked = sorted(busy, key=lambda sphere: (-busy[sphere], sphere))
        # Other threads, which wait for the spheres, on top; then the root and so on.
        rows = tuple(sorted(ranked[:most_rows], key=lambda s: (s >= 0, abs(s))))
        shown = set(rows)
        if len(drawn) > _MOST_ARROWS:
            drawn = []
        kept = [a for a in drawn if a.source in shown and a.target in shown]
        hidden = {}
        for kind in ("steal", "gradient"):
            left_out = sum(a.kind == kind for a in arrows) - sum(a.kind == kind for a in kept)
            if left_out:
                hidden[kind] = left_out
        return Timeline(
            begin=begin,
            end=end,
            rows=rows,
            active=max(active, len(rows)),
            bars=tuple(s for s in bars if s.sphere in shown),
            items=tuple(s for s in items if s.sphere in shown),
            arrows=tuple(kept),
            hidden=hidden,
        )

    def notes(self, lost: int) -> list[str]:
        """What the picture leaves out."""
        notes = []
        if self.active > len(self.rows):
            notes.append(f"the {len(self.rows)} busiest of {self.active:,} that did anything")
        for kind, count in self.hidden.items():
            what = kind if count == 1 else f"{kind}s"
            notes.append(f"{count:,} {what} without an arrow")
        if lost:
            notes.append(f"{lost:,} events were lost: the oldest are missing")
        return notes


def draw_timeline(on: Canvas, trace: Trace, shown: Timeline, theme: Theme) -> None:
    """Draws on the whole of the axes."""
    text = min(10.0, max(5.5, 0.017 * on.width))
    picture = _Chart(on, trace, shown, theme, text)
    picture.axes()
    picture.bars()
    picture.borders()
    picture.stolen()
    picture.numbers()
    picture.arrows()
    picture.words()


class _Chart:
    def __init__(
        self, on: Canvas, trace: Trace, shown: Timeline, theme: Theme, text: float
    ) -> None:
        self._on, self._ax, self._trace, self._theme = on, on.ax, trace, theme
        self._shown, self._text = shown, text
        self._row = {sphere: y for y, sphere in enumerate(shown.rows)}
        self._handles: list[Any] = []

    def axes(self) -> None:
        ax, rows = self._ax, self._shown.rows
        plain_axes(ax, self._theme, self._text)
        ax.set_xlim(self._shown.begin, self._shown.end)
        ax.set_ylim(max(1, len(rows)) - 0.5, -0.5)  # the first on top
        ax.set_yticks(range(len(rows)), [self._name(sphere) for sphere in rows])
        ax.set_xlabel("ms since the trace began")
        for y in range(len(rows)):
            ax.axhline(y, color=self._theme.line, linewidth=0.6, zorder=0)

    def _name(self, sphere: int) -> str:
        if sphere >= 0:
            return str(Topology.path_string(sphere))
        return self._trace.threads.get(sphere, "another thread")

    def _ms(self, ns: int) -> float:
        return (ns - self._trace.begin_ns) / 1e6

    # ---- bars ----

    def bars(self) -> None:
        """States, and phases over them."""
        layers = (("state", _STATES, self._theme.states), ("phase", _PHASES, self._theme.phases))
        for depth, (kind, names, colours) in enumerate(layers):
            for name, label in names.items():
                found = [s for s in self._shown.bars if (s.kind, s.name) == (kind, name)]
                if found:
                    self._boxes(found, colours[name], label, f"{kind} {name}", depth)

    def stolen(self) -> None:
        """A line along the lower edge of what belonged to another sphere."""
        found = [s for s in self._shown.items if s.sphere >= 0 and s.owner not in (None, s.sphere)]
        if found:
            self._boxes(found, self._theme.steal, "stolen item", "stolen", 2, 0.24, 0.5)

    def _boxes(
        self, slices: list[Slice], colour: str, label: str, gid: str, depth: int,
        top: float = -0.5, bottom: float = 0.5,
    ) -> None:  # fmt: skip
        from matplotlib.collections import PolyCollection
        from matplotlib.patches import Patch

        x0 = np.array([self._ms(s.begin_ns) for s in slices])
        x1 = np.array([self._ms(s.end_ns) for s in slices])
        y = np.array([self._row[s.sphere] for s in slices])
        y0, y1 = y + _BAR * top, y + _BAR * bottom
        corners = np.stack(
            [np.stack([x, y], axis=-1) for x, y in ((x0, y0), (x1, y0), (x1, y1), (x0, y1))], axis=1
        )
        # The edge keeps the shortest ones visible.
        boxes = PolyCollection(
            list(corners), facecolors=colour, edgecolors=colour, linewidths=0.4, zorder=2 + depth,
            rasterized=len(slices) > 5000,
        )  # fmt: skip
        boxes.set_gid(gid)
        self._ax.add_collection(boxes, autolim=False)
        if label not in [handle.get_label() for handle in self._handles]:
            self._handles.append(Patch(facecolor=colour, label=label))

    def borders(self) -> None:
        """Between items, which would otherwise be one bar."""
        items = [s for s in self._shown.items if self._points(s) > 3]
        if 0 < len(items) <= _MOST_BORDERS:
            x = [self._ms(s.begin_ns) for s in items]
            y = np.array([self._row[s.sphere] for s in items])
            half = _BAR / 2
            self._ax.vlines(
                x, y - half, y + half, self._theme.background, linewidth=0.8, zorder=5.5,
                gid="borders",
            )  # fmt: skip

    def numbers(self) -> None:
        """Of items, and so of shards, where there is room: on the longest phase of each. Of batches
        that are loaded, theirs.
        """
        phases = defaultdict(list)
        for part in self._shown.bars:
            if part.kind == "phase":
                phases[part.sphere].append(part)
        size = min(self._text * 0.9, 0.6 * self._row_height())
        written = 0
        for item in self._shown.items:
            if size < 4 or written == _MOST_NUMBERS:
                return
            if item.item is None or self._points(item) < size:
                continue
            mine = phases[item.sphere]
            first = bisect_left(mine, item.begin_ns, key=lambda s: s.begin_ns)
            inside = mine[first : bisect_left(mine, item.end_ns, key=lambda s: s.begin_ns)]
            place = max(inside, key=self._points, default=item)
            number = place.item if place.name == "load" else item.item
            words = f"{number}" if item.count == 1 else f"{number}\u2026"
            if self._points(place) < 0.75 * size * len(words) + 2:
                continue
            written += 1
            begin, end = self._clipped(place)
            self._ax.text(
                (begin + end) / 2, self._row[item.sphere], words, fontsize=size, ha="center",
                va="center_baseline", zorder=8, gid="number", color=ink_on(self._colour(place)),
            )  # fmt: skip

    def _clipped(self, part: Slice) -> tuple[float, float]:
        begin, end = self._ms(part.begin_ns), self._ms(part.end_ns)
        return max(begin, self._shown.begin), min(end, self._shown.end)

    def _points(self, part: Slice) -> float:
        """Its width in the picture."""
        begin, end = self._clipped(part)
        return (end - begin) * self._on.width / (self._shown.end - self._shown.begin)

    def _colour(self, part: Slice) -> str:
        if part.kind == "phase":
            return self._theme.phases[part.name]
        return self._theme.states["processing"]

    def _row_height(self) -> float:
        return self._on.height / max(1, len(self._shown.rows))

    # ---- arrows ----

    def arrows(self) -> None:
        from matplotlib.lines import Line2D
        from matplotlib.patches import FancyArrowPatch

        styles = {
            "steal": (self._theme.steal, "steal"),
            "gradient": (self._theme.gradient, "gradients to who adds them"),
        }
        size = min(9.0, 0.7 * self._row_height())
        for kind, (colour, label) in styles.items():
            found = [a for a in self._shown.arrows if a.kind == kind]
            for arrow in found:
                source, target = self._row[arrow.source], self._row[arrow.target]
                # To the edge of the bar that it leads to.
                edge = target - math.copysign(_BAR / 2, target - source)
                self._ax.add_patch(
                    FancyArrowPatch(
                        (self._ms(arrow.sent_ns), source), (self._ms(arrow.received_ns), edge),
                        arrowstyle="-|>", mutation_scale=size, color=colour, linewidth=0.9,
                        shrinkA=0, shrinkB=0, zorder=7, gid=f"arrow {kind}",
                    )
                )  # fmt: skip
            if found:
                self._handles.append(
                    Line2D([], [], color=colour, marker=">", markersize=4, label=label)
                )

    def words(self) -> None:
        trace, shown = self._trace, self._shown
        total = Topology(trace.levels).total
        span = shown.end - shown.begin
        title = f"{span:,.3g} ms of {total:,} {'sphere' if total == 1 else 'spheres'}"
        header(self._on, self._theme, self._text, title, shown.notes(trace.lost), self._handles)
        if not shown.rows:
            self._ax.text(
                (shown.begin + shown.end) / 2, 0, "nothing was run", ha="center", va="center",
                fontsize=self._text * 1.2, color=self._theme.faint, gid="nothing",
            )  # fmt: skip
