"""Messages from one rank to another that are under way, and what becomes of them at the end."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import threading
import weakref
from collections.abc import Sequence
from typing import Any

__all__ = ["Swap"]

_AT_ONCE = datetime.timedelta(milliseconds=1)
_PATIENCE = 5.0  # seconds, for a thread whose connection is closed


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


_under_way: weakref.WeakSet[Swap] = weakref.WeakSet()


@atexit.register
def _give_up_all() -> None:
    """After an error: a thread that wants the GIL of an interpreter that is gone ends the process.

    (With SIGABRT, out of torch's code, which lets no thread end there.)
    """
    for swap in list(_under_way):
        swap.give_up()
