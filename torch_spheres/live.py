"""`KissingSpheres.live`: a display that stays at the bottom of the terminal while a script runs.

::

    with ts.KissingSpheres(levels=2) as spheres, spheres.live() as live:
        for x, y in loader:
            ...
            live.advance(len(x))

A thread of its own reads the spheres' counters and draws; the loop is not asked for anything.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import math
import operator
import os
import sys
import threading
import warnings
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

from torch_spheres.watching.frame import View, screen
from torch_spheres.watching.painter import painter
from torch_spheres.watching.plain import PlainLines
from torch_spheres.watching.readings import Rates, Reading
from torch_spheres.watching.region import (
    Above,
    Region,
    is_terminal,
    same_terminal,
    size,
    speaks_unicode,
)
from torch_spheres.watching.report import watched_from_outside

if TYPE_CHECKING:
    from torch_spheres.system import KissingSpheres

__all__ = ["Live", "positive"]

_lock = threading.Lock()
_shown: Live | None = None  # the one that is on the terminal


class Live:
    """A live display of one `KissingSpheres`; made by `KissingSpheres.live`, used in a ``with``.

    A line for each kissing sphere (from three levels on, with all spheres below it): state, items
    run, those of them stolen, items that wait, and the share of the time in which there was work,
    of what `concurrency` lets run at once; then the totals, items and samples per second. Rates are
    of the last second, at the end of the whole time.

    What is printed meanwhile comes above it. It ends with the block, when the spheres stop, or with
    the program, whichever is first, and leaves its last figures on the terminal. Under
    `torch_spheres.top`, which shows the spheres itself, and on ranks other than 0 it shows nothing.
    Notebooks have no terminal: they get lines here, and a picture of the spheres themselves.
    """

    def __init__(
        self,
        spheres: KissingSpheres,
        refresh_per_second: float = 4.0,
        *,
        file: TextIO | None = None,
        plain: bool | None = None,
        plain_seconds: float = 10.0,
    ) -> None:
        self._spheres = spheres
        self._tick = 1 / positive("refresh_per_second", refresh_per_second)
        self._plain_seconds = positive("plain_seconds", plain_seconds)
        if file is not None and not _takes_text(file):
            raise TypeError(f"file must be a text file, such as sys.stderr, or None, got {file!r}")
        if plain is not None and not isinstance(plain, bool):
            raise TypeError(f"plain must be True, False or None, got {plain!r}")
        self._file = file
        self._plain = plain
        self._face: _Terminal | _Plain | None = None
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._pid = 0
        self._starts = 0

    # ---- what the user tells ----

    def advance(self, samples: int = 1) -> None:
        """So many more samples are done: shown, with samples per second.

        Without this, or `update`, the rows that wrapped loaders of these spheres hand out are
        counted.

        Raises:
            TypeError: `samples` is not an integer.
            ValueError: it is negative.
        """
        self._spheres._rows.advance(_count(samples))

    def update(self, *, samples: int) -> None:
        """So many samples are done in all. Raises as `advance`."""
        self._spheres._rows.tell(_count(samples))

    # ---- life ----

    @property
    def active(self) -> bool:
        """Whether the figures are refreshed, in this process."""
        thread = self._thread
        return thread is not None and thread.is_alive() and self._pid == os.getpid()

    def __enter__(self) -> Self:
        global _shown
        if watched_from_outside() or os.environ.get("RANK", "0") != "0":
            return self  # torch_spheres.top, or the process of rank 0, has the terminal
        with _lock:
            if _shown is not None and _shown.active:
                raise RuntimeError(
                    f"a live display of {_shown._spheres!r} is shown already, and there is room "
                    "for one: end that one first, or watch all spheres of a script with "
                    "python -m torch_spheres.top -- python SCRIPT"
                )
            if self._thread is not None:
                raise RuntimeError("this live display has ended; call live() for a new one")
            file = sys.stderr if self._file is None else self._file
            plain = not is_terminal(file) if self._plain is None else self._plain
            self._face = _Plain(file, self._plain_seconds) if plain else _Terminal(file)
            self._pid = os.getpid()
            # To tell spheres that have stopped from those that are yet to start (again).
            self._starts = self._spheres._starts - self._spheres.running
            self._thread = threading.Thread(
                target=self._run, args=(self._face,), name="spheres live", daemon=True
            )
            _shown = self
            try:
                self._face.begin()
                self._thread.start()
            except BaseException:
                self._face.leave()
                raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the display, whose last figures stay on the terminal; once it has ended, nothing.

        If the terminal or the file was gone before, a RuntimeWarning says so.
        """
        if self._thread is None or self._pid != os.getpid():
            return  # it never began, or this is a forked child
        self._end.set()
        self._thread.join()
        error, self._error = self._error, None
        if error is not None:
            warnings.warn(f"the live display ended early: {error!r}", RuntimeWarning, stacklevel=3)

    # ---- the thread ----

    def _run(self, face: _Terminal | _Plain) -> None:
        try:
            while True:
                face.show(self._spheres)
                if self._end.wait(self._tick):
                    break
                if self._spheres._starts > self._starts and not self._spheres.running:
                    break
            face.last(self._spheres)
        except (OSError, ValueError) as error:  # a terminal that is gone, a file that is closed
            self._error = error
        finally:
            face.leave()
            self._forget()

    def _forget(self) -> None:
        global _shown
        with _lock:
            if _shown is self:
                _shown = None  # or the spheres would live as long as the module

    def _after_fork(self) -> None:
        if self._face is not None:
            self._face.leave(forked=True)


class _Terminal:
    """Lines at the bottom of the terminal; what is printed goes above them."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._view = View(Rates())
        self._region = Region(file, painter(file, "live(plain=True)"))
        self._unicode = speaks_unicode(file)
        self._proxies: dict[str, tuple[TextIO, Above]] = {}

    def begin(self) -> None:
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if same_terminal(stream, self._file):
                self._proxies[name] = stream, Above(stream, self._region)
                setattr(sys, name, self._proxies[name][1])

    def show(self, spheres: KissingSpheres) -> None:
        self._view.rates.add(Reading.of(spheres))
        self._draw()

    def _draw(self) -> None:
        columns, rows = size(self._file)
        self._region.show(screen([self._view], columns, rows - 2, self._unicode))

    def last(self, spheres: KissingSpheres) -> None:
        self._view.rates.add(Reading.of(spheres))
        self._view.rates.settle()
        self._draw()

    def leave(self, *, forked: bool = False) -> None:
        # Somebody else's stand-in (contextlib.redirect_stdout) is not ours to take away; ours
        # passes everything on from here.
        for name, (stream, proxy) in self._proxies.items():
            if getattr(sys, name) is proxy:
                setattr(sys, name, stream)
        if forked:
            self._region.leave()
            return
        # The terminal may be what failed.
        with contextlib.suppress(OSError, ValueError):
            self._region.close()


class _Plain:
    """A line now and then; the last one only if there was one before."""

    def __init__(self, file: TextIO, seconds: float) -> None:
        self._lines = PlainLines(file, seconds)
        self._view = View(Rates(0))
        self._begun = False

    def begin(self) -> None:
        """Nothing to prepare."""

    def show(self, spheres: KissingSpheres) -> None:
        if not self._begun:  # what the first line's rates are since
            self._begun = True
            self._view.rates.add(Reading.of(spheres))
        if self._lines.due:
            self.print(spheres)

    def last(self, spheres: KissingSpheres) -> None:
        if self._lines.printed:
            self._view.rates.add(Reading.of(spheres))
            self._view.rates.settle()
            self._lines.print([self._view])

    def print(self, spheres: KissingSpheres) -> None:
        self._view.rates.add(Reading.of(spheres))
        self._lines.print([self._view])

    def leave(self, *, forked: bool = False) -> None:
        """Nothing to give back."""


def positive(name: str, value: Any) -> float:
    """A number of times or seconds that a user has given; TypeError or ValueError if it is none."""
    try:
        number = float(+value)  # float() alone would take strings
    except (TypeError, ValueError, OverflowError):
        raise TypeError(f"{name} must be a number, got {value!r}") from None
    if not (number > 0 and math.isfinite(number)):
        raise ValueError(f"{name} must be more than 0, got {value!r}")
    return number


def _takes_text(file: Any) -> bool:
    binary = isinstance(file, (io.RawIOBase, io.BufferedIOBase))
    return callable(getattr(file, "write", None)) and not binary


def _count(value: Any) -> int:
    try:
        samples = operator.index(value)
    except TypeError:
        raise TypeError(f"samples must be an integer, got {value!r}") from None
    if samples < 0:
        raise ValueError(f"samples must be at least 0, got {samples}")
    return samples


@atexit.register
def _close_all() -> None:
    if _shown is not None:
        _shown.close()


def _after_fork() -> None:
    global _lock, _shown
    _lock = threading.Lock()
    if _shown is not None:
        _shown._after_fork()
        _shown = None


os.register_at_fork(after_in_child=_after_fork)
