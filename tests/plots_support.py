"""What the tests of pictures ask of them, and traces made by hand."""

from __future__ import annotations

from matplotlib.figure import Figure

import torch_spheres as ts


def axes(inches=7.0, height=None):
    """Axes of a figure that pyplot does not know."""
    return Figure(figsize=(inches, height or inches), layout="constrained").add_subplot()


def found(ax, gid):
    """The artists of a picture that have this id."""
    return [artist for artist in ax.findobj(include_self=False) if artist.get_gid() == gid]


def shapes(ax, gid):
    """The outlines of collections."""
    return [path.vertices for made in found(ax, gid) for path in made.get_paths()]


def title(ax):
    """Its lines."""
    return ax.get_title().split("\n")


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def drawn(ax):
    """Has it drawn for good: nothing sticks out of the figure."""
    figure = ax.get_figure(root=True)
    figure.draw_without_rendering()
    box = ax.get_tightbbox()
    assert min(box.x0, box.y0) > -1
    assert box.x1 < figure.bbox.x1 + 1 and box.y1 < figure.bbox.y1 + 1
    return ax


def ms(*times):
    """Nanoseconds on a trace's clock."""
    return [10**12 + round(1e6 * t) for t in times]


def state(sphere, begin, end, name="processing"):
    return ts.Slice(sphere, *ms(begin, end), "state", name)


def item(sphere, begin, end, number, owner, count=1):
    return ts.Slice(sphere, *ms(begin, end), "item", "item", number, owner, count)


def phase(sphere, begin, end, name, shard):
    return ts.Slice(sphere, *ms(begin, end), "phase", name, shard)


def arrow(kind, source, target, sent, received, count=1):
    return ts.Arrow(kind, source, target, *ms(sent, received), count)


def trace(slices=(), arrows=(), *, levels=2, end=10.0, lost=0):
    begin_ns, end_ns = ms(0, end)
    return ts.Trace(
        levels=levels, concurrency=2, begin_ns=begin_ns, end_ns=end_ns, slices=slices,
        arrows=arrows, lost=lost, threads={-1: "MainThread"},
    )  # fmt: skip


SLICES = [
    state(0, 0, 8, "idle"),
    state(1, 0, 4),
    item(1, 0, 2, 0, 1),
    state(12, 0, 10, "idle"),
    phase(1, 0.1, 0.8, "forward", 0),
    phase(1, 0.8, 1.9, "backward", 0),
    state(5, 1, 3),
    item(5, 1, 3, 16, 5),
    item(1, 2, 4, 4, 5),
    state(5, 3, 6, "waiting"),
    state(0, 8, 9, "accumulating"),
    phase(0, 8, 8.5, "sum", None),
]
ARROWS = [
    arrow("work", 0, 1, 0, 0),
    arrow("steal", 5, 1, 2, 2),
    arrow("gradient", 1, 0, 4, 4.5),
]
STEP = trace(SLICES, ARROWS)
"""Of a step of training: sphere 0 adds what spheres 1 and 5 did; 1 stole an item from 5."""
