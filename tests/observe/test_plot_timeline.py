"""`plot_timeline`: bars, numbers and arrows against the trace's slices and arrows."""

from __future__ import annotations

import numpy as np
import pytest
from plots_support import (
    STEP,
    arrow,
    axes,
    drawn,
    found,
    item,
    legend,
    phase,
    shapes,
    state,
    title,
    trace,
)

import torch_spheres as ts


def boxes(ax, gid):
    """(row, begin, end) of bars, in milliseconds."""
    made = [(box[:4, 1].mean(), box[:, 0].min(), box[:, 0].max()) for box in shapes(ax, gid)]
    return sorted((round(y), round(begin, 6), round(end, 6)) for y, begin, end in made)


def rows(ax):
    return [label.get_text() for label in ax.get_yticklabels()]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_bars_and_arrows_are_those_of_the_trace(theme):
    ax = drawn(ts.plot_timeline(STEP, axes(9, 3), theme=theme))
    assert rows(ax) == ["root", "0", "4"]  # 11 was idle
    assert boxes(ax, "processing") == [(1, 0, 4), (2, 1, 3)]
    assert boxes(ax, "accumulating") == [(0, 8, 9)]
    assert boxes(ax, "waiting") == [(2, 3, 6)]
    assert boxes(ax, "forward") == [(1, 0.1, 0.8)]
    assert boxes(ax, "backward") == [(1, 0.8, 1.9)]
    assert boxes(ax, "sum") == [(0, 8, 8.5)]
    assert boxes(ax, "steal") == [(1, 2, 4)]
    numbers = {(t.get_text(), *t.get_position()) for t in found(ax, "number")}
    assert numbers == {("0", 0.45, 1), ("0", 1.35, 1)}  # of the shard, on its phases
    (steal,), (gradient,) = found(ax, "arrow steal"), found(ax, "arrow gradient")
    # To the edge of the bar.
    assert (*steal.xyann, *steal.xy) == pytest.approx((2, 2, 2, 1.39))
    assert (*gradient.xyann, *gradient.xy) == pytest.approx((4, 1, 4.5, 0.39))
    assert not found(ax, "arrow work")
    assert legend(ax) == [
        "running items", "summing gradients", "at a barrier", "forward", "backward",
        "stolen from another sphere", "gradients, to who adds them",
    ]  # fmt: skip
    assert ax.get_xlabel() == "ms since the trace began" and ax.get_xlim() == (0, 10)
    assert title(ax) == ["10 ms of 13 spheres"]


def test_items_without_phases_have_their_numbers():
    items = [item(1, 0, 4, 7, 1), item(1, 4, 10, 8, 1, count=3), item(5, 0, 0.01, 9, 5)]
    ax = ts.plot_timeline(trace([state(1, 0, 10), *items]), axes(9, 3))
    numbers = {(t.get_text(), *t.get_position()) for t in found(ax, "number")}
    assert numbers == {("7", 2, 0), ("8\u2026", 7, 0)}  # no room for the third


def test_a_part_of_it():
    ax = drawn(ts.plot_timeline(STEP, axes(9, 3), begin=5, end=np.float32(9)))
    assert ax.get_xlim() == (5, 9) and rows(ax) == ["root", "4"]
    assert boxes(ax, "waiting") == [(1, 3, 6)] and not found(ax, "arrow steal")
    assert title(ax) == ["4 ms of 13 spheres"]
    assert ts.plot_timeline(STEP, axes(), begin=-3, end=99).get_xlim() == (0, 10)


def test_nothing_is_said_to_be_nothing():
    for empty in (trace(), trace(end=0.0), STEP):
        ax = drawn(ts.plot_timeline(empty, axes(), begin=9.5 if empty is STEP else None))
        assert ax.texts[0].get_text() == "nothing was run" and rows(ax) == []


def test_of_many_spheres_the_busiest_are_shown():
    first = ts.Topology.first(3)
    slices = [state(first + n, 0, 1 + 0.004 * n) for n in range(1728)]
    steals = [arrow("steal", first + n, first + n + 1, 0, 0) for n in range(0, 1728, 12)]
    made = trace(slices, steals, levels=4)
    ax = drawn(ts.plot_timeline(made))
    assert rows(ax) == [ts.Topology.path_string(first + n) for n in range(1728 - 36, 1728)]
    assert len(shapes(ax, "processing")) == 36
    assert title(ax) == [
        "10 ms of 1,885 spheres",
        "the 36 busiest of 1,728 that did anything",
        "144 steals without an arrow",
    ]
    small = ts.plot_timeline(made, axes(4, 2))
    assert 0 < len(rows(small)) < 36 and "busiest of 1,728" in title(small)[1]


def test_of_many_bars_the_longest_are_drawn():
    slices = [state(1, n / 1e5, (n + 1) / 1e5) for n in range(20_000)]
    ax = drawn(ts.plot_timeline(trace([*slices, state(5, 0, 9)]), axes()))
    assert len(shapes(ax, "processing")) == 20_000 and (1, 0, 9) in boxes(ax, "processing")
    assert title(ax)[1] == "the 20,000 longest of 20,001 bars"


def test_who_was_stolen_from_has_a_row_where_an_arrow_begins():
    steals = [arrow("steal", 2 + n % 11, 1, n / 10, n / 10) for n in range(60)]
    ax = drawn(ts.plot_timeline(trace([state(1, 0, 10)], steals), axes(9, 4)))
    assert len(found(ax, "arrow steal")) == 60 and len(rows(ax)) == 12
    ax = ts.plot_timeline(trace([state(1, 0, 10)], steals + steals[:1]), axes(9, 4))
    assert rows(ax) == ["0"] and title(ax)[1] == "61 steals without an arrow"


def test_threads_that_wait_have_rows_too():
    slices = [state(1, 0, 5), phase(-1, 5, 6, "sum", None), item(-1, 5, 5.1, 0, 1)]
    arrows = [arrow("steal", 1, -1, 5, 5), arrow("gradient", 1, -1, 5, 5.2)]
    ax = drawn(ts.plot_timeline(trace(slices, arrows, lost=3), axes()))
    assert rows(ax) == ["MainThread", "0"]
    assert boxes(ax, "sum") == [(0, 5, 6)] and not found(ax, "steal")
    assert len(found(ax, "arrow gradient")) == 1 and not found(ax, "arrow steal")
    lost = "3 events were lost: the oldest are missing"
    assert title(ax)[1:] == ["1 steal without an arrow", lost]


def test_what_is_no_part_of_the_trace():
    nan = float("nan")
    parts = [("1", 2), (True, 2), (4, 3), (10, 11), (None, 0), (-2, -1), (nan, 9), (1, nan)]
    for begin, end in parts:
        with pytest.raises((TypeError, ValueError), match=r"begin must be .*millisecond.*got"):
            ts.plot_timeline(STEP, begin=begin, end=end)
