"""The lines that a display consists of, as text with styles, and the one line where it is plain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch_spheres._core import State
from torch_spheres.watching.readings import Rates, Reading, SubtreeTotals

__all__ = [
    "Line",
    "Span",
    "View",
    "duration",
    "full_frame",
    "heading",
    "plain_line",
    "rates_line",
    "screen",
    "state_words",
]

Span = tuple[str, str]
"""Text, and rich's name of its style ("" for none)."""
Line = list[Span]

_BAR = 10
_STATE_STYLES = {
    State.PROCESSING: "green",
    State.ACCUMULATING: "cyan",
    State.WAITING: "yellow",
    State.READY: "",
    State.IDLE: "dim",
    State.TERMINATING: "dim",
}


@dataclass(frozen=True, slots=True)
class View:
    """One `KissingSpheres` as it is shown."""

    rates: Rates
    name: str = ""
    """Whose they are, where there may be others: ``"rank 3"``, ``"pid 4711"``."""
    ended: bool = False
    """Whether they or their process are gone."""
    words: str = ""
    """What they are, where that cannot be seen from the reading."""

    @property
    def reading(self) -> Reading:
        """The newest."""
        return self.rates.latest

    @property
    def over(self) -> bool:
        """Whether they run no more."""
        return self.ended or not self.reading.running

    @property
    def condition(self) -> str:
        """In a word or two."""
        if self.words or self.ended:
            return self.words or "ended"
        if self.reading.running:
            return "running"
        return "stopped" if self.reading.elapsed_ns else "not started"


def duration(ns: int) -> str:
    """``"0:01:40"``."""
    minutes, seconds = divmod(ns // 1_000_000_000, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def heading(view: View) -> str:
    """Whose, how many, how long."""
    reading = view.reading
    name = f"{view.name}: " if view.name else ""
    time = f" {duration(reading.elapsed_ns)}" if reading.elapsed_ns else ""
    return (
        f"{name}{_count(reading.spheres, 'sphere')}, "
        f"{reading.concurrency:,} of {_count(reading.leaves, 'leaf').replace('leafs', 'leaves')} "
        f"at once, {view.condition}{time}"
    )


def rates_line(view: View) -> str:
    """Items and samples, and how many per second."""
    reading, rates = view.reading, view.rates
    parts = [f"{_count(reading.items, 'item')} ({rates.items:,.0f}/s)"]
    if reading.samples is not None:
        parts.append(f"{_count(reading.samples, 'sample')} ({rates.samples:,.0f}/s)")
    return ", ".join(parts)


def plain_line(view: View) -> str:
    """Everything that matters in one line."""
    reading = view.reading
    return (
        f"{heading(view)}: {rates_line(view)}, {reading.stolen:,} stolen, "
        f"{reading.queued:,} queued, {reading.working:,} at work, {view.rates.busy():.0%} busy"
    )


# ---- the table ----

_NAME, _STATE, _ITEMS, _STOLEN, _QUEUE, _PERCENT, _BARS = range(7)
_TITLES = ("sphere", "state", "items", "stolen", "queue", "busy", "")
_WIDTHS = (6, 17, 13, 11, 9, 5, _BAR)
# The first to go where the terminal is narrow comes first.
_EXPENDABLE = (_BARS, _STOLEN, _STATE, _QUEUE, _ITEMS)


def _columns(width: int) -> list[int]:
    """Those that have room."""
    columns = list(range(len(_TITLES)))
    for column in _EXPENDABLE:
        if sum(_WIDTHS[c] + 1 for c in columns) - 1 <= width:
            break
        columns.remove(column)
    return columns


def _row(columns: Sequence[int], cells: Sequence[str], styles: Sequence[str]) -> Line:
    line: Line = []
    for column in columns:
        left = column in (_NAME, _STATE, _BARS)
        cell, size = cells[column], _WIDTHS[column]
        padding = " " * max(0, size - len(cell))
        text = cell + padding if left else padding + cell
        if line:
            line.append((" ", ""))
        line.append((text, styles[column]))
    return line


def state_words(subtree: SubtreeTotals) -> str:
    """Its most telling state; of several spheres, also how many are in it."""
    state, count = subtree.state
    if state is State.TERMINATING:
        return "stopped"
    return f"{state.name.lower()} {count:,}" if subtree.spheres > 1 else state.name.lower()


def _bar(share: float, unicode: bool) -> str:
    full, empty = ("█", "·") if unicode else ("#", ".")
    filled = round(share * _BAR)
    return full * filled + empty * (_BAR - filled)


def _table(view: View, width: int, unicode: bool) -> list[Line]:
    columns = _columns(width)
    reading, rates = view.reading, view.rates
    lines = [_row(columns, _TITLES, ("dim",) * 7)]
    for index, subtree in enumerate(reading.subtrees):
        busy = rates.busy(index)
        style = _STATE_STYLES[subtree.state[0]]
        figures = (f"{subtree.items:,}", f"{subtree.stolen:,}", f"{subtree.queued:,}")
        cells = (subtree.path, state_words(subtree), *figures, f"{busy:.0%}", _bar(busy, unicode))
        lines.append(_row(columns, cells, ("bold", style, "", "", "", "", "green")))
    busy = rates.busy()
    figures = (f"{reading.items:,}", f"{reading.stolen:,}", f"{reading.queued:,}")
    at_work = f"{reading.working:,} at work"
    cells = ("all", at_work, *figures, f"{busy:.0%}", _bar(busy, unicode))
    lines.append(_row(columns, cells, ("bold", "", "bold", "bold", "bold", "bold", "green")))
    return lines


def full_frame(view: View, width: int, unicode: bool = True) -> list[Line]:
    """A heading, a line per kissing sphere, totals, and what happens per second."""
    return [
        [(heading(view), "bold")],
        *_table(view, width, unicode),
        [(rates_line(view), "")],
    ]


def _full_height(view: View) -> int:
    return len(view.reading.subtrees) + 4


_SHORT_HEIGHT = 2


def _short_frame(view: View) -> list[Line]:
    reading = view.reading
    more = f"{reading.stolen:,} stolen, {reading.queued:,} queued, {view.rates.busy():.0%} busy"
    return [[(heading(view), "bold")], [(f"  {rates_line(view)}, {more}", "")]]


def screen(views: Sequence[View], width: int, height: int, unicode: bool = True) -> list[Line]:
    """The lines for several systems, at most `height` of them: tables while there is room."""
    if not views:
        return []
    shown = sorted(views, key=lambda view: view.over)  # the running ones first
    room = height - _SHORT_HEIGHT * len(shown)
    lines: list[Line] = []  # made of what is shown only: there may be thousands
    if room >= 0:
        for view in shown:
            more = _full_height(view) - _SHORT_HEIGHT
            if more <= room and not (view.over and not shown[0].over):
                lines += full_frame(view, width, unicode)
                room -= more
            else:
                lines += _short_frame(view)
        return lines
    fitting = max(0, height - 1) // _SHORT_HEIGHT
    for view in shown[:fitting]:
        lines += _short_frame(view)
    if len(shown) > 1:
        lines.append([(f"and {len(shown) - fitting:,} more", "dim")])
    return (lines or _short_frame(shown[0]))[: max(1, height)]
