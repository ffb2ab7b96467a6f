"""`KissingSpheres.plot`, and what pictures have in common; compared by what they show."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
import time
from dataclasses import replace

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from plots_support import arrow, axes, drawn, found, item, legend, shapes, state, trace, words

import torch_spheres as ts
from torch_spheres.plots.ring_data import RingData
from torch_spheres.plots.rings import percent, sectors
from torch_spheres.plots.theme import THEMES

TOTALS = {1: 1, 2: 13, 3: 157, 4: 1885}


@pytest.fixture(scope="module")
def spheres():
    with ts.KissingSpheres(levels=2, concurrency=3) as made:
        made.map(lambda k: time.sleep(0.001 * (k % 4)), range(100))
        yield made


def stolen_pairs(stats, levels):
    """(thief, victim): items; thieves are leaves here."""
    first = ts.Topology.first(levels - 1)
    return {
        (s.id, first + (s.id - first) // 12 * 12 + group): count
        for s in stats.spheres[first:]
        for group, count in enumerate(s.stolen_from)
        if count
    }


def with_figures(stats, busy=None, steals=None):
    """A snapshot with shares of the time, and items stolen by (thief, group of the victim)."""
    made = []
    for s in stats.spheres:
        share = (busy or {}).get(s.id, 0.0)
        stolen = [0] * 12
        for (thief, group), count in (steals or {}).items():
            if thief == s.id:
                stolen[group] = count
        made.append(
            replace(
                s,
                processing_ns=round(1e9 * share),
                accumulating_ns=0,
                waiting_ns=0,
                ready_ns=0,
                idle_ns=round(1e9 * (1 - share)),
                items_run=100,
                items_stolen=sum(stolen),
                stolen_from=tuple(stolen) if s.stolen_from else (),
            )
        )
    return replace(stats, spheres=tuple(made))


# ---- what it shows ----


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_wedge_for_each_sphere_and_a_chord_for_each_pair_that_stole(levels, theme):
    with ts.KissingSpheres(levels, concurrency=3) as spheres:
        spheres.map(lambda k: time.sleep(0.0001 * (k % 5)), range(400))
        stats = spheres.stats()
        ax = spheres.plot(axes(), stats=stats, theme=theme)
    drawn(ax)
    assert len(shapes(ax, "spheres")) == len(shapes(ax, "states")) == TOTALS[levels]
    (wedges,) = found(ax, "spheres")
    shares = np.array([s.utilization for s in stats.spheres])
    assert np.allclose(wedges.get_array().filled(0), shares)
    assert (wedges.get_array().mask == (shares == 0)).all()
    assert wedges.norm.vmin == 0 and shares.max() <= wedges.norm.vmax <= 1
    pairs = stolen_pairs(stats, levels) if levels > 1 else {}
    assert sum(pairs.values()) == stats.items_stolen  # no thread helped
    assert len(shapes(ax, "steals")) == min(len(pairs), 2000)
    assert words(ax, "title") == ("1 sphere" if levels == 1 else f"{TOTALS[levels]:,} spheres")
    assert words(ax, "items").startswith("400 items")
    states = [text for text in legend(ax) if not text.startswith("never busy")]
    assert sum(int(text.rsplit(" ", 1)[1].replace(",", "")) for text in states) == TOTALS[levels]
    assert f"never busy {(shares == 0).sum():,}" in legend(ax) or (shares > 0).all()
    assert words(ax, "unit") == "busy, %\nof the time"


def test_wedges_lie_as_on_a_clock_and_inside_their_parents():
    for levels in (2, 3, 4):
        all_of_them = sectors(levels)
        assert len(all_of_them) == TOTALS[levels]
        for sphere, (begin, end) in enumerate(all_of_them[1:], 1):
            outer_begin, outer_end = all_of_them[ts.Topology.parent(sphere)]
            assert outer_begin - 1e-9 <= begin < end <= outer_end + 1e-9
        for hour in range(12):
            assert math.isclose(sum(all_of_them[1 + hour]) / 2, hour * math.pi / 6, abs_tol=1e-9)


def test_chords_are_wide_at_the_thief_and_the_wider_the_more(spheres):
    thefts = {(4, 0): 1, (4, 8): 100, (0, 6): 7}
    stats = with_figures(spheres.stats(), steals=thefts)
    ax = spheres.plot(axes(), stats=stats)
    chords = shapes(ax, "steals")
    assert len(chords) == 3  # the least first

    def ends(chord):
        half = len(chord) // 2  # there along one side and back along the other; closed
        begin, end = (chord[0], chord[2 * half - 1]), (chord[half - 1], chord[half])
        return [(np.mean(pair, axis=0), np.linalg.norm(pair[0] - pair[1])) for pair in (begin, end)]

    def at(point):
        """The kissing sphere in whose direction it lies."""
        hour = math.atan2(point[0], point[1]) / (math.pi / 6)
        return 1 + round(hour) % 12

    few, helped, many = map(ends, chords)
    assert (at(few[0][0]), at(few[1][0])) == (4, 1)
    assert (at(many[0][0]), at(many[1][0])) == (4, 9)
    # What the root's helper took goes from the leaf to the middle.
    assert at(helped[1][0]) == 7 and np.linalg.norm(helped[0][0]) < 0.25
    assert many[0][1] > 2 * many[1][1] and many[0][1] > helped[0][1] > few[0][1]
    assert words(ax, "sample") == "stolen: 1 to 100 items, wide at the thief"
    assert words(ax, "items").startswith("1,300 items, 108 stolen (8.3 %)")


def test_chords_pass_over_the_root_unless_they_end_at_it(spheres):
    stats = with_figures(spheres.stats(), steals={(4, 9): 100, (0, 3): 100})
    ax = spheres.plot(axes(), stats=stats)
    (chords,), (wedges,), (rims,) = (found(ax, gid) for gid in ("steals", "spheres", "states"))
    (label,) = found(ax, "label 0")
    assert max(wedges.get_zorder(), rims.get_zorder()) < chords.get_zorder() < label.get_zorder()
    disc = mpl.colors.to_rgba(wedges.to_rgba(wedges.get_array())[0])
    assert label.get_bbox_patch().get_facecolor() == disc  # so that it can be read
    nearest = sorted(min(np.hypot(*chord.T)) for chord in shapes(ax, "steals"))
    root = max(np.hypot(*shapes(ax, "states")[0].T))  # with its rim
    assert nearest[0] < 0.1 < root <= nearest[1] < root + 0.05


def test_what_ran_items_was_not_idle_even_if_its_thread_was(spheres):
    """The root's are run by threads that wait: in its figures, but not in its time."""
    stats = with_figures(spheres.stats(), busy={1: 0.5})
    ran = [replace(s, items_run=7 if s.id < 2 else 0) for s in stats]
    ax = spheres.plot(axes(), stats=replace(stats, spheres=tuple(ran)))
    assert [t.get_text() for t in found(ax, "label")][:3] == ["root\n0 %", "0\n50 %", "1"]
    assert "never busy 11" in legend(ax)
    (wedges,) = found(ax, "spheres")
    assert wedges.get_array().mask.tolist() == [False] * 2 + [True] * 11


def test_helpers_of_larger_hierarchies_are_a_note():
    with ts.KissingSpheres(levels=3) as large:
        large.map(abs, range(10))
        ax = large.plot(axes(), stats=with_figures(large.stats(), steals={(0, 3): 5}))
    assert shapes(ax, "steals") == []
    assert words(ax, "notes") == "5 of the stolen were run by threads that waited"


def test_of_many_pairs_the_heaviest_are_drawn():
    with ts.KissingSpheres(levels=4) as large:
        first = ts.Topology.first(3)
        thefts = {
            (first + 12 * family + thief, (thief + step) % 12): 1 + (family == 5)
            for family in range(144)
            for thief in range(12)
            for step in (1, 2)
        }
        ax = large.plot(axes(), stats=with_figures(large.stats(), steals=thefts))
    drawn(ax)
    assert len(shapes(ax, "steals")) == 2000
    assert words(ax, "notes") == f"the 2,000 heaviest of {144 * 24:,} pairs"


def test_labels_stand_where_there_is_room(spheres):
    def labels(ax):
        renderer = FigureCanvasAgg(ax.figure).get_renderer()
        return {t.get_text(): t.get_window_extent(renderer) for t in found(ax, "label")}

    paths = [ts.Topology.path_string(s) for s in range(13)]
    stats = with_figures(spheres.stats(), busy={1: 1.0, 2: 0.061, 3: 0.00001})
    for inches in (3, 8, 16):
        boxes = labels(spheres.plot(axes(inches), stats=stats))
        assert [text.split("\n")[0] for text in boxes] == paths
        assert [*boxes][1:4] == ["0\n100 %", "1\n6.1 %", "2\n<0.1 %"]
        for one, other in itertools.combinations(boxes.values(), 2):
            assert not one.overlaps(other)
    with ts.KissingSpheres(levels=4) as large:
        counts = [len(labels(large.plot(axes(inches)))) for inches in (2, 8, 16)]
    assert counts == sorted(counts) and counts[0] < 13 <= counts[1] < counts[2] == 157


def test_spheres_that_have_not_run_anything():
    ax = ts.KissingSpheres(levels=2).plot(axes())
    drawn(ax)
    assert (
        words(ax, "items") == "no items run yet; at most 2 of 12 at once" or ts.usable_cores() != 2
    )
    assert legend(ax) == ["not running 13", "never busy 13"]
    assert shapes(ax, "steals") == []


def test_what_each_sphere_does_now(spheres):
    def states():
        return [s.state.name.lower() for s in spheres.stats().spheres]

    end = time.monotonic() + 60
    while True:  # until nobody falls asleep between the two
        names, ax = states(), spheres.plot(axes(), theme="dark")
        if names == states():
            break
        assert time.monotonic() < end
    (rims,) = found(ax, "states")
    expected = [THEMES["dark"].states[name] for name in names]
    assert [mpl.colors.to_hex(c) for c in rims.get_facecolors()] == expected


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
    data = RingData.of_trace(made)
    assert data.busy == tuple({1: 0.5, 3: 0.2}.get(s, 0.0) for s in range(13))
    assert [s for s in range(13) if data.used(s)] == [0, 1, 3]
    assert (data.states[1], data.states[3], data.states[5]) == ("idle", "waiting", "")
    assert data.steals == {(1, 3): 5, (0, 2): 1} and data.items == 6 and data.stolen == 6
    ax = spheres.plot(axes(), trace=made)
    drawn(ax)
    assert len(shapes(ax, "spheres")) == 13 and len(shapes(ax, "states")) == 2
    assert words(ax, "unit") == "busy, %\nof the 10 ms traced"
    assert words(ax, "notes") == "7 events were lost: the oldest are missing"


def test_a_recorded_trace_says_what_the_counters_say():
    with ts.KissingSpheres(levels=2, concurrency=2) as fresh:
        with fresh.trace() as recorded:
            fresh.map(lambda k: time.sleep(0.001 * (k % 3)), range(60))
        of_trace, stats = RingData.of_trace(recorded), fresh.stats()
    of_stats = RingData.of_stats(stats)
    assert of_trace.items == of_stats.items == 60
    assert of_trace.steals == of_stats.steals
    busy = [s.id for s in stats.spheres if s.items_run]
    assert all(of_trace.busy[s] > 0 for s in busy)


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0, "0 %"),
        (1e-9, "<0.1 %"),
        (0.0005, "0.1 %"),
        (0.0994, "9.9 %"),
        (0.0999, "10 %"),
        (1, "100 %"),
    ],
)
def test_shares_are_short(share, text):
    assert percent(share) == text


# ---- where it is drawn ----


def test_the_picture_fits_into_axes_of_other_peoples_figures(spheres):
    figure = Figure(figsize=(10, 5), layout="constrained")
    left, right = figure.subfigures(1, 2)
    ax = left.add_subplot()
    before = mpl.rcParams.copy(), pyplot.get_fignums()
    assert spheres.plot(ax, theme="dark") is ax
    drawn(ax)
    assert (mpl.rcParams.copy(), pyplot.get_fignums()) == before
    assert left.get_facecolor() == mpl.colors.to_rgba(THEMES["dark"].background)
    assert right.get_facecolor() != left.get_facecolor()
    children = len(figure.axes), len(ax.child_axes)
    ax.clear()
    spheres.plot(ax)  # as for a film
    assert (len(figure.axes), len(ax.child_axes)) == children


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
    assert [line.split(" draws with")[0] for line in lines] == [
        "plot()", "plot_timeline()", "plot_loader()",
    ]  # fmt: skip
    assert all('pip install "torch_spheres[plots]"' in line for line in lines)


# ---- mistakes ----


def test_mistakes_are_named(spheres):
    def refuses(error, message, ax=None, **options):
        with pytest.raises(error, match=message):
            spheres.plot(ax, **options)

    refuses(ValueError, "theme must be one of 'light', 'dark', got 'blue'", theme="blue")
    refuses(ValueError, "got None", theme=None)
    refuses(TypeError, "ax must be None or matplotlib Axes, got str", "here")
    refuses(TypeError, r"got Figure; give it figure.add_subplot\(\)", Figure())
    refuses(TypeError, "got ndarray; take one of them", Figure().subplots(2, 2))
    refuses(TypeError, "got 'polar' ones", Figure().add_subplot(projection="polar"))
    refuses(TypeError, "stats must be None or from stats", stats=[1])
    refuses(TypeError, "got a trace; give it as trace=", stats=trace())
    refuses(TypeError, "trace must be what .* gives, got dict", trace={})
    refuses(ValueError, "one of the two", stats=spheres.stats(), trace=trace())
    refuses(ValueError, "of 3 levels, and these spheres have 2", trace=trace(levels=3))
    other = ts.KissingSpheres(levels=3).stats()
    refuses(ValueError, "stats are of 157 spheres, and these are 13", stats=other)
