"""Draws the hierarchy as rings, for `KissingSpheres.plot`.

The root is in the middle, each sphere is a wedge, and chords are steals.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from torch_spheres._core import Topology
from torch_spheres.observe.plots.theme import COLOURS, LABELS, describe, points
from torch_spheres.observe.stats import Stats
from torch_spheres.observe.table import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.path import Path

    from torch_spheres.observe.trace import Trace

__all__ = ["Activity", "draw_rings"]

# By number of levels: the inner and outer radius of each ring. The chords are inside the last one.
_RINGS = {
    1: [(0.0, 0.6)],
    2: [(0.0, 0.19), (0.66, 0.95)],
    3: [(0.0, 0.13), (0.16, 0.29), (0.66, 0.95)],
    4: [(0.0, 0.12), (0.15, 0.27), (0.30, 0.44), (0.72, 0.95)],
}
_BORDERS = (2.0, 2.0, 0.8, 0.0)  # points between the wedges of a ring, by level
_BAND = 0.025  # width of the band outside a wedge that shows the state
_MOST_CHORDS = 2000
_STATES = ("processing", "accumulating", "waiting", "ready", "idle", "terminating", "unused")


@dataclass(frozen=True, slots=True)
class Activity:
    """The figures that are drawn; lists are by sphere id."""

    busy: list[float]
    """Busy time as a share of the time, 0 to 1."""
    states: list[str]
    """In lower case; "" if unknown."""
    items: int
    stolen: int
    steals: dict[tuple[int, int], int]
    """Stolen items, by (thief, victim), of leaves. Waiting threads steal too, but have no wedge."""
    lost: int = 0
    """Events that the trace has lost."""

    @staticmethod
    def of_stats(stats: Stats) -> Activity:
        """Figures of a snapshot, or of a difference of two."""
        return Activity(
            busy=[s.utilization for s in stats],
            states=[s.state.name.lower() for s in stats],
            items=stats.items_run,
            stolen=stats.items_stolen,
            steals={
                (s.id, Topology.child(Topology.parent(s.id), group)): count
                for s in stats.spheres[1:]
                for group, count in enumerate(s.stolen_from)
                if count
            },
        )

    @staticmethod
    def of_trace(trace: Trace) -> Activity:
        """Figures of a trace."""
        total = Topology(trace.levels).total
        span = max(1, trace.end_ns - trace.begin_ns)
        busy, states = [0.0] * total, [""] * total
        for part in trace.slices:
            if part.kind == "state" and part.sphere >= 0:
                states[part.sphere] = part.name  # the last one: slices are ordered by time
                if part.name in ("processing", "accumulating"):
                    busy[part.sphere] += part.duration_ns / span
        steals: Counter[tuple[int, int]] = Counter()
        for arrow in trace.arrows:
            if arrow.kind == "steal":
                steals[arrow.target, arrow.source] += arrow.count
        items = sum(part.count for part in trace.slices if part.kind == "item")
        by_leaves = {pair: count for pair, count in steals.items() if pair[0] > 0}
        return Activity(busy, states, items, steals.total(), by_leaves, trace.lost)


def draw_rings(ax: Axes, shown: Activity, levels: int, concurrency: int) -> None:
    """Draws on the axes; the outermost ring has about the radius 1."""
    from matplotlib.patches import Patch

    ax.set(xlim=(-1, 1), ylim=(-1, 1), aspect="equal")
    ax.set_axis_off()
    _wedges(ax, shown, levels)
    _labels(ax, shown, levels)
    counts = Counter(shown.states) + Counter(unused=shown.busy.count(0))
    handles = [
        Patch(
            facecolor=COLOURS[state], label=f"{LABELS[state]}: {counted(counts[state], 'sphere')}"
        )
        for state in _STATES
        if counts[state]
    ]
    if shown.steals:
        _chords(ax, shown, levels)
        stolen = counted(sum(shown.steals.values()), "item")
        label = f"stolen by spheres: {stolen}, wide at the thief"
        handles.append(Patch(facecolor=COLOURS["steal"], label=label))
    describe(ax, _title(shown, Topology(levels).leaves, concurrency), handles, below=0.5)


def _degrees(sphere: int, part: float) -> float:
    """The angle of a point in a sphere's sector, from its begin (`part` 0) to its end (1).

    Sectors are arranged as on a clock, with the kissing sphere 0 at twelve.
    """
    level = Topology.level(sphere)
    place = sphere - Topology.first(level) + part
    return 90 + 15 - 360 * place / Topology.count(level)


def _at(radius: float, degrees: float) -> Any:
    return radius * np.array([math.cos(math.radians(degrees)), math.sin(math.radians(degrees))])


def _wedges(ax: Axes, shown: Activity, levels: int) -> None:
    """Draws a wedge for each sphere by busy time, a band for its state, and the colour bar."""
    from matplotlib import colormaps, rcParams
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Wedge
    from matplotlib.ticker import PercentFormatter

    wedges, bands, borders = [], [], []
    for sphere in range(len(shown.busy)):
        level = Topology.level(sphere)
        inner, outer = _RINGS[levels][level]
        edge, sector = outer + _BAND, (_degrees(sphere, 1), _degrees(sphere, 0))
        wedges.append(Wedge((0, 0), outer, *sector, width=outer - inner))
        borders.append(_BORDERS[level])
        if state := shown.states[sphere]:
            band = Wedge((0, 0), edge, *sector, width=0.8 * _BAND, color=COLOURS[state], lw=0)
            bands.append(band)
    spheres = PatchCollection(
        wedges, linewidths=borders, edgecolors=rcParams["figure.facecolor"], gid="spheres",
        cmap=colormaps[rcParams["image.cmap"]].with_extremes(bad=COLOURS["unused"]),
    )  # fmt: skip
    spheres.set_array(np.ma.masked_equal(shown.busy, 0))
    spheres.set_clim(0, max(shown.busy) or 1)
    ax.add_collection(spheres, autolim=False)
    ax.add_collection(PatchCollection(bands, match_original=True, gid="states"), autolim=False)
    # A child of the axes, so that ax.clear() removes it too.
    inset = ax.inset_axes((1.06, 0.2, 0.03, 0.6))
    bar = ax.figure.colorbar(spheres, cax=inset, format=PercentFormatter(1.0))
    bar.outline.set_visible(False)
    bar.set_label("busy, share of the time", fontsize="small")
    bar.ax.tick_params(labelsize="small", colors=rcParams["text.color"])


def _labels(ax: Axes, shown: Activity, levels: int) -> None:
    """Writes paths and busy times of the root and the kissing spheres."""
    from matplotlib import rcParams

    size = min(10.0, min(points(ax)) * (0.025 if levels < 3 else 0.017))
    for sphere, busy in enumerate(shown.busy[:13]):
        radius = sum(_RINGS[levels][1]) / 2 if sphere else 0.0
        far = busy > max(shown.busy) / 2  # the wedge's colour contrasts with the background
        x, y = _at(radius, _degrees(sphere, 0.5))
        ax.text(
            x, y, Topology.path_string(sphere) + (f"\n{busy:.0%}" if busy else ""),
            fontsize=size, ha="center", va="center", gid=f"label {sphere}", zorder=4,
            color=rcParams["figure.facecolor" if far else "text.color"],
        )  # fmt: skip


def _chords(ax: Axes, shown: Activity, levels: int) -> None:
    """Draws a chord for each thief and victim, wide at the thief and wider for more items."""
    from matplotlib.collections import PathCollection

    # The heaviest are drawn last, over the others.
    heaviest = sorted(shown.steals.items(), key=lambda pair: pair[1])[-_MOST_CHORDS:]
    shares = {pair: math.sqrt(count / heaviest[-1][1]) for pair, count in heaviest}
    chords = PathCollection(
        [_chord(*pair, share, levels) for pair, share in shares.items()],
        color=COLOURS["steal"], alpha=0.6, linewidths=0.5 if levels < 4 else 0.2, gid="steals",
        zorder=3,
    )  # fmt: skip
    ax.add_collection(chords, autolim=False)


def _chord(thief: int, victim: int, share: float, levels: int) -> Path:
    """The outline of a chord: two curves from a base at the thief to a point at the victim."""
    from matplotlib.path import Path

    radius = _RINGS[levels][-1][0]
    room = radius - _RINGS[levels][-2][1] - _BAND
    # A sphere's chords are in the order of its siblings, so that they do not cross.
    away = (Topology.group(victim) - Topology.group(thief)) % 12
    base = 0.95 - 0.9 * away / 12
    left, right = (_at(radius, _degrees(thief, base + side * share / 6)) for side in (-1, 1))
    point = _at(radius, _degrees(victim, 0.05 + 0.9 * away / 12))
    distance = abs(Topology.group(victim) - Topology.group(thief))
    if levels == 2:  # siblings all around
        distance = min(distance, 12 - distance)
    control = (1 - room / radius * distance / 6) * (left + right + 2 * point) / 4
    codes = [Path.MOVETO, Path.CURVE3, Path.CURVE3, Path.CURVE3, Path.CURVE3, Path.CLOSEPOLY]
    return Path([left, control, point, control, right, left], codes)


def _title(shown: Activity, leaves: int, concurrency: int) -> list[str]:
    """Lines on what is shown, and what is left out."""
    turns = f"{len(shown.busy):,} spheres, at most {concurrency:,} of {leaves:,} leaves at once"
    items = f"{counted(shown.items, 'item')}, {shown.stolen:,} of them stolen"
    lines = [turns if leaves > 1 else "1 sphere", items if shown.items else "no items run yet"]
    if len(shown.steals) > _MOST_CHORDS:
        lines.append(f"the {_MOST_CHORDS:,} heaviest of {len(shown.steals):,} chords")
    if by_waiting := shown.stolen - sum(shown.steals.values()):
        lines.append(f"{by_waiting:,} stolen by threads that waited, without a chord")
    if shown.lost:
        lines.append(f"{shown.lost:,} events were lost: the oldest are missing")
    return lines
