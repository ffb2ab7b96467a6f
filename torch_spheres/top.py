r"""Runs a command and shows, at the bottom of the terminal, all `KissingSpheres` in it.

::

    python -m torch_spheres.top -- python train.py --epochs 3

The command runs as it would alone: its output passes by above the display, it gets Ctrl-C and the
other signals, and its exit code is the exit code (or the signal that ends it ends this). Processes
that it starts are shown too, each with its rank and process id. Where stderr is no terminal, lines
are printed there every few seconds.

(A SIGINT or SIGQUIT that comes while this has the terminal's keyboard is taken for Ctrl-C or
Ctrl-\\, which the command gets from the terminal too, and is not passed on; SIGTERM always is.)
"""

from __future__ import annotations

import argparse
import contextlib
import os
import selectors
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import TextIO

from torch_spheres.live import positive
from torch_spheres.watching.command import Command, Signals, end_like
from torch_spheres.watching.frame import View, screen
from torch_spheres.watching.inbox import Inbox
from torch_spheres.watching.painter import painter
from torch_spheres.watching.plain import PlainLines
from torch_spheres.watching.region import (
    Region,
    is_terminal,
    same_terminal,
    size,
    speaks_unicode,
)
from torch_spheres.watching.report import ADDRESS, watched_from_outside

__all__ = ["main"]

_USAGE_ERROR, _CANNOT_RUN, _NOT_FOUND = 2, 126, 127  # as shells have them


def main(arguments: Sequence[str] | None = None) -> int:
    """What the command line does; returns the exit code of the command.

    128 and a signal's number if that ended it; 127 if the command is not found, 126 if it cannot be
    run; 2, with a text, for arguments that make no sense and when rich is missing.
    """
    code = _run(arguments)
    return code if code >= 0 else 128 - code


def _run(arguments: Sequence[str] | None = None) -> int:
    """As `main`, but minus the number of a signal."""
    parser = _parser()
    given = list(sys.argv[1:] if arguments is None else arguments)
    options, command = _split(parser, given)
    if watched_from_outside():
        parser.error("this runs under torch_spheres.top already, which shows all spheres")
    plain = options.plain or not is_terminal(sys.stderr)
    try:
        face = _Plain(options.plain_seconds) if plain else _Terminal(options.refresh_per_second)
    except ImportError as error:
        parser.error(str(error))
    with Signals() as signals, selectors.DefaultSelector() as selector, Inbox(selector) as inbox:
        try:
            return _Watch(face, inbox, selector, signals).run(command)
        except OSError as error:
            if error.filename is None:
                raise
            print(f"torch_spheres.top: {command[0]}: {error.strerror}", file=sys.stderr)
            return _NOT_FOUND if isinstance(error, FileNotFoundError) else _CANNOT_RUN


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m torch_spheres.top",
        usage="%(prog)s [options] -- COMMAND [ARGUMENT ...]",
        description="Runs COMMAND and shows what the KissingSpheres in it do.",
    )
    parser.add_argument(
        "--refresh-per-second",
        type=float,
        default=4.0,
        metavar="N",
        help="how often the display is drawn (default: 4)",
    )
    parser.add_argument(
        "--plain", action="store_true", help="print lines to stderr, as where it is no terminal"
    )
    parser.add_argument(
        "--plain-seconds",
        type=float,
        default=10.0,
        metavar="S",
        help="seconds from line to line (default: 10)",
    )
    return parser


def _split(
    parser: argparse.ArgumentParser, arguments: list[str]
) -> tuple[argparse.Namespace, list[str]]:
    """Ours, before ``--``, and the command after it."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options, unknown = parser.parse_known_args(arguments[:end])
    command = arguments[end + 1 :]
    if unknown or not command:
        what = f"unrecognized arguments: {' '.join(unknown)}; " if unknown else ""
        parser.error(f"{what}say -- and the command, as in: -- python train.py")
    for name in ("refresh_per_second", "plain_seconds"):
        try:
            positive("--" + name.replace("_", "-"), getattr(options, name))
        except ValueError as error:
            parser.error(str(error))
    return options, command


class _Terminal:
    """The display around which the command's output passes."""

    def __init__(self, refresh_per_second: float) -> None:
        self._paint = painter(sys.stderr, "--plain")
        self._unicode = speaks_unicode(sys.stderr)
        # A file of its own: output that is no UTF-8 has to pass too.
        self._file: TextIO = os.fdopen(
            os.dup(2), "w", encoding="utf-8", errors="surrogateescape", newline=""
        )
        self._region = Region(self._file, self._paint)
        self._gone = False
        self.period = 1 / refresh_per_second
        self.through = [1, 2] if same_terminal(sys.stdout, sys.stderr) else [2]

    @property
    def size(self) -> tuple[int, int]:
        return size(self._file)

    def output(self, text: str) -> None:
        self._do(lambda: self._region.write(text, self._file))

    def show(self, views: Sequence[View]) -> None:
        columns, rows = self.size
        self._do(lambda: self._region.show(screen(views, columns, rows - 2, self._unicode)))

    def step_aside(self) -> None:
        self._do(self._region.erase)

    def close(self, views: Sequence[View]) -> None:
        self.show(views)
        self._do(self._region.close)
        self._do(self._file.close)

    def _do(self, action: Callable[[], None]) -> None:
        # A terminal that was closed ends the display, but not the watch over the command.
        if not self._gone:
            try:
                action()
            except OSError:
                self._gone = True


class _Plain:
    """Lines; the command's output has nothing to do with us."""

    through: Sequence[int] = ()
    size = (80, 24)

    def __init__(self, seconds: float) -> None:
        self._lines = PlainLines(sys.stderr, seconds)
        self.period = min(seconds, 0.25)

    def output(self, text: str) -> None:
        raise AssertionError(f"nothing goes through us, but {text!r} did")

    def show(self, views: Sequence[View]) -> None:
        if self._lines.due:
            self._lines.print([view for view in views if not view.over])

    def step_aside(self) -> None:
        """There is nothing in the way."""

    def close(self, views: Sequence[View]) -> None:
        with contextlib.suppress(OSError):  # nobody reads them any more
            self._lines.print(views)


class _Watch:
    """Runs the command to its end, showing what is in the inbox."""

    def __init__(
        self,
        face: _Terminal | _Plain,
        inbox: Inbox,
        selector: selectors.BaseSelector,
        signals: Signals,
    ) -> None:
        self._face = face
        self._inbox = inbox
        self._selector = selector
        self._signals = signals

    def run(self, arguments: Sequence[str]) -> int:
        face = self._face
        command = Command(
            arguments,
            {**os.environ, ADDRESS: self._inbox.path},
            face.through,
            face.size,
            self._selector,
            face.output,
        )
        self._selector.register(self._signals.read_end, selectors.EVENT_READ, None)
        due = time.monotonic()
        while not command.ended:
            for key, _ in self._selector.select(max(0.0, due - time.monotonic())):
                if key.data is not None:
                    key.data(key.fileobj)
            self._take_signals(command)
            if time.monotonic() >= due:
                face.show(self._inbox.views)
                due = time.monotonic() + face.period
        command.close()
        self._inbox.drain()
        views = self._inbox.views
        for view in views:
            view.rates.settle()
        face.close(views)
        if not views:
            print(
                "torch_spheres.top: no KissingSpheres were started by", *arguments, file=sys.stderr
            )
        return command.exit_code

    def _take_signals(self, command: Command) -> None:
        numbers = self._signals.read()
        command.take(numbers)
        if signal.SIGWINCH in numbers:
            command.resize(self._face.size)
        if signal.SIGTSTP in numbers:  # Ctrl-Z: as the command, which has got it too
            self._face.step_aside()
            os.kill(os.getpid(), signal.SIGSTOP)


if __name__ == "__main__":
    sys.exit(end_like(_run()))
