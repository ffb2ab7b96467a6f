"""`KissingSpheres.live`: a display of what the spheres do while a script runs.

::

    with ts.KissingSpheres(levels=2) as spheres, spheres.live() as live:
        for x, y in loader:
            ...
            live.advance(len(x))

A thread of its own reads the spheres' counters and draws; the loop is not asked for anything.
"""

from __future__ import annotations

import atexit
import io
import math
import os
import threading
import warnings
from collections import deque
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Self, TextIO

from torch_spheres.observe.displays import Show, give_streams_back, open_display
from torch_spheres.observe.readings import Rates, Reading
from torch_spheres.runtime.arguments import as_index, as_number

if TYPE_CHECKING:
    from torch_spheres.spheres import KissingSpheres

__all__ = ["Live"]

_lock = threading.Lock()
_shown: Live | None = None  # there is room for one


class Live:
    """A live display of one `KissingSpheres`; made by `KissingSpheres.live`, used in a ``with``.

    A line for each kissing sphere (from three levels on, with all spheres below it): the share of
    the time in which there was work, of what `concurrency` lets run at once, items run, items that
    wait, items stolen, and the state; then the totals, items and samples per second. Rates are of
    the last second, at the end of the whole time.

    In a terminal what is printed meanwhile comes above it; in a notebook it is a picture below the
    cell; elsewhere it is a line now and then. It ends with the block, when the spheres stop, or
    with the program, whichever is first, and leaves its last figures. On ranks other than 0 it
    shows nothing.
    """

    def __init__(
        self,
        spheres: KissingSpheres,
        refresh_per_second: float,
        file: TextIO | None,
        plain: bool | None,
        plain_seconds: float,
    ) -> None:
        self._spheres = spheres
        self._seconds = 1 / _positive("refresh_per_second", refresh_per_second)
        self._plain_seconds = _positive("plain_seconds", plain_seconds)
        binary = isinstance(file, (io.RawIOBase, io.BufferedIOBase))
        if file is not None and (binary or not callable(getattr(file, "write", None))):
            raise TypeError(f"file must be a text file, such as sys.stderr, or None, got {file!r}")
        if plain is not None and not isinstance(plain, bool):
            raise TypeError(f"plain must be True, False or None, got {plain!r}")
        self._file, self._plain = file, plain
        self._thread: threading.Thread | None = None
        self._begun, self._end = threading.Event(), threading.Event()
        self._error: Exception | None = None

    # ---- what the user tells ----

    def advance(self, samples: int = 1) -> None:
        """So many more samples are done: shown, with samples per second.

        Without this, or `update`, the rows that wrapped loaders of these spheres hand out are
        counted.

        Raises:
            TypeError: `samples` is not an integer.
            ValueError: it is negative.
        """
        self._spheres._samples.advance(as_index("samples", samples, 0))

    def update(self, *, samples: int) -> None:
        """So many samples are done in all. Raises as `advance`."""
        self._spheres._samples.set(as_index("samples", samples, 0))

    # ---- life ----

    @property
    def active(self) -> bool:
        """Whether the figures are refreshed, in this process."""
        return self._thread is not None and self._thread.is_alive()

    def __enter__(self) -> Self:
        global _shown
        if os.environ.get("RANK", "0") != "0":
            return self  # the process of rank 0 has the terminal
        with _lock:
            if _shown is not None:
                raise RuntimeError(
                    f"a live display of {_shown._spheres!r} is shown already, and there is room "
                    "for one: end that one first"
                )
            if self._begun.is_set():
                raise RuntimeError("this live display has ended; call live() for a new one")
            self._thread = threading.Thread(
                target=self._run,
                args=open_display(self._file, self._plain),
                name="spheres live",
                daemon=True,
            )
            self._thread.start()
            _shown = self
        try:
            self._begun.wait()  # what is printed from here on comes above it
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the display, which leaves its last figures; once it has ended, nothing.

        If the terminal or the file was gone before, a RuntimeWarning says so.
        """
        if self._thread is None:
            return  # it never began, or this is a forked child
        self._end.set()
        self._thread.join()
        error, self._error = self._error, None
        if error is not None:
            warnings.warn(f"the live display ended early: {error!r}", RuntimeWarning, stacklevel=3)

    # ---- the thread ----

    def _run(self, display: AbstractContextManager[Show], draws: bool) -> None:
        global _shown
        spheres = self._spheres
        # To tell spheres that have stopped from those that are yet to start (again).
        starts = spheres._starts - spheres.running
        # Rates are of about a second, or of the time from line to line.
        looks = 1 + math.ceil(min(1 / self._seconds, 1000.0)) if draws else 2
        pause = min(self._seconds if draws else self._plain_seconds, threading.TIMEOUT_MAX)
        try:
            first = Reading.of(spheres)
            readings = deque([first], maxlen=looks)
            with display as show:
                if draws:
                    show(Rates(first, first))
                self._begun.set()
                while not self._end.wait(pause):
                    if spheres._starts > starts and not spheres.running:
                        break
                    readings.append(Reading.of(spheres))
                    show(Rates(readings[0], readings[-1]))
                if draws or len(readings) > 1:  # a short run prints no line
                    show(Rates(first, Reading.of(spheres)))
        except (OSError, ValueError) as error:  # a terminal that is gone, a file that is closed
            self._error = error
        finally:
            self._begun.set()
            with _lock:
                _shown = None  # or the spheres would live as long as the module


def _positive(name: str, value: float) -> float:
    number = as_number(name, value)
    if not (number > 0 and math.isfinite(number)):
        raise ValueError(f"{name} must be more than 0, got {value!r}")
    return number


@atexit.register
def _close_shown() -> None:
    if _shown is not None:
        _shown.close()


def _after_fork() -> None:
    global _lock, _shown
    _lock = threading.Lock()
    if _shown is not None:
        _shown._thread = None  # it is the parent's, and so is the display
        give_streams_back()
        _shown = None


os.register_at_fork(after_in_child=_after_fork)
