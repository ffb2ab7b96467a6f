"""The three kinds of live display: in a terminal, in a notebook, or as lines of a log."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from html import escape
from typing import TYPE_CHECKING, Any, TextIO

from torch_spheres.observe.readings import STATE_STYLES, Rates

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

__all__ = ["Show", "as_html", "open_display", "restore_streams"]

Show = Callable[[Rates], None]
"""Shows new figures in place of, or after, those that were shown before."""

_BAR = 10  # characters
_BAR_COLOUR = "#2b8cbe80"


def open_display(
    file: TextIO | None, plain: bool | None
) -> tuple[AbstractContextManager[Show], bool]:
    """Chooses the display; `file` and `plain` are those of `KissingSpheres.live`.

    Returns:
        The display, a context, and whether new figures replace the old ones (or follow them).
    """
    if file is None and not plain and _in_notebook():
        return _notebook(), True
    file = sys.stderr if file is None else file
    console = None if plain else _console(file, plain)
    return (_lines(file), False) if console is None else (_terminal(console), True)


@contextlib.contextmanager
def _lines(file: TextIO) -> Iterator[Show]:
    """Writes a line each time."""

    def show(rates: Rates) -> None:
        file.write(f"spheres: {rates.line}\n")
        file.flush()

    yield show


# ---- notebooks ----


def _in_notebook() -> bool:
    """Whether this process is an IPython kernel, whose frontend shows HTML."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return getattr(shell, "kernel", None) is not None


@contextlib.contextmanager
def _notebook() -> Iterator[Show]:
    """Shows a table below the cell, which each new one replaces."""
    from IPython.display import display

    handle: Any = None

    def show(rates: Rates) -> None:
        nonlocal handle
        data = {"text/html": as_html(rates), "text/plain": rates.line}
        if handle is None:
            handle = display(data, raw=True, display_id=True)
        else:
            handle.update(data, raw=True)

    yield show


def as_html(rates: Rates) -> str:
    """Returns a table with bars, in the colours of the page around it."""
    names = ("sphere", "state", "items", "stolen", "queue", "busy")
    rows = ["".join(f"<th>{name}</th>" for name in names)]
    for path, state, totals, busy in rates.table:
        cells = (path, state, f"{totals.items:,}", f"{totals.stolen:,}", f"{totals.queued:,}")
        bar = f"linear-gradient(to right, {_BAR_COLOUR} {busy:.0%}, transparent {busy:.0%})"
        rows.append(
            "".join(f"<td>{cell}</td>" for cell in cells)
            + f'<td style="min-width: 8em; background: {bar}">{busy:.0%}</td>'
        )
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return (
        f"<div><b>{escape(rates.now.heading)}</b><table>{body}</table>"
        f"{escape(rates.throughput)}</div>"
    )


# ---- terminals ----


def _console(file: TextIO, plain: bool | None) -> Console | None:
    """The console of a terminal; None if `file` is no terminal."""
    try:
        from rich.console import Console
    except ImportError as error:
        isatty = getattr(file, "isatty", None)
        if plain is None and not (isatty and isatty()):
            return None
        raise ImportError(
            'a live display in a terminal needs rich: pip install ".[live]" in a checkout; '
            "live(plain=True) prints lines without it"
        ) from error
    console = Console(
        file=file,
        force_terminal=True if plain is False else None,
        force_jupyter=False,
        soft_wrap=True,  # leave the program's own output as it is
        markup=False,
        emoji=False,
        highlight=False,
    )
    draws = console.is_terminal and not console.is_dumb_terminal
    return console if draws or plain is False else None


@contextlib.contextmanager
def _terminal(console: Console) -> Iterator[Show]:
    """Shows lines at the bottom, by `rich.live.Live`, with the program's output above them."""
    from rich.live import Live

    live = Live(
        console=console,
        auto_refresh=False,
        redirect_stdout=_same_file(sys.stdout, console.file),
        redirect_stderr=_same_file(sys.stderr, console.file),
    )
    live.start()
    try:
        proxies = {id(_own_stream(proxy)): proxy for proxy in (sys.stdout, sys.stderr)}
        _replace_streams_of_handlers(lambda stream: proxies.get(id(stream), stream))
        # rich hides the cursor, and a program that is killed could not show it again.
        console.show_cursor(show=True)
        yield lambda rates: live.update(_text(rates, console), refresh=True)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()  # or rich would drop an unfinished line
    finally:
        _replace_streams_of_handlers(_own_stream)
        live.stop()


def _text(rates: Rates, console: Console) -> Text:
    """Heading, table and throughput; a narrow terminal shows the first columns.

    Not rich's Table, which takes eight times as long, because each print() draws the text again.
    """
    from rich.text import Text

    full, empty = "#." if console.options.ascii_only else "█·"
    text = Text(no_wrap=True, overflow="crop")
    text.append(f"{rates.now.heading}\n", "bold")
    titles = f"{'sphere':6} {'busy':>5} {'':{_BAR}} {'items':>13} {'queue':>9} {'stolen':>11} state"
    text.append(f"{titles}\n", "dim")
    for path, state, totals, busy in rates.table:
        filled = round(busy * _BAR)
        text.append(f"{path:6} ", "bold")
        text.append(f"{busy:>5.0%} ")
        text.append(full * filled + empty * (_BAR - filled), "green")
        text.append(f" {totals.items:>13,} {totals.queued:>9,} {totals.stolen:>11,} ")
        text.append(f"{state}\n", "" if path == "all" else STATE_STYLES[totals.state])
    return text.append(rates.throughput)


# ---- the program's own output ----


def _same_file(stream: Any, file: Any) -> bool:
    """Whether both are open on the same terminal."""
    try:
        return os.path.sameopenfile(stream.fileno(), file.fileno())
    except (AttributeError, OSError, ValueError):  # no file, or a closed one
        return False


def _own_stream(stream: Any) -> Any:
    """The stream behind rich's proxy."""
    return getattr(stream, "rich_proxied_file", stream)


def _replace_streams_of_handlers(other: Callable[[Any], Any]) -> None:
    """Gives handlers of `logging` other streams: they keep the one they were made with."""
    for logger in (logging.root, *logging.root.manager.loggerDict.values()):
        for handler in getattr(logger, "handlers", ()):
            # Not the attribute: handlers such as logging.lastResort look at sys.stderr each time.
            stream = vars(handler).get("stream")
            if other(stream) is not stream:
                handler.stream = other(stream)


def restore_streams() -> None:
    """Undoes the redirection of a terminal's display in a forked child; the parent keeps it."""
    sys.stdout, sys.stderr = _own_stream(sys.stdout), _own_stream(sys.stderr)
    _replace_streams_of_handlers(_own_stream)
