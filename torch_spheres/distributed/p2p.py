"""Works of torch.distributed that `Transport` has started, and their end with the interpreter."""

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

__all__ = ["P2PWork", "WorkKeeper"]

_AT_ONCE = datetime.timedelta(milliseconds=1)
_PATIENCE = 5.0  # seconds for a thread whose connection is closed
_THREADS = 16  # of a group, at most: gloo has 2 for each network device


class P2PWork:
    """Point-to-point messages that are under way, waited for as torch's ``Work`` is.

    A thread waits for them: torch's own wait has no end, or, given a time, gloo closes the
    connection with it.

    Args:
        works: of ``isend`` and ``irecv``.
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
        """Whether the messages have arrived, or failed."""
        return not self._thread.is_alive()

    def wait(self, time: datetime.timedelta | None = None) -> None:
        """Waits until the messages have arrived.

        Raises:
            RuntimeError: they have failed, or take longer than `time`.
        """
        self._thread.join(None if time is None else time.total_seconds())
        if self._error is not None:
            raise self._error
        if self._thread.is_alive():
            raise RuntimeError("messages between ranks are still on their way")

    def close(self) -> None:
        """Closes the connections of messages that nobody waits for any more, to end the thread."""
        for work in self._works:
            if self._thread.is_alive():
                with contextlib.suppress(RuntimeError):  # that they have not come
                    work.wait(_AT_ONCE)
        self._thread.join(_PATIENCE)


class WorkKeeper:
    """Keeps works of collectives until torch's threads have let them go.

    A thread of torch says that a work is done, and drops it a moment later. If its reference is the
    last, the thread frees the Python tensors of the work, for which it takes the GIL.
    """

    def __init__(self) -> None:
        self._works: deque[Any] = deque()
        _keepers.add(self)

    def keep(self, work: Any) -> Any:
        """Keeps a work, and returns it."""
        self._works.append(work)
        while len(self._works) > _THREADS and self._works[0].is_completed():
            self._works.popleft()
        return work

    def leak(self) -> None:
        """Leaks the works, so that the end of the interpreter does not free them either."""
        for work in self._works:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(work))


_under_way: weakref.WeakSet[P2PWork] = weakref.WeakSet()
_keepers: weakref.WeakSet[WorkKeeper] = weakref.WeakSet()


@atexit.register
def _leave_no_thread_that_wants_the_gil() -> None:
    """A thread that wants the GIL of a finished interpreter aborts the process.

    (Python ends such a thread, which torch's code does not allow: SIGABRT.)
    """
    for work in list(_under_way):
        work.close()
    for keeper in list(_keepers):
        keeper.leak()
