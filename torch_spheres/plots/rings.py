"""The hierarchy as rings: the root in the middle, a wedge for each sphere, a chord for each steal.

All is drawn in the axes' own coordinates, in which the outermost ring has the radius 1, so that the
picture is the same at every size; text has a least size, and is left out where it does not fit.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from torch_spheres._core import Topology
from torch_spheres.plots.ring_data import KISSING, RingData
from torch_spheres.plots.theme import Canvas, Theme, ink_on

if TYPE_CHECKING:
    from matplotlib.cm import ScalarMappable

__all__ = ["RINGS_SIZE", "draw_rings"]

Points = NDArray[np.float64]

# By levels: inner and outer radius of each ring. The room inside the last is for the chords.
_RINGS = {
    1: [(0.0, 0.6)],
    2: [(0.0, 0.19), (0.66, 0.94)],
    3: [(0.0, 0.13), (0.16, 0.34), (0.64, 0.94)],
    4: [(0.0, 0.10), (0.12, 0.25), (0.27, 0.47), (0.72, 0.94)],
}
_RIM = 0.022  # of the state, outside of the wedge
_PADS = (0.0, 0.014, 0.0025, 0.0)  # radians left free at each side of a sector, by level
RINGS_SIZE = (7.4, 7.6)
"""Inches, of a picture of its own."""
_MOST_CHORDS = 2000
_SMALLEST_TEXT = 4.6  # points

# Where the rest stands, in the same coordinates.
_LEFT, _RIGHT, _TOP, _BOTTOM = -1.12, 1.56, 1.30, -1.46
_BAR_LEFT, _BAR_BOTTOM, _BAR_WIDTH, _BAR_HEIGHT = 1.20, -0.62, 0.06, 1.24


def draw_rings(on: Canvas, data: RingData, theme: Theme) -> None:
    """Draws on the whole of the axes."""
    ax = on.ax
    ax.set_xlim(_LEFT, _RIGHT)
    ax.set_ylim(_BOTTOM, _TOP)
    ax.set_aspect("equal", adjustable="box", anchor="C")
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_visible(False)
    picture = _Rings(on, data, theme)
    picture.chords()
    colours = picture.wedges()
    picture.rims()
    picture.labels(colours)
    picture.bar(colours)
    picture.words()


def sectors(levels: int) -> list[tuple[float, float]]:
    """First and last angle of each sphere, in radians clockwise from the top, by id.

    As on a clock, with the kissing sphere 0 at twelve.
    """
    found = [(-math.pi / KISSING, 2 * math.pi - math.pi / KISSING)]
    for sphere in range(1, Topology(levels).total):
        begin, end = found[Topology.parent(sphere)]
        pad = _PADS[Topology.level(sphere)]
        step = (end - begin) / KISSING
        begin += step * Topology.group(sphere)
        found.append((begin + pad, begin + step - pad))
    return found


class _Rings:
    def __init__(self, on: Canvas, data: RingData, theme: Theme) -> None:
        self._on, self._ax, self._data, self._theme = on, on.ax, data, theme
        self._sectors = sectors(data.levels)
        self._rings = _RINGS[data.levels]
        self._unit = min(on.width / (_RIGHT - _LEFT), on.height / (_TOP - _BOTTOM))  # points
        self._text = min(15.0, max(5.0, 0.056 * self._unit))
        self._most = _nice(max(data.busy, default=0.0))

    # ---- spheres ----

    def wedges(self) -> ScalarMappable:
        from matplotlib.collections import PolyCollection

        unused = [not self._data.used(s) for s in range(len(self._data.busy))]
        values = np.ma.masked_array(np.array(self._data.busy), unused)
        shapes = [self._wedge(s, *self._rings[Topology.level(s)]) for s in range(len(values))]
        # A hair of an edge: neighbours without one would show seams.
        hair = 0.25 if self._data.levels == 4 else 0.0
        wedges = PolyCollection(shapes, edgecolors="face", linewidths=hair, zorder=3)
        wedges.set_array(values)
        wedges.set_cmap(self._theme.colormap())
        wedges.set_clim(0.0, self._most)
        wedges.set_gid("spheres")
        self._ax.add_collection(wedges, autolim=False)
        return wedges

    def rims(self) -> None:
        """What each sphere does now."""
        from matplotlib.collections import PolyCollection

        known = [s for s, state in enumerate(self._data.states) if state]
        shapes = []
        for sphere in known:
            outer = self._rings[Topology.level(sphere)][1]
            shapes.append(self._wedge(sphere, outer + 0.006, outer + 0.006 + _RIM))
        colours = [self._theme.states[self._data.states[s]] for s in known]
        rims = PolyCollection(shapes, facecolors=colours, edgecolors="none", zorder=3)
        rims.set_gid("states")
        self._ax.add_collection(rims, autolim=False)

    def labels(self, colours: ScalarMappable) -> None:
        """Paths, and shares of the time, on the rings where there is room for them."""
        for level in range(self._data.levels):
            spheres = self._data.level(level)
            paths = [Topology.path_string(s) for s in spheres]
            both = [self._with_share(s, path) for s, path in zip(spheres, paths, strict=True)]
            for texts in (both, paths):
                size = self._text_in_ring(level, texts)
                if size >= _SMALLEST_TEXT:
                    for sphere, text in zip(spheres, texts, strict=True):
                        self._label(sphere, text, size, colours)
                    break

    def _with_share(self, sphere: int, path: str) -> str:
        used = self._data.used(sphere)
        return f"{path}\n{percent(self._data.busy[sphere])}" if used else path

    def _slim(self, level: int) -> bool:
        """Whether text has to stand along the radius."""
        inner, outer = self._rings[level]
        return level > 0 and self._width(level, (inner + outer) / 2) < (outer - inner) / 2

    def _width(self, level: int, radius: float) -> float:
        begin, end = self._sectors[Topology.first(level)]
        return radius * (end - begin)

    def _text_in_ring(self, level: int, texts: list[str]) -> float:
        """Points, of the largest text that fits all spheres of a ring."""
        lines = max(text.count("\n") + 1 for text in texts)
        longest = max(len(line) for text in texts for line in text.split("\n"))
        # Letters are some 0.62 of their height wide; digits alone need no room below the line.
        wide, high = 0.62 * longest, (1.25 if lines > 1 else 1.0) * lines
        inner, outer = self._rings[level]
        if level == 0:
            room = min(1.7 * outer / wide, 1.4 * outer / high)
        elif self._slim(level):
            across = 0.88 * self._width(level, (inner + outer) / 2)
            room = min(0.9 * (outer - inner) / wide, across / high)
            if lines > 1:
                return 0.0
        else:
            across = 0.9 * self._width(level, inner + 0.2 * (outer - inner))
            room = min(across / wide, 0.9 * (outer - inner) / high)
        return min(self._text, self._unit * room)

    def _label(self, sphere: int, text: str, size: float, colours: ScalarMappable) -> None:
        level = Topology.level(sphere)
        x = y = turn = 0.0
        if level:
            begin, end = self._sectors[sphere]
            middle, radius = (begin + end) / 2, sum(self._rings[level]) / 2
            x, y = radius * math.sin(middle), radius * math.cos(middle)
            if self._slim(level):
                turn = 90 - math.degrees(middle) + (180 if x < 0 else 0)
        used = self._data.used(sphere)
        wedge = colours.to_rgba(np.array(self._data.busy[sphere])) if used else self._theme.unused
        # Chords pass over the inner rings.
        under = {"facecolor": wedge, "edgecolor": "none", "boxstyle": "round,pad=0.2"}
        self._ax.text(
            x, y, text, ha="center", va="center", rotation=turn, rotation_mode="anchor", zorder=4,
            fontsize=size, linespacing=1.15, gid=f"label {sphere}",
            color=ink_on(wedge) if used else self._theme.faint,
            bbox=under if level < self._data.levels - 1 else None,
        )  # fmt: skip

    def _wedge(self, sphere: int, inner: float, outer: float) -> Points:
        begin, end = self._sectors[sphere]
        points = max(3, math.ceil((end - begin) / 0.02))
        angles = np.linspace(begin, end, points)
        arc = np.column_stack([np.sin(angles), np.cos(angles)])
        return np.concatenate([outer * arc, inner * arc[::-1]])

    # ---- steals ----

    def chords(self) -> None:
        """A chord for each pair that stole; wide at the thief, and the wider the more items."""
        from matplotlib.collections import PolyCollection

        steals = self._data.heaviest_steals(_MOST_CHORDS)
        if not steals:
            return
        most = steals[-1][2]
        leaf = self._rings[-1][0]
        widest = min(0.05, 0.5 * leaf * (2 * math.pi / KISSING ** (self._data.levels - 1)))
        # Thousands of chords are a texture, a few are lines.
        hair = (0.4 if self._data.levels == 4 else 0.8) / self._unit
        faintest = 0.08 if self._data.levels == 4 else 0.45
        shapes, strengths = [], []
        for thief, victim, count in steals:
            share = math.sqrt(count / most)
            width = max(hair, widest * share)
            shapes.append(_ribbon(self._path(thief, victim), width, hair))
            strengths.append(faintest + (0.9 - faintest) * share)
        chords = PolyCollection(
            shapes, facecolors=[(self._theme.steal, alpha) for alpha in strengths],
            edgecolors="none", zorder=3.5,  # over the rings, not to seem to end there
            rasterized=len(shapes) > 500,
        )  # fmt: skip
        chords.set_gid("steals")
        self._ax.add_collection(chords, autolim=False)

    def _path(self, thief: int, victim: int) -> Points:
        """A curve from the thief to the victim, through the room inside the ring."""
        radius = self._rings[-1][0] - 0.012
        if thief == 0:  # the root's helper
            angle = self._end(victim, KISSING / 2)
            inner = self._rings[0][1] + _RIM + 0.006
            return np.linspace(_at(inner, angle), _at(radius, angle), 24)
        groups = Topology.group(thief), Topology.group(victim)
        begin, end = self._end(thief, groups[1]), self._end(victim, groups[0])
        distance = abs(groups[0] - groups[1])
        if self._data.levels == 2:  # siblings all around
            distance = min(distance, KISSING - distance)
            depth = radius * distance / (KISSING / 2)
        else:
            room = radius - (self._rings[-2][1] + _RIM)
            depth = room * (0.3 + 0.9 * distance / (KISSING - 1))
        t = np.linspace(0, 1, 32)[:, None]
        control = _at(radius - depth, begin), _at(radius - depth, end)
        return (
            (1 - t) ** 3 * _at(radius, begin)
            + 3 * (1 - t) ** 2 * t * control[0]
            + 3 * (1 - t) * t**2 * control[1]
            + t**3 * _at(radius, end)
        )

    def _end(self, sphere: int, other: float) -> float:
        """Where a chord ends at a sphere: next to each other, ordered by where they lead."""
        begin, end = self._sectors[sphere]
        if self._data.levels == 2:
            other = (other - Topology.group(sphere)) % KISSING  # clockwise round
            return begin + (end - begin) * (0.9 - 0.8 * (1 - other / KISSING)) if other else begin
        return begin + (end - begin) * (0.1 + 0.8 * other / (KISSING - 1))

    # ---- around ----

    def bar(self, colours: ScalarMappable) -> None:
        """The colour bar, inside of the axes: drawing again replaces it with them."""
        inset = self._ax.inset_axes(
            (_BAR_LEFT, _BAR_BOTTOM, _BAR_WIDTH, _BAR_HEIGHT), transform=self._ax.transData
        )
        bar = self._ax.figure.colorbar(colours, cax=inset)
        ticks = np.linspace(0, self._most, 5 if self._unit > 70 else 3)
        bar.set_ticks(list(ticks), labels=[f"{100 * t:.3g} %" for t in ticks])
        bar.ax.tick_params(labelsize=self._text * 0.9, labelcolor=self._theme.ink, length=0)
        bar.outline.set_visible(False)
        self._ax.text(
            _RIGHT - 0.03, _BAR_BOTTOM + _BAR_HEIGHT + 0.06, f"busy, %\n{self._data.span}",
            fontsize=self._text * 0.9, color=self._theme.ink, ha="right", va="bottom", gid="unit",
        )  # fmt: skip

    def words(self) -> None:
        """What it is, above; what the colours outside the wedges and the chords say, below."""
        data, theme = self._data, self._theme
        leaves = Topology(data.levels).leaves
        total = len(data.busy)
        self._ax.text(
            0, 1.22, f"{total:,} {'sphere' if total == 1 else 'spheres'}",
            fontsize=self._text * 1.3, color=theme.ink, ha="center", va="center", weight="bold",
            gid="title",
        )  # fmt: skip
        turns = "" if leaves == 1 else f"; at most {data.concurrency:,} of {leaves:,} at once"
        self._ax.text(
            0, 1.10, f"{self._items()}{turns}", fontsize=self._text * 0.95, color=theme.faint,
            ha="center", va="center", gid="items",
        )  # fmt: skip
        below = self._legend()
        if data.steals:
            self._chord_sample(below - 0.05)
        notes = self._notes()
        if notes:
            self._ax.text(
                0, below - 0.17, "; ".join(notes), fontsize=self._text * 0.85, color=theme.faint,
                ha="center", va="center", gid="notes",
            )  # fmt: skip

    def _legend(self) -> float:
        """Of the states; returns where it ends."""
        from matplotlib.patches import Patch

        theme = self._theme
        handles = [
            Patch(facecolor=theme.states[state], label=f"{_STATES[state]} {count:,}")
            for state, count in self._data.state_counts(theme.states)
        ]
        if unused := sum(not self._data.used(s) for s in range(len(self._data.busy))):
            handles.append(Patch(facecolor=theme.unused, label=f"never busy {unused:,}"))
        self._ax.legend(
            handles=handles, loc="upper center", bbox_to_anchor=(0, -1.05), frameon=False,
            bbox_transform=self._ax.transData, ncols=3, fontsize=self._text * 0.9,
            labelcolor=theme.ink, handlelength=1.0, handleheight=0.8, columnspacing=1.2,
            borderaxespad=0, labelspacing=0.3, handletextpad=0.5,
        )  # fmt: skip
        return -1.09 - 0.085 * math.ceil(len(handles) / 3)

    def _chord_sample(self, y: float) -> None:
        """What a chord says, beside one."""
        from matplotlib.patches import Polygon

        least, most = min(self._data.steals.values()), max(self._data.steals.values())
        items = f"{most:,} {'item' if most == 1 else 'items'}"
        items = items if least == most else f"{least:,} to {items}"
        text = f"stolen: {items}, wide at the thief"
        wide = 0.55 * 0.9 * self._text / self._unit * len(text)
        left = 0.14 - (wide + 0.18) / 2  # so that it stands more or less in the middle
        path = np.linspace((left - 0.14, y), (left, y), 8)
        sample = _ribbon(path, 0.05, 0.8 / self._unit)
        self._ax.add_patch(Polygon(sample, facecolor=self._theme.steal, edgecolor="none"))
        self._ax.text(
            left + 0.04, y, text, fontsize=self._text * 0.9, color=self._theme.ink, ha="left",
            va="center", gid="sample",
        )  # fmt: skip

    def _notes(self) -> list[str]:
        data, notes = self._data, []
        if len(data.steals) > _MOST_CHORDS:
            notes.append(f"the {_MOST_CHORDS:,} heaviest of {len(data.steals):,} pairs")
        if data.helped:
            notes.append(f"{data.helped:,} of the stolen were run by threads that waited")
        if data.lost:
            notes.append(f"{data.lost:,} events were lost: the oldest are missing")
        return notes

    def _items(self) -> str:
        data = self._data
        if not data.items:
            return "no items run yet"
        text = f"{data.items:,} {'item' if data.items == 1 else 'items'}"
        if not data.stolen:
            return f"{text}, none stolen"
        return f"{text}, {data.stolen:,} stolen ({percent(data.stolen / data.items)})"


_STATES = {
    "processing": "running items",
    "accumulating": "summing gradients",
    "waiting": "at a barrier",
    "ready": "between jobs",
    "idle": "idle",
    "terminating": "not running",
}


def _at(radius: float, angle: float) -> Points:
    return np.array([radius * math.sin(angle), radius * math.cos(angle)])


def _ribbon(path: Points, begin: float, end: float) -> Points:
    """The outline of a curve whose width goes from `begin` to `end`."""
    along = np.gradient(path, axis=0)
    length = np.hypot(*along.T)[:, None]
    across = np.column_stack([-along[:, 1], along[:, 0]]) / np.maximum(length, 1e-12)
    half = np.linspace(begin, end, len(path))[:, None] / 2
    return np.concatenate([path + half * across, (path - half * across)[::-1]])


def _nice(most: float) -> float:
    """The end of a scale that goes to at least `most`, in quarters that are easy to read."""
    if most <= 0:
        return 1.0
    scale = 10.0 ** math.floor(math.log10(most))
    step = next(step for step in (1, 2, 4, 6, 8, 10) if step >= most / scale - 1e-9)
    return min(1.0, scale * step)


def percent(share: float) -> str:
    """Short, with one digit behind the point for small shares."""
    if share < 0.0005:
        return "<0.1 %" if share > 0 else "0 %"
    return f"{100 * share:.{0 if share >= 0.0995 else 1}f} %"
