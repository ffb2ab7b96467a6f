"""`KissingSpheres.live`: a display of what the spheres do while a script runs.

::

    with ts.KissingSpheres(levels=2) as spheres, spheres.live() as live:
        for x, y in loader:
            ...
            live.advance(len(x))

A thread of its own reads the spheres' counters and draws; the loop need not do anything.
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

from torch_spheres.observe.displays import Show, open_display, restore_streams
from torch_spheres.observe.readings import Rates, Reading
from torch_spheres.runtime.arguments import as_index, as_number

if TYPE_CHECKING:
    from torch_spheres.spheres import KissingSpheres

__all__ = ["Live"]

_lock = threading.Lock()
_shown: Live | None = None  # the one display of this process


class Live:
    """A live display of one `KissingSpheres`; made by `KissingSpheres.live`, used in a ``with``.

    It has a line for each kissing sphere (with three or four levels: with all spheres below it):
    busy time as a share of what `concurrency` allows, items run, items that wait, items stolen, and
    the state. Below are the totals, and items and samples per second. Rates are those of the last
    second; when the display ends, those of the whole time.

    In a terminal the program's own output appears above the display; in a notebook the display is
    a table below the cell; elsewhere it is a line now and then. The display ends with the block,
    when the spheres stop, or with the program, whichever is first, and leaves its last figures. On
    ranks other than 0 it shows nothing.
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

    # ---- samples ----

    def advance(self, samples: int = 1) -> None:
        """Adds to the number of samples that the display shows.

        If neither this nor `update` is called, the display counts the rows that wrapped loaders of
        these spheres hand out.

        Raises:
            TypeError: `samples` is not an integer.
            ValueError: it is negative.
        """
        self._spheres._samples.advance(as_index("samples", samples, 0))

    def update(self, *, samples: int) -> None:
        """Sets the number of samples that the display shows. Raises what `advance` does."""
        self._spheres._samples.set(as_index("samples", samples, 0))

    # ---- life ----

    @property
    def active(self) -> bool:
        """Whether this process shows the display."""
        return self._thread is not None and self._thread.is_alive()

    def __enter__(self) -> Self:
        global _shown
        if os.environ.get("RANK", "0") != "0":
            return self  # rank 0 has the terminal
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
            self._begun.wait()  # so that all later output appears above the display
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the display, which leaves its last figures; may be called more than once.

        Warns (RuntimeWarning) if the display ended early, because its terminal or file was gone.
        """
        if self._thread is None:
            return  # it was not shown, or this is a forked child
        self._end.set()
        self._thread.join()
        error, self._error = self._error, None
        if error is not None:
            warnings.warn(f"the live display ended early: {error!r}", RuntimeWarning, stacklevel=3)

    # ---- the display's thread ----

    def _run(self, display: AbstractContextManager[Show], draws: bool) -> None:
        global _shown
        spheres = self._spheres
        # With more starts than this, spheres that do not run have stopped.
        starts = spheres._starts - spheres.running
        # Rates are those of about a second, or of the time from line to line.
        kept = 1 + math.ceil(min(1 / self._seconds, 1000.0)) if draws else 2
        pause = min(self._seconds if draws else self._plain_seconds, threading.TIMEOUT_MAX)
        try:
            first = Reading.of(spheres)
            readings = deque([first], maxlen=kept)
            with display as show:
                if draws:
                    show(Rates(first, first))
                self._begun.set()
                while not self._end.wait(pause):
                    if spheres._starts > starts and not spheres.running:
                        break
                    readings.append(Reading.of(spheres))
                    show(Rates(readings[0], readings[-1]))
                if draws or len(readings) > 1:  # a run shorter than `pause` prints no line
                    show(Rates(first, Reading.of(spheres)))
        except (OSError, ValueError) as error:  # the terminal is gone or the file closed
            self._error = error
        finally:
            self._begun.set()
            with _lock:
                _shown = None  # or the module would keep the spheres alive


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
        _shown._thread = None  # the parent has the thread and the display
        restore_streams()
        _shown = None


os.register_at_fork(after_in_child=_after_fork)
