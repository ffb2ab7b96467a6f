"""Programs in a pseudo-terminal, and what its screen shows, for tests of displays."""

from __future__ import annotations

import codecs
import fcntl
import os
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

LIMIT = 90.0  # seconds, for waits that end at once unless something is broken
# Not one long sleep: Python does not see a signal that comes just before it until it is over.
FOREVER = "while True: time.sleep(0.01)"
_ESCAPE = re.compile(r"\x1b(?:\[([0-9;?]*)([A-Za-z])|[78=>])")


class Screen:
    """What a terminal shows of the text that it got: lines, the cursor, two modes.

    Knows what the displays use: newline, carriage return, cursor up, erasing, modes; colours are
    left out; anything else is an error.
    """

    def __init__(self, columns: int = 80, rows: int = 24) -> None:
        self.columns, self.rows = columns, rows
        self.lines: list[str] = [""]  # scrolled-off ones too
        self.row = self.column = 0
        self.cursor_shown = self.wraps = True
        self._rest = ""

    def feed(self, text: str) -> None:
        text, self._rest = self._rest + text, ""
        place = 0
        while place < len(text):
            if text[place] == "\x1b":
                escape = _ESCAPE.match(text, place)
                if escape is None:
                    if len(text) - place > 30:
                        raise AssertionError(f"unknown escape: {text[place : place + 30]!r}")
                    self._rest = text[place:]
                    return
                self._escape(escape[1] or "", escape[2] or "")
                place = escape.end()
            else:
                self._character(text[place])
                place += 1

    def _character(self, character: str) -> None:
        if character == "\n":
            self.row += 1
            if self.row == len(self.lines):
                self.lines.append("")
        elif character == "\r":
            self.column = 0
        else:
            if self.column == self.columns:
                if not self.wraps:
                    self.column -= 1
                else:
                    self._character("\n")
                    self.column = 0
            line = self.lines[self.row].ljust(self.column)
            self.lines[self.row] = line[: self.column] + character + line[self.column + 1 :]
            self.column += 1

    def _escape(self, numbers: str, letter: str) -> None:
        if letter == "A":
            self.row = max(0, len(self.lines) - self.rows, self.row - int(numbers or 1))
        elif letter == "K" and numbers in ("", "0"):
            self.lines[self.row] = self.lines[self.row][: self.column]
        elif letter == "J" and numbers in ("", "0"):
            self.lines[self.row] = self.lines[self.row][: self.column]
            del self.lines[self.row + 1 :]
        elif numbers == "?25" and letter in "hl":
            self.cursor_shown = letter == "h"
        elif numbers == "?7" and letter in "hl":
            self.wraps = letter == "h"
        elif letter != "m":
            raise AssertionError(f"unknown escape: {numbers!r} {letter!r}")

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.lines)


def _begin_session(terminal: int) -> None:
    """As a terminal's window does: with nothing ignored, though nohup may have started us."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)


def _keep_output_at_signals(terminal: int) -> None:
    """A key that sends a signal would throw away what the program wrote, and is not read yet."""
    attributes = termios.tcgetattr(terminal)
    attributes[3] |= termios.NOFLSH
    termios.tcsetattr(terminal, termios.TCSANOW, attributes)


class Program:
    """A program whose standard streams, but for those that are given, are a pseudo-terminal."""

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        columns: int = 80,
        rows: int = 24,
        environment: Mapping[str, str] | None = None,
        **streams: Any,
    ) -> None:
        self.screen = Screen(columns, rows)
        self.raw = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.master, slave = os.openpty()
        self._set_size(columns, rows)
        _keep_output_at_signals(slave)
        left_out = ("TORCH_SPHERES_TOP", "COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "RANK")
        inherited = {k: v for k, v in os.environ.items() if k not in left_out}
        self.process = subprocess.Popen(
            arguments,
            env={**inherited, "TERM": "xterm-256color", "PYTHONUTF8": "1", **(environment or {})},
            start_new_session=True,
            preexec_fn=lambda: _begin_session(slave),
            **{"stdin": slave, "stdout": slave, "stderr": slave, **streams},
        )
        os.close(slave)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.master)

    def resize(self, columns: int, rows: int) -> None:
        self.screen.columns, self.screen.rows = columns, rows
        self._set_size(columns, rows)

    def _set_size(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def read(self, seconds: float = 0.05) -> bool:
        """Takes what has come; False when nothing ever will."""
        if not select.select([self.master], [], [], seconds)[0]:
            return True
        try:
            received = os.read(self.master, 65536)
        except OSError:  # EIO: all have closed it
            return False
        text = self._decoder.decode(received)
        self.raw += text
        self.screen.feed(text)
        return bool(received)

    def until(self, condition: Callable[[Screen], Any]) -> Screen:
        """Reads until the screen is so, and nothing is in the middle of being drawn."""
        end = time.monotonic() + LIMIT
        while not (self.screen.cursor_shown and condition(self.screen)):
            open_yet = self.read()
            if self.screen.cursor_shown and condition(self.screen):
                break
            assert open_yet, f"the program ended:\n{self.screen.text}"
            assert time.monotonic() < end, f"waited in vain:\n{self.screen.text}"
        return self.screen

    def end(self) -> int:
        """Reads to the end; the exit code, negative for a signal."""
        end = time.monotonic() + LIMIT
        while self.read():
            assert time.monotonic() < end, f"it does not end:\n{self.screen.text}"
            if self.process.poll() is not None and not select.select([self.master], [], [], 0)[0]:
                break
        return self.process.wait(LIMIT)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)


def script(text: str) -> list[str]:
    """The command of a script, on the installed package."""
    silent = "ignore:This process:DeprecationWarning"  # of fork() where there are threads
    return [sys.executable, "-P", "-X", "faulthandler", "-W", silent, "-c", text]
