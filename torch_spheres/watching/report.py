"""What a process that `torch_spheres.top` has started, or one that those have, sends to it.

The environment names a Unix socket. Once spheres start, a thread sends a message four times a
second, one for each `KissingSpheres` of this process that runs or has changed. A message is whole,
and one that finds no room is dropped: nobody here ever waits for the display. Of spheres that are
garbage by now a last message says so.
"""

from __future__ import annotations

import atexit
import itertools
import json
import os
import socket
import threading
import weakref
from typing import TYPE_CHECKING

from torch_spheres.watching.readings import Reading

if TYPE_CHECKING:
    from torch_spheres.system import KissingSpheres

__all__ = ["ADDRESS", "LONGEST", "PERIOD", "report", "watched_from_outside"]

ADDRESS = "TORCH_SPHERES_TOP"
"""Name of the environment variable with the socket's path."""
PERIOD = 0.25
"""Seconds from message to message."""
LONGEST = 65_536
"""More bytes than a message has."""

_lock = threading.RLock()  # handlers of signals may start and stop spheres, here too
_reporter: Reporter | None = None


def watched_from_outside() -> bool:
    """Whether `torch_spheres.top` shows this process's spheres."""
    return bool(os.environ.get(ADDRESS))


def report(spheres: KissingSpheres) -> None:
    """These have started or stopped: tells `torch_spheres.top`, if that is who started us."""
    if not watched_from_outside():
        return
    with _lock:
        if _reporter is None:
            _take(Reporter(os.environ[ADDRESS]))
        assert _reporter is not None
        _reporter.tell(spheres)


def _take(made: Reporter) -> None:
    global _reporter
    if _reporter is None:
        _reporter = made
    else:  # while it was made, a signal's handler has made one
        made.close()


class Reporter:
    """The connection, and the thread that sends.   Any thread: tell, close."""

    def __init__(self, path: str) -> None:
        self._lock = threading.RLock()
        self._numbers: weakref.WeakKeyDictionary[KissingSpheres, int] = weakref.WeakKeyDictionary()
        self._next = itertools.count()
        self._spheres: dict[int, weakref.ref[KissingSpheres]] = {}  # by number
        self._sent: dict[int, Reading] = {}  # the last ones
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="spheres report", daemon=True)
        self._socket: socket.socket | None = None  # nor is there one once the display is gone
        try:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._socket.connect(path)
            self._socket.settimeout(0)
            self._thread.start()
        except (OSError, AttributeError, RuntimeError):
            # Whoever set the variable is gone, or cannot be reached from here, where there may be
            # no such sockets, or no more files or threads to have; training goes on.
            self._hang_up()
            return
        atexit.register(self.close)

    def tell(self, spheres: KissingSpheres) -> None:
        """Sends a reading now, and from now on."""
        with self._lock:
            if self._socket is None:
                return
            number = self._numbers.get(spheres)
            if number is None:
                number = self._numbers.setdefault(spheres, next(self._next))
            self._spheres.setdefault(number, weakref.ref(spheres))
            self._send(number, Reading.of(spheres))

    def close(self) -> None:
        """Sends the last figures, and ends the thread."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    def leave(self) -> None:
        """In a forked child: the connection is the parent's."""
        if self._socket is not None:
            self._socket.close()

    def _run(self) -> None:
        while not self._end.wait(PERIOD):
            self._send_news()
        self._send_news()
        self._hang_up()

    def _send_news(self) -> None:
        with self._lock:
            for number, reference in list(self._spheres.items()):
                spheres = reference()
                last = self._sent.get(number)
                if spheres is None:
                    if last is None or self._send(number, None):  # nobody knows of it any more
                        self._spheres.pop(number)
                        self._sent.pop(number, None)
                elif spheres.running or last is None or last.running:
                    self._send(number, Reading.of(spheres))

    def _send(self, number: int, reading: Reading | None) -> bool:
        """Whether it has been sent. No reading: these spheres are gone."""
        if (connection := self._socket) is None:
            return False
        message = {
            "pid": os.getpid(),
            "rank": rank if (rank := os.environ.get("RANK", "")).isdecimal() else None,
            "number": number,
            "reading": None if reading is None else reading.to_json(),
        }
        try:
            connection.send(json.dumps(message, separators=(",", ":")).encode())
        except BlockingIOError:
            return False  # the display is slow or stopped; the next message says it all
        except OSError:
            self._hang_up()  # it is gone
            return False
        if reading is not None:
            self._sent[number] = reading
        return True

    def _hang_up(self) -> None:
        self._end.set()
        connection, self._socket = self._socket, None
        if connection is not None:
            connection.close()


def _after_fork() -> None:
    global _lock, _reporter
    _lock = threading.RLock()
    if _reporter is not None:
        _reporter.leave()
        _reporter = None


os.register_at_fork(after_in_child=_after_fork)
