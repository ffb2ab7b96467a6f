"""`KissingSpheres.plot`, and what pictures have in common; compared by what they show."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import time
from dataclasses import replace

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure
from plots_support import ARROWS, SLICES, arrow, axes, drawn, found, legend, shapes, title, trace

import torch_spheres as ts


@pytest.fixture(scope="module")
def spheres():
    with ts.KissingSpheres(levels=2, concurrency=3) as made:
        made.map(lambda k: time.sleep(0.001 * (k % 4)), range(100))
        yield made


def with_steals(stats, steals):
    """A snapshot with items stolen by (thief, group of the victim)."""
    made = []
    for s in stats:
        stolen = tuple(steals.get((s.id, group), 0) for group in range(12))
        made.append(replace(s, items_run=100, items_stolen=sum(stolen), stolen_from=stolen))
    return replace(stats, spheres=tuple(made))


@pytest.mark.parametrize(
    ("levels", "total", "theme"),
    [(1, 1, "light"), (2, 13, "light"), (2, 13, "dark"), (3, 157, "light"), (4, 1885, "dark")],
)
def test_a_wedge_for_each_sphere_and_a_chord_for_each_pair_that_stole(levels, total, theme):
    with ts.KissingSpheres(levels, concurrency=3) as spheres:
        spheres.map(lambda k: time.sleep(0.0001 * (k % 5)), range(400))
        stats = spheres.stats()
        ax = drawn(spheres.plot(axes(), stats=stats, theme=theme))
    assert len(shapes(ax, "spheres")) == len(shapes(ax, "states")) == total
    (wedges,) = found(ax, "spheres")
    shares = np.array([s.utilization for s in stats])
    assert np.allclose(wedges.get_array().filled(0), shares)
    assert (wedges.get_array().mask == (shares == 0)).all()
    assert (wedges.norm.vmin, wedges.norm.vmax) == (0, shares.max())
    pairs = sum(count > 0 for s in stats.spheres[1:] for count in s.stolen_from)
    assert len(shapes(ax, "steals")) == pairs
    assert title(ax)[0].startswith("1 sphere" if levels == 1 else f"{total:,} spheres, at most 3")
    assert title(ax)[1] == f"400 items, {stats.items_stolen} of them stolen"
    idle = (shares == 0).sum()
    said = f"never busy: {idle:,} sphere{'s' if idle > 1 else ''}"
    assert (said in legend(ax)) == (idle > 0)
    for sphere in range(min(13, total)):
        (label,) = found(ax, f"label {sphere}")
        assert label.get_text().split("\n")[0] == ts.Topology.path_string(sphere)


def at(point):
    """The kissing sphere in whose direction it lies; the first is at twelve, as on a clock."""
    return 1 + round(math.atan2(point[0], point[1]) / (math.pi / 6)) % 12


def test_wedges_lie_as_on_a_clock_beside_their_siblings():
    ax = ts.KissingSpheres(levels=3).plot(axes())
    directions = [at(wedge[:-1].mean(axis=0)) for wedge in shapes(ax, "spheres")[1:]]
    assert directions == [*range(1, 13), *map(ts.Topology.parent, range(13, 157))]


def test_chords_are_wide_at_the_thief_and_the_wider_the_more(spheres):
    thefts = {(4, 0): 1, (4, 8): 100, (0, 6): 7}
    ax = spheres.plot(axes(), stats=with_steals(spheres.stats(), thefts))
    few, many = shapes(ax, "steals")  # the least first
    for (left, _, point, _, right, _), victim in ((few, 1), (many, 9)):
        assert at((left + right) / 2) == 4 and at(point) == victim
    wide = [np.linalg.norm(chord[0] - chord[4]) for chord in (few, many)]
    assert wide[1] == pytest.approx(10 * wide[0], rel=0.01)
    # What threads stole while they waited, as the root, is no chord.
    assert title(ax)[1] == "1,300 items, 108 of them stolen"
    assert title(ax)[2] == "7 stolen by threads that waited, without a chord"


def test_title_and_legend_count_the_same_stolen_items(spheres):
    thefts = {(4, 0): 1, (4, 8): 100, (0, 6): 7}
    ax = drawn(spheres.plot(axes(), stats=with_steals(spheres.stats(), thefts)))
    in_title, by_waiting = (
        int(n) for n in re.findall(r"(\d+) (?:of them )?stolen", ax.get_title())
    )
    (said,) = (text for text in legend(ax) if text.startswith("stolen"))
    assert said == "stolen by spheres: 101 items, wide at the thief"
    assert in_title == 101 + by_waiting == 108


def test_of_many_pairs_the_heaviest_are_drawn():
    large, first = ts.KissingSpheres(levels=4), ts.Topology.first(3)
    thefts = {(first + n, (n + step) % 12): 1 + (n == 5) for n in range(1728) for step in (1, 2)}
    ax = drawn(large.plot(axes(), stats=with_steals(large.stats(), thefts)))
    assert len(shapes(ax, "steals")) == 2000
    assert title(ax)[2] == "the 2,000 heaviest of 3,456 chords"


def test_spheres_that_have_not_run_anything():
    before = set(pyplot.get_fignums())
    ax = drawn(ts.KissingSpheres(levels=2, concurrency=5).plot())
    assert set(pyplot.get_fignums()) == before | {ax.figure.number}
    pyplot.close(ax.figure)
    assert title(ax) == ["13 spheres, at most 5 of 12 leaves at once", "no items run yet"]
    assert legend(ax) == ["not running: 13 spheres", "never busy: 13 spheres"]
    assert shapes(ax, "steals") == []


def test_a_trace_in_place_of_statistics(spheres):
    helped = arrow("steal", 2, -1, 5, 5)
    ax = drawn(spheres.plot(axes(), trace=trace(SLICES, [*ARROWS, helped], lost=7)))
    (wedges,) = found(ax, "spheres")
    busy = wedges.get_array().filled(0)
    assert busy == pytest.approx([{0: 0.1, 1: 0.4, 5: 0.2}.get(s, 0.0) for s in range(13)])
    assert len(shapes(ax, "states")) == 4 and len(shapes(ax, "steals")) == 1
    assert legend(ax)[:2] == ["running items: 1 sphere", "summing gradients: 1 sphere"]
    assert title(ax)[1:] == [
        "3 items, 2 of them stolen",
        "1 stolen by threads that waited, without a chord",
        "7 events were lost: the oldest are missing",
    ]


def test_the_picture_fits_into_axes_of_other_peoples_figures(spheres):
    figure = Figure(figsize=(10, 5), layout="constrained")
    left, right = figure.subfigures(1, 2)
    ax = left.add_subplot()
    before = mpl.rcParams.copy(), pyplot.get_fignums()
    assert spheres.plot(ax, theme="dark") is ax
    drawn(ax)
    assert (mpl.rcParams.copy(), pyplot.get_fignums()) == before
    assert left.get_facecolor() == (0, 0, 0, 1) != right.get_facecolor()
    assert mpl.colors.to_rgb(ax.title.get_color()) == (1, 1, 1)
    children = len(figure.axes), len(ax.child_axes)
    ax.clear()
    with mpl.style.context("dark_background"):  # the theme is the picture's all the same
        spheres.plot(ax)
    assert ax.get_facecolor() == left.get_facecolor() == (1, 1, 1, 1)
    assert mpl.colors.to_rgb(ax.title.get_color()) == (0, 0, 0)
    assert (len(figure.axes), len(ax.child_axes)) == children  # as for a film


SCRIPT = """
import sys
import torch, torch_spheres as ts
from torch.utils.data import DataLoader, TensorDataset
assert "matplotlib" not in sys.modules
with ts.KissingSpheres() as spheres:
    with spheres.trace() as trace:
        spheres.map(abs, range(100))
    loader = ts.wrap(DataLoader(TensorDataset(torch.zeros(10, 2))), spheres)
    for _ in loader:
        pass
    plots = spheres.plot, lambda: ts.plot_timeline(trace), lambda: ts.plot_loader(loader)
    sys.modules["matplotlib"] = None  # as if it was not installed
    for plot in plots:
        try:
            plot()
        except ImportError as error:
            print(error)
    del sys.modules["matplotlib"]
    for plot in plots:
        plot().figure.savefig("picture.png")
    assert "matplotlib.pyplot" not in sys.modules
"""


def test_matplotlib_is_imported_when_it_is_needed_and_pyplot_never(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    names = [line.split(" draws with")[0] for line in lines]
    assert names == ["plot()", "plot_timeline()", "plot_loader()"]
    assert all('pip install ".[plots]"' in line for line in lines)


def test_mistakes_are_named(spheres):
    other = ts.KissingSpheres(levels=3).stats()
    mistakes = [
        ({"theme": "blue"}, "theme must be one of 'light', 'dark', got 'blue'"),
        ({"ax": "here"}, "ax must be None or matplotlib Axes .*, got str"),
        ({"ax": Figure()}, r"as figure.add_subplot\(\) makes, got Figure"),
        ({"ax": Figure().add_subplot(projection="polar")}, "got PolarAxes"),
        ({"stats": trace()}, r"stats must be None or from stats\(\), got Trace"),
        ({"trace": {}}, "trace must be what .* gives, got dict"),
        ({"stats": other, "trace": trace()}, "one of the two"),
        ({"stats": other}, "of 157 spheres, and these are 13"),
        ({"trace": trace(levels=3)}, "of 157 spheres, and these are 13"),
    ]
    for arguments, message in mistakes:
        with pytest.raises((TypeError, ValueError), match=message):
            spheres.plot(**arguments)
