"""`KissingSpheres.plot`, and what pictures have in common; compared by what they show."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from dataclasses import replace

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure
from plots_support import arrow, axes, drawn, found, item, legend, shapes, state, title, trace

import torch_spheres as ts
from torch_spheres.plots.rings import Activity

TOTALS = {1: 1, 2: 13, 3: 157, 4: 1885}


@pytest.fixture(scope="module")
def spheres():
    with ts.KissingSpheres(levels=2, concurrency=3) as made:
        made.map(lambda k: time.sleep(0.001 * (k % 4)), range(100))
        yield made


def with_steals(stats, steals):
    """A snapshot with items stolen by (thief, group of the victim)."""
    made = []
    for s in stats.spheres:
        stolen = [steals.get((s.id, group), 0) for group in range(12)]
        made.append(replace(s, items_run=100, items_stolen=sum(stolen), stolen_from=tuple(stolen)))
    return replace(stats, spheres=tuple(made))


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_wedge_for_each_sphere_and_a_chord_for_each_pair_that_stole(levels, theme):
    with ts.KissingSpheres(levels, concurrency=3) as spheres:
        spheres.map(lambda k: time.sleep(0.0001 * (k % 5)), range(400))
        stats = spheres.stats()
        ax = spheres.plot(axes(), stats=stats, theme=theme)
    drawn(ax)
    total = TOTALS[levels]
    assert len(shapes(ax, "spheres")) == len(shapes(ax, "states")) == total
    (wedges,) = found(ax, "spheres")
    shares = np.array([s.utilization for s in stats.spheres])
    assert np.allclose(wedges.get_array().filled(0), shares)
    assert (wedges.get_array().mask == (shares == 0)).all()
    assert wedges.norm.vmin == 0 and wedges.norm.vmax == shares.max()
    first = ts.Topology.first(levels - 1)
    pairs = sum(count > 0 for s in stats.spheres[max(1, first) :] for count in s.stolen_from)
    assert len(shapes(ax, "steals")) == min(pairs, 2000)
    assert title(ax)[0].startswith("1 sphere" if levels == 1 else f"{total:,} spheres, at most 3")
    assert title(ax)[1] == f"400 items, {stats.items_stolen} of them stolen"
    figures = {label.rsplit(": ")[0]: label.rsplit(": ")[-1] for label in legend(ax)}
    figures.pop("stolen items, wide at the thief", None)
    unused = int(figures.pop("never busy", "0").replace(",", ""))
    assert unused == (shares == 0).sum()
    assert sum(int(count.replace(",", "")) for count in figures.values()) == total
    labels = {text.get_text().split("\n")[0] for text in found(ax, "label")}
    assert labels == {ts.Topology.path_string(s) for s in range(min(13, total))}


def at(point):
    """The kissing sphere in whose direction it lies; the first is at twelve, as on a clock."""
    return 1 + round(math.atan2(point[0], point[1]) / (math.pi / 6)) % 12


def test_wedges_lie_as_on_a_clock_beside_their_siblings():
    ax = ts.KissingSpheres(levels=3).plot(axes())
    directions = [at(wedge[:-1].mean(axis=0)) for wedge in shapes(ax, "spheres")]
    assert directions[1:13] == list(range(1, 13))
    assert directions[13:] == [ts.Topology.parent(s) for s in range(13, 157)]


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


def test_of_many_pairs_the_heaviest_are_drawn():
    with ts.KissingSpheres(levels=4) as large:
        first = ts.Topology.first(3)
        thefts = {
            (first + 12 * family + thief, (thief + step) % 12): 1 + (family == 5)
            for family in range(144)
            for thief in range(12)
            for step in (1, 2)
        }
        ax = large.plot(axes(), stats=with_steals(large.stats(), thefts))
    drawn(ax)
    assert len(shapes(ax, "steals")) == 2000
    assert title(ax)[2] == f"the 2,000 heaviest of {144 * 24:,} chords"


def test_spheres_that_have_not_run_anything():
    ax = ts.KissingSpheres(levels=2, concurrency=5).plot(axes())
    drawn(ax)
    assert title(ax) == ["13 spheres, at most 5 of 12 leaves at once", "no items run yet"]
    assert legend(ax) == ["not running: 13", "never busy: 13"]
    assert shapes(ax, "steals") == []


def test_a_trace_in_place_of_statistics(spheres):
    made = trace(
        [
            state(1, 0, 5),
            state(1, 5, 10, "idle"),
            state(3, 2, 4, "accumulating"),
            state(3, 4, 10, "waiting"),
            item(1, 0, 5, 2, 3, count=4),
            item(1, 5, 6, 0, 1),
            item(-1, 5, 6, 1, 2),
        ],
        [
            arrow("steal", 3, 1, 0, 0, count=4),
            arrow("steal", 3, 1, 1, 1),
            arrow("steal", 2, -1, 5, 5),
            arrow("work", 0, 1, 0, 1),
        ],
        lost=7,
        threads={-1: "MainThread"},
    )
    shown = Activity.of_trace(made)
    assert shown.busy == [{1: 0.5, 3: 0.2}.get(s, 0.0) for s in range(13)]
    assert (shown.states[1], shown.states[3], shown.states[5]) == ("idle", "waiting", "")
    assert shown.steals == {(1, 3): 5} and shown.items == 6 and shown.stolen == 6
    ax = spheres.plot(axes(), trace=made)
    drawn(ax)
    assert len(shapes(ax, "spheres")) == 13 and len(shapes(ax, "states")) == 2
    assert title(ax)[2:] == [
        "1 stolen by threads that waited, without a chord",
        "7 events were lost: the oldest are missing",
    ]


def test_a_recorded_trace_says_what_the_counters_say():
    with ts.KissingSpheres(levels=2, concurrency=2) as fresh:
        with fresh.trace() as recorded:
            fresh.map(lambda k: time.sleep(0.001 * (k % 3)), range(60))
        of_trace, stats = Activity.of_trace(recorded), fresh.stats()
    of_stats = Activity.of_stats(stats)
    assert of_trace.items == of_stats.items == 60
    assert of_trace.steals == of_stats.steals
    assert all(of_trace.busy[s.id] > 0 for s in stats.spheres if s.items_run)


# ---- where it is drawn ----


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
    spheres.plot(ax)  # as for a film
    assert (len(figure.axes), len(ax.child_axes)) == children


def test_the_theme_is_the_pictures_whatever_matplotlib_is_set_to(spheres):
    with mpl.style.context("dark_background"):
        ax = ts.plot_timeline(trace([state(1, 0, 5)]), axes(), theme="light")
        drawn(ax)
        (label,) = ax.get_yticklabels()
    assert ax.get_facecolor() == ax.figure.get_facecolor() == (1, 1, 1, 1)
    assert mpl.colors.to_rgb(label.get_color()) == (0, 0, 0)


def test_without_axes_it_is_a_new_figure_which_pyplot_knows_if_it_is_there(spheres):
    before = set(pyplot.get_fignums())
    ax = spheres.plot()
    assert set(pyplot.get_fignums()) == before | {ax.figure.number}
    drawn(ax)
    pyplot.close(ax.figure)


WITHOUT_PYPLOT = """
import gc, sys, weakref
import torch_spheres as ts
assert "matplotlib" not in sys.modules
with ts.KissingSpheres() as spheres:
    with spheres.trace() as trace:
        spheres.map(abs, range(100))
    for plot in (spheres.plot, lambda: ts.plot_timeline(trace)):
        figure = plot().figure
        figure.savefig("picture.png")
        assert "matplotlib.pyplot" not in sys.modules
        alive = weakref.ref(figure)
        del figure
        gc.collect()
        assert alive() is None
"""
WITHOUT_MATPLOTLIB = """
import sys
sys.modules["matplotlib"] = None
import torch, torch_spheres as ts
from torch.utils.data import DataLoader, TensorDataset
with ts.KissingSpheres() as spheres:
    with spheres.trace() as trace:
        spheres.map(abs, range(100))
    loader = ts.wrap(DataLoader(TensorDataset(torch.zeros(10, 2))), spheres)
    for _ in loader:
        pass
    for plot in (spheres.plot, lambda: ts.plot_timeline(trace), lambda: ts.plot_loader(loader)):
        try:
            plot()
        except ImportError as error:
            print(error)
"""


def python(script, folder):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_nothing_is_imported_before_its_time_and_nothing_stays(tmp_path):
    python(WITHOUT_PYPLOT, tmp_path)


def test_without_matplotlib_it_is_said_what_to_install(tmp_path):
    lines = python(WITHOUT_MATPLOTLIB, tmp_path).splitlines()
    names = [line.split(" draws with")[0] for line in lines]
    assert names == ["plot()", "plot_timeline()", "plot_loader()"]
    assert all('pip install "torch_spheres[plots]"' in line for line in lines)


def test_mistakes_are_named(spheres):
    def refuses(error, message, ax=None, **options):
        with pytest.raises(error, match=message):
            spheres.plot(ax, **options)

    refuses(ValueError, "theme must be one of 'light', 'dark', got 'blue'", theme="blue")
    refuses(ValueError, "got None", theme=None)
    refuses(ValueError, r"got \['light'\]", theme=["light"])
    refuses(TypeError, "ax must be None or matplotlib Axes .*, got str", "here")
    refuses(TypeError, r"as figure.add_subplot\(\) makes, got Figure", Figure())
    refuses(TypeError, "got ndarray", Figure().subplots(2, 2))
    refuses(TypeError, "got PolarAxes", Figure().add_subplot(projection="polar"))
    refuses(TypeError, "stats must be None or from stats", stats=[1])
    refuses(TypeError, "got Trace", stats=trace())
    refuses(TypeError, "trace must be what .* gives, got dict", trace={})
    refuses(ValueError, "one of the two", stats=spheres.stats(), trace=trace())
    refuses(ValueError, "of 157 spheres, and these are 13", trace=trace(levels=3))
    other = ts.KissingSpheres(levels=3).stats()
    refuses(ValueError, "of 157 spheres, and these are 13", stats=other)
