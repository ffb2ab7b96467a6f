"""A command that is run as if nobody watched it, and whose output can be drawn around.

Output that would go to the terminal goes through a pseudo-terminal instead, so that the command
still sees a terminal; everything else is inherited. The command stays in our process group: the
terminal sends it Ctrl-C, Ctrl-Z and the like as ever. Signals that are sent to us alone are passed
on.
"""

from __future__ import annotations

import codecs
import contextlib
import ctypes
import fcntl
import os
import resource
import selectors
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

__all__ = ["Command", "Signals", "end_like"]

_ALWAYS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_FROM_TERMINAL = (signal.SIGINT, signal.SIGQUIT)  # usually
_OURS = (signal.SIGWINCH, signal.SIGTSTP, signal.SIGCHLD)
_CHUNK = 65_536
_SET_DUMPABLE = 4  # PR_SET_DUMPABLE of prctl(2)


class Signals:
    """Signals become bytes in a pipe, which a selector can wait for; in a ``with`` block.

    Their handlers do nothing else, and the command does not inherit handlers. What is ignored
    (``nohup``) stays ignored, here and in the command.
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._old_wakeup = -1

    def __enter__(self) -> Signals:
        self.read_end, self._write_end = os.pipe()
        os.set_blocking(self.read_end, False)
        os.set_blocking(self._write_end, False)
        self._old_wakeup = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        for number in (*_ALWAYS, *_FROM_TERMINAL, *_OURS):
            if signal.getsignal(number) is not signal.SIG_IGN or number == signal.SIGCHLD:
                self._before[number] = signal.signal(number, _noted)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self._old_wakeup)
        os.close(self.read_end)
        os.close(self._write_end)

    def read(self) -> set[int]:
        """Signals that came since the last call."""
        numbers: set[int] = set()
        with contextlib.suppress(BlockingIOError):
            while received := os.read(self.read_end, 512):
                numbers.update(received)
        return numbers


def _noted(number: int, frame: FrameType | None) -> None:
    """The wakeup pipe has it."""


class Command:
    """The running command.

    Args:
        arguments: the program and its arguments.
        environment: the whole of it.
        through: which of 1 (stdout) and 2 (stderr) go through a pseudo-terminal.
        size: of the pseudo-terminal, columns and rows.
        selector: told of the pseudo-terminal.
        output: called with each piece of text that comes out of there; bytes that are no UTF-8
            are in it as surrogates.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        through: Sequence[int],
        size: tuple[int, int],
        selector: selectors.BaseSelector,
        output: Callable[[str], None],
    ) -> None:
        self._selector = selector
        self._output = output
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape")
        self._master: int | None = None
        if not through:
            self._process = subprocess.Popen(arguments, env=environment)
            return
        master, slave = os.openpty()
        try:
            _leave_newlines_alone(slave)
            self._master = master
            self.resize(size)
            self._process = subprocess.Popen(
                arguments,
                env=environment,
                stdout=slave if 1 in through else None,
                stderr=slave if 2 in through else None,
            )
        except BaseException:
            os.close(master)
            raise
        finally:
            os.close(slave)
        os.set_blocking(master, False)
        selector.register(master, selectors.EVENT_READ, self._read)

    @property
    def ended(self) -> bool:
        """Whether it is over."""
        return self._process.poll() is not None

    @property
    def exit_code(self) -> int:
        """Of a command that is over; minus the signal's number if one ended it."""
        code: int = self._process.returncode
        return code

    def take(self, numbers: set[int]) -> None:
        """Passes on the signals that it has not got anyway."""
        for number in numbers.intersection(_ALWAYS):
            self._process.send_signal(number)
        if not _in_foreground():  # else they are Ctrl-C and the like, which it has got
            for number in numbers.intersection(_FROM_TERMINAL):
                self._process.send_signal(number)

    def resize(self, size: tuple[int, int]) -> None:
        """The terminal has so many columns and rows now."""
        if self._master is not None:
            columns, rows = size
            fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def close(self) -> None:
        """Takes the last output of a command that is over.

        What those write who are left over from it goes nowhere.
        """
        if self._master is not None:
            self._read(self._master)
        if self._master is not None:
            self._hang_up(self._master)

    def _read(self, master: int) -> None:
        # Some of it, so that a command that writes all the time leaves time for the rest. What is
        # left over at its end is far less than 64 pieces.
        for _ in range(64 if self.ended else 1):
            try:
                received = os.read(master, _CHUNK)
            except BlockingIOError:
                return
            except OSError:  # EIO: nobody has the other side any more
                received = b""
            self._output(self._decoder.decode(received, final=not received))
            if not received:
                self._hang_up(master)
                return

    def _hang_up(self, master: int) -> None:
        self._selector.unregister(master)
        os.close(master)
        self._master = None


def end_like(exit_code: int) -> int:
    """Ends this process by the signal that has ended a command, if one has.

    Who started us may ask: a shell's loop ends at Ctrl-C if the command in it died of that, and
    goes on if it only has an exit code.

    Returns:
        The exit code to end with otherwise: 128 and the signal's number if we do not die of it, as
        the first process of a container does not.
    """
    if exit_code >= 0:
        return exit_code
    number = -exit_code
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads them any more
            stream.flush()
    # The command has left its own core; and where cores go to a program, its own report.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, AttributeError):  # a C library without it
        ctypes.CDLL(None).prctl(_SET_DUMPABLE, 0)
    with contextlib.suppress(OSError):  # SIGKILL's cannot be set, nor need be
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    os.kill(os.getpid(), number)
    return 128 + number


def _leave_newlines_alone(terminal: int) -> None:
    attributes = termios.tcgetattr(terminal)
    attributes[1] &= ~termios.OPOST  # the real terminal does that
    termios.tcsetattr(terminal, termios.TCSANOW, attributes)


def _in_foreground() -> bool:
    """Whether the terminal's keys send us signals."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
    except OSError:  # there is none
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)
