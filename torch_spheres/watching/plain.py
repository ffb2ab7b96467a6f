"""Lines for where there is no terminal: one now and then, for a log."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TextIO

from torch_spheres.watching.frame import View, plain_line

__all__ = ["PlainLines"]


class PlainLines:
    """Says when lines are due, and prints them."""

    def __init__(self, file: TextIO, seconds: float) -> None:
        self._file = file
        self._seconds = seconds
        self._next = time.monotonic() + seconds
        self.printed = False

    @property
    def due(self) -> bool:
        """Whether so many seconds have passed since the last lines, or the beginning."""
        return time.monotonic() >= self._next

    def print(self, views: Sequence[View]) -> None:
        """A line for each; the next are due so many seconds from now."""
        self._next = time.monotonic() + self._seconds
        if views:
            self._file.write("".join(f"spheres: {plain_line(view)}\n" for view in views))
            self._file.flush()
            self.printed = True
