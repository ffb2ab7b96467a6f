"""What a notebook shows of a `KissingSpheres`: the figures of the live display, as an SVG.

Drawn in the colour of the text around it (``currentColor``), so that it is readable on light and
dark ground; the bars' colour is told from grey by the colour-blind too.
"""

from __future__ import annotations

from xml.sax.saxutils import escape, quoteattr

from torch_spheres.watching.frame import View, heading, rates_line, state_words
from torch_spheres.watching.readings import Rates, Reading

__all__ = ["picture"]

_WIDTH = 620
_ROW = 18
_TOP = 58
# x of each column; figures are set flush right.
_COLUMNS = (("sphere", 8, "start"), ("state", 68, "start"), ("items", 300, "end"))
_MORE = (("stolen", 380, "end"), ("queue", 450, "end"), ("busy", 500, "end"))
_BAR_X, _BAR_WIDTH = 510, 102
_BAR_COLOUR = "#2b8cbe"


def picture(reading: Reading, *, started: bool, forked: bool) -> str:
    """The SVG of one reading, with the share of busy time since `start()`."""
    rates = Rates()
    rates.add(reading)
    words = "of another process" if forked else "" if started else "not started"
    view = View(rates, words=words)
    lines = [_text(8, 18, heading(view), weight="bold")]
    for title, x, anchor in (*_COLUMNS, *_MORE):
        lines.append(_text(x, 38, title, anchor=anchor, opacity=0.6))
    y = _TOP
    for index, subtree in enumerate(reading.subtrees):
        figures = (f"{subtree.items:,}", f"{subtree.stolen:,}", f"{subtree.queued:,}")
        cells = (subtree.path, state_words(subtree), *figures)
        lines += _row(y, cells, rates.busy(index))
        y += _ROW
    lines.append(
        f'<line x1="8" y1="{y - 12}" x2="{_WIDTH - 8}" y2="{y - 12}" '
        'stroke="currentColor" stroke-opacity="0.3"/>'
    )
    y += 4
    figures = (f"{reading.items:,}", f"{reading.stolen:,}", f"{reading.queued:,}")
    lines += _row(y, ("all", f"{reading.working:,} at work", *figures), rates.busy(), "bold")
    if reading.samples is not None:
        y += _ROW
        lines.append(_text(8, y, rates_line(view)))
    height = y + 12
    label = quoteattr(heading(view))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label={label} '
        f'width="{_WIDTH}" height="{height}" viewBox="0 0 {_WIDTH} {height}" '
        'style="max-width:100%;height:auto" fill="currentColor" '
        'font-family="ui-monospace,monospace" font-size="12">'
        f"{''.join(lines)}</svg>"
    )


def _row(y: int, cells: tuple[str, ...], busy: float, weight: str = "") -> list[str]:
    cells = (*cells, f"{busy:.0%}")
    places = (*_COLUMNS, *_MORE)
    lines = [
        _text(x, y, cell, anchor=anchor, weight=weight)
        for cell, (_, x, anchor) in zip(cells, places, strict=True)
    ]
    bar = f'<rect x="{_BAR_X}" y="{y - 9}" height="10" rx="2" '
    lines.append(f'{bar}width="{_BAR_WIDTH}" fill-opacity="0.12"/>')
    if busy > 0:
        lines.append(f'{bar}width="{busy * _BAR_WIDTH:.1f}" fill="{_BAR_COLOUR}"/>')
    return lines


def _text(
    x: int, y: int, text: str, *, anchor: str = "start", weight: str = "", opacity: float = 1.0
) -> str:
    more = f' text-anchor="{anchor}"' if anchor != "start" else ""
    more += f' font-weight="{weight}"' if weight else ""
    more += f' fill-opacity="{opacity}"' if opacity < 1 else ""
    return f'<text x="{x}" y="{y}"{more}>{escape(text)}</text>'
