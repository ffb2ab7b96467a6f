"""Messages from one rank to another that are under way, and what becomes of them at the end."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import datetime
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

__all__ = ["Swap", "Works"]

_AT_ONCE = datetime.timedelta(milliseconds=1)
_PATIENCE = 5.0  # seconds, for a thread whose connection is closed
_THREADS = 16  # of a group, at most: gloo has 2 for each network device


class Swap:
    """Messages from one rank to another, waited for as torch's other work is.

    Torch can wait for these without an end only: given a time, gloo ends the connection with it.
    So a thread waits for them.
    """

    def __init__(self, works: Sequence[Any]) -> None:
        self._works = works
        self._error: RuntimeError | None = None
        self._thread = threading.Thread(target=self._run, name="rank messages", daemon=True)
        _under_way.add(self)
        self._thread.start()

    def _run(self) -> None:
        try:
            for work in self._works:
                work.wait()
        except RuntimeError as error:
            self._error = error

    def is_completed(self) -> bool:
        """Whether they have arrived, or failed."""
        return not self._thread.is_alive()

    def wait(self, time: datetime.timedelta | None = None) -> None:
        """Until they have arrived.

        Raises:
            RuntimeError: they have failed, or take longer than `time`.
        """
        self._thread.join(None if time is None else time.total_seconds())
        if self._error is not None:
            raise self._error
        if self._thread.is_alive():
            raise RuntimeError("messages between ranks are still on their way")

    def give_up(self) -> None:
        """Ends the connection of messages that nobody waits for any more, and so the thread."""
        for work in self._works:
            if self._thread.is_alive():
                with contextlib.suppress(RuntimeError):  # that they have not come
                    work.wait(_AT_ONCE)
        self._thread.join(_PATIENCE)


class Works:
    """Collective operations of torch's, each held until the thread that does it has let it go.

    That thread says that the work is done, and lets it go a moment later. If it is the last one to
    do so, it also frees what Python made, the tensors, for which it takes the GIL.
    """

    def __init__(self) -> None:
        self._works: deque[Any] = deque()
        _held.add(self)

    def hold(self, work: Any) -> Any:
        """That work."""
        self._works.append(work)
        while len(self._works) > _THREADS and self._works[0].is_completed():
            self._works.popleft()
        return work

    def hold_for_ever(self) -> None:
        """So that the end of the interpreter does not free them either."""
        for work in self._works:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(work))


_under_way: weakref.WeakSet[Swap] = weakref.WeakSet()
_held: weakref.WeakSet[Works] = weakref.WeakSet()


@atexit.register
def _leave_no_thread_that_wants_the_gil() -> None:
    """A thread that wants the GIL of an interpreter that is gone ends the process.

    (With SIGABRT, out of torch's code, which lets no thread end there.)
    """
    for swap in list(_under_way):
        swap.give_up()
    for works in list(_held):
        works.hold_for_ever()
