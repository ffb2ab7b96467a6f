"""Lines at the bottom of a terminal that stay there while other text scrolls by above them.

Every change is one write, in which the cursor is hidden and shown again: whoever ends the process,
and however, the terminal is as it was. Whole lines of other text pass as they are. The region's
first line is empty, or the line of other text that has not ended yet.

Between the writes the cursor stands at the region's beginning, and that is where the next one
begins. So a line that somebody writes past us (a logging handler that was made before, a library in
C, a child process) stays on the screen, above the region, and a terminal that has been resized
meanwhile does no harm.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Sequence
from typing import Any, Protocol, TextIO

from torch_spheres.watching.frame import Line

__all__ = ["Above", "Painter", "Region", "is_terminal", "same_terminal", "size", "speaks_unicode"]

_BEGIN = "\x1b[?25l\x1b[?7l"  # no cursor; no wrapping of lines
_END = "\x1b[?7h\x1b[?25h"
_ROOMY = 8  # rows of a terminal that has one for an empty line
_PAUSE = 0.05  # seconds between drawings that nobody but other text asks for
_LONGEST = 65_536  # characters of a line that does not end; then it is ended here


def is_terminal(file: Any) -> bool:
    """Whether lines can be drawn over there."""
    try:
        return bool(file.isatty()) and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")
    except (AttributeError, ValueError):  # not a file; closed
        return False


def same_terminal(file: Any, other: Any) -> bool:
    """Whether both are the same terminal."""
    try:
        if not (file.isatty() and other.isatty()):
            return False
        return os.fstat(file.fileno()).st_rdev == os.fstat(other.fileno()).st_rdev
    except (AttributeError, OSError, ValueError):
        return False


def size(file: TextIO) -> tuple[int, int]:
    """Columns and rows of the terminal now."""
    with contextlib.suppress(OSError, ValueError):
        columns, rows = os.get_terminal_size(file.fileno())
        if columns > 0 and rows > 0:
            return columns, rows
    return 80, 24


def speaks_unicode(file: Any) -> bool:
    """Whether a bar can be drawn with blocks."""
    try:
        "█·".encode(getattr(file, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


class Painter(Protocol):
    """Turns lines into text with escapes, none wider than the terminal."""

    def __call__(self, lines: Sequence[Line], unfinished: str, width: int) -> list[str]:
        """`unfinished`, a line of other text without its end, comes first; it may be empty."""


class Region:
    """The lines, and the way past them.   Any thread: all of it."""

    def __init__(self, file: TextIO, paint: Painter) -> None:
        self._file = file
        self._paint = paint
        # Reentrant: a signal's handler may print while its thread is in here.
        self._lock = threading.RLock()
        self._lines: Sequence[Line] = ()
        self._there = False  # on the screen
        self._drawn = 0.0
        self._unfinished: dict[int, tuple[TextIO, str]] = {}
        self._closed = False

    def show(self, lines: Sequence[Line]) -> None:
        """Draws these instead of those that are there."""
        with self._lock:
            self._lines = lines
            self._draw()

    def write(self, text: str, file: TextIO) -> None:
        """Writes other text, to a file that ends at the same terminal."""
        with self._lock:
            if self._closed:
                file.write(text)
                return
            _, before = self._unfinished.pop(id(file), (file, ""))
            ended, newline, rest = (before + text).rpartition("\n")
            if len(rest) > _LONGEST:
                ended, newline, rest = before + text, "\n", ""
            if rest:
                # A progress bar writes over itself: what it began with is not seen any more.
                begin = rest.rstrip("\r").rfind("\r")
                self._unfinished[id(file)] = file, rest[max(0, begin) :]
            if not newline:
                return
            self._erase()
            file.write(ended + newline)
            file.flush()
            # Text that comes fast is not held up; the next drawing is a moment away.
            if time.monotonic() - self._drawn >= _PAUSE:
                self._draw()

    def close(self) -> None:
        """Leaves the lines where they are, and the cursor below them."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            unfinished, self._unfinished = self._unfinished, {}
            if self._lines:
                self._draw(last=True)
            for file, text in unfinished.values():
                file.write(text)
                file.flush()

    def erase(self) -> None:
        """Takes the lines away until the next `show`."""
        with self._lock:
            self._erase()

    def leave(self) -> None:
        """In a forked child, whose parent has the terminal: text passes, nothing is drawn."""
        self._lock = threading.RLock()  # the parent's may be held by a thread that is not here
        self._closed = True
        self._unfinished = {}

    def _draw(self, *, last: bool = False) -> None:
        columns, rows = size(self._file)
        unfinished = next(reversed(self._unfinished.values()))[1] if self._unfinished else ""
        lines = self._paint(self._lines, unfinished, columns)
        if not unfinished and rows < _ROOMY:
            lines = lines[1:]
        lines = lines[: max(1, rows - 1)]
        body = "\r\n".join(f"{line}\x1b[K" for line in lines)
        up = f"\x1b[{len(lines) - 1}A" if len(lines) > 1 else ""
        after = "\r\n" if last else f"{up}\r"
        self._there = True
        self._drawn = time.monotonic()
        self._file.write(f"{_BEGIN}\r{body}\x1b[J{after}{_END}")
        self._file.flush()

    def _erase(self) -> None:
        if self._there:
            self._there = False
            self._file.write("\r\x1b[J")
            self._file.flush()


class Above:
    """Stands in for ``sys.stdout`` or ``sys.stderr``: what is written comes above the region."""

    def __init__(self, file: TextIO, region: Region) -> None:
        self._file = file
        self._region = region

    def write(self, text: str) -> int:
        """As the file's own."""
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        self._region.write(text, self._file)
        return len(text)

    def writelines(self, lines: Sequence[str]) -> None:
        """As the file's own."""
        self.write("".join(lines))

    def flush(self) -> None:
        """Whole lines are written at once, others when they end."""
        self._file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
