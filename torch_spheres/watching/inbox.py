"""Where the reports of watched processes arrive: a Unix socket that only this user can reach."""

from __future__ import annotations

import contextlib
import json
import selectors
import shutil
import socket
import tempfile
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch_spheres.watching.frame import View
from torch_spheres.watching.readings import Rates, Reading
from torch_spheres.watching.report import LONGEST

__all__ = ["Inbox"]

_Key = tuple[int, int]  # a connection's number, and a system's there
_PATH_LIMIT = 100  # the kernel's is 108 bytes
_FORGOTTEN = 64  # of systems that are over only so many are remembered, the last ones


class Inbox:
    """The socket, the connections, and what came over them, as views in the order of arrival.

    Args:
        selector: told of the socket and of each connection, with `receive` as the data.
    """

    def __init__(self, selector: selectors.BaseSelector) -> None:
        self._selector = selector
        self._folder = tempfile.mkdtemp(prefix="spheres-")  # mode 0700
        if len(self._folder.encode()) > _PATH_LIMIT - len("/top"):
            shutil.rmtree(self._folder)
            self._folder = tempfile.mkdtemp(prefix="spheres-", dir="/tmp")
        self.path = str(Path(self._folder) / "top")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.bind(self.path)
        self._socket.listen(128)
        self._socket.settimeout(0)
        self._connections: list[socket.socket] = []
        self._views: dict[_Key, View] = {}
        self._over: dict[_Key, None] = {}  # of those, in the order in which they came to be
        self._numbers: dict[socket.socket, int] = {}
        self._arrived = 0
        selector.register(self._socket, selectors.EVENT_READ, self._accept)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for connection in list(self._numbers):
            self._drop(connection)
        self._selector.unregister(self._socket)
        self._socket.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def views(self) -> list[View]:
        """All systems that were heard of, and are remembered."""
        return list(self._views.values())

    def drain(self) -> None:
        """Takes what has arrived and was not looked at yet."""
        self._accept(self._socket)
        for connection in list(self._numbers):
            self._receive(connection)

    def _accept(self, listening: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                connection, _ = listening.accept()
                connection.settimeout(0)
                self._numbers[connection] = self._arrived
                self._arrived += 1
                self._selector.register(connection, selectors.EVENT_READ, self._receive)

    def _receive(self, connection: socket.socket) -> None:
        try:
            while message := connection.recv(LONGEST):
                self._take(self._numbers[connection], json.loads(message))
        except BlockingIOError:
            return
        except (OSError, ValueError, KeyError, TypeError):
            # It was reset; or what came is no report, as of another version's: no more of that.
            pass
        self._drop(connection)

    def _take(self, connection: int, message: dict[str, Any]) -> None:
        key = connection, int(message["number"])
        if message["reading"] is None:
            self._end(key)
            return
        reading = Reading.from_json(message["reading"])
        if key not in self._views:
            self._views[key] = View(Rates(), name=_name(message))
        self._views[key].rates.add(reading)
        self._remember(key)

    def _end(self, key: _Key) -> None:
        if key in self._views:
            self._views[key].rates.settle()
            self._views[key] = replace(self._views[key], ended=True)
            self._remember(key)

    def _remember(self, key: _Key) -> None:
        if not self._views[key].over:
            self._over.pop(key, None)  # it was started again
            return
        self._over.setdefault(key)
        if len(self._over) > _FORGOTTEN:
            oldest = next(iter(self._over))
            del self._over[oldest], self._views[oldest]

    def _drop(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        connection.close()
        number = self._numbers.pop(connection)
        for key in [key for key in self._views if key[0] == number]:
            self._end(key)


def _name(message: dict[str, Any]) -> str:
    rank, pid, number = message["rank"], int(message["pid"]), int(message["number"])
    name = f"pid {pid}" if rank is None else f"rank {int(rank)}, pid {pid}"
    return name if number == 0 else f"{name}, no. {number + 1}"
