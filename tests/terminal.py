"""Programs in a pseudo-terminal, and what its screen shows, for tests of the live display."""

from __future__ import annotations

import codecs
import fcntl
import os
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from typing import Any, Self

LIMIT = 90.0  # seconds, for waits that end at once unless something is broken
_TOKEN = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|([^\x1b])", re.DOTALL)


class Screen:
    """What a terminal shows of the text that it got; colours are left out.

    Knows what rich.live uses: newline, carriage return, cursor up, erasing a line, hiding the
    cursor. Anything else is an error.
    """

    def __init__(self, columns: int = 100, text: str = "") -> None:
        self.columns = columns
        self.lines: list[str] = [""]  # those that have scrolled off too
        self.row = self.column = 0
        self.cursor_shown = True
        self._rest = ""
        self.feed(text)

    def feed(self, text: str) -> None:
        text, place = self._rest + text, 0
        while token := _TOKEN.match(text, place):
            numbers, letter, character = token.groups()
            if character:
                self._character(character)
            else:
                self._escape(numbers, letter)
            place = token.end()
        self._rest = text[place:]  # an escape that has not come whole
        assert len(self._rest) < 30, f"unknown escape: {self._rest!r}"

    def _character(self, character: str) -> None:
        if character == "\n" or self.column == self.columns:
            self.row += 1
            self.lines += [""] * (self.row == len(self.lines))
            self.column = 0
        if character == "\r":
            self.column = 0
        elif character != "\n":
            line = self.lines[self.row].ljust(self.column)
            self.lines[self.row] = line[: self.column] + character + line[self.column + 1 :]
            self.column += 1

    def _escape(self, numbers: str, letter: str) -> None:
        if letter == "A":
            self.row = max(0, self.row - int(numbers))
        elif (numbers, letter) == ("2", "K"):
            self.lines[self.row] = ""
        elif numbers == "?25" and letter in "hl":
            self.cursor_shown = letter == "h"
        else:
            assert letter == "m", f"unknown escape: {numbers!r} {letter!r}"

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.lines)


def script(text: str) -> list[str]:
    """The command of a script, on the installed package."""
    silent = "ignore:This process:DeprecationWarning"  # of fork() where there are threads
    return [sys.executable, "-P", "-X", "faulthandler", "-W", silent, "-c", text]


class Program:
    """A script whose output, but for what goes to `streams`, goes to a pseudo-terminal."""

    def __init__(self, text: str, **streams: Any) -> None:
        self.screen = Screen()
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._master, slave = os.openpty()
        size = struct.pack("HHHH", 40, self.screen.columns, 0, 0)
        fcntl.ioctl(slave, termios.TIOCSWINSZ, size)
        left_out = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "RANK")
        inherited = {k: v for k, v in os.environ.items() if k not in left_out}
        self.process = subprocess.Popen(
            script(text),
            env={**inherited, "TERM": "xterm-256color", "PYTHONUTF8": "1"},
            stdin=subprocess.PIPE,
            **{"stdout": slave, "stderr": slave, **streams},
        )
        os.close(slave)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        with self.process:  # closes the pipe and waits
            self.process.kill()
        os.close(self._master)

    def go(self) -> None:
        """Lets the script's ``input()`` return."""
        assert self.process.stdin
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()

    def _read(self) -> bool:
        """Takes what has come; False when nothing ever will."""
        if not select.select([self._master], [], [], 0.05)[0]:
            return True
        try:
            received = os.read(self._master, 65536)
        except OSError:  # EIO: all have closed it
            return False
        self.screen.feed(self._decoder.decode(received))
        return bool(received)

    def until(self, condition: Callable[[Screen], Any]) -> None:
        """Reads until the screen is so."""
        end = time.monotonic() + LIMIT
        while not condition(self.screen):
            assert self._read() or condition(self.screen), f"it ended:\n{self.screen.text}"
            assert time.monotonic() < end, f"waited in vain:\n{self.screen.text}"

    def end(self) -> int:
        """Reads to the end; the exit code, negative for a signal."""
        end = time.monotonic() + LIMIT
        while self._read():
            assert time.monotonic() < end, f"it does not end:\n{self.screen.text}"
        return self.process.wait(LIMIT)
