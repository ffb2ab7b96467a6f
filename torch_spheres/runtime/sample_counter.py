"""Counts the samples of a training loop, for whoever shows them."""

from __future__ import annotations

import os
import threading

__all__ = ["SampleCounter"]

_lock = threading.RLock()  # a signal's handler may count while its thread does


class SampleCounter:
    """Counts samples, from any thread.

    Wrapped loaders count the rows that they hand out. Once the user has told a number (`tell`,
    `advance`), the user's number is shown instead.
    """

    def __init__(self) -> None:
        self._loaded = 0
        self._told: int | None = None

    def loaded(self, rows: int) -> None:
        """A loader has handed out a batch."""
        with _lock:
            self._loaded += rows

    def advance(self, rows: int) -> None:
        """The user has done so many more."""
        with _lock:
            self._told = (self._told or 0) + rows

    def tell(self, rows: int) -> None:
        """The user has done so many in all."""
        with _lock:
            self._told = rows

    @property
    def value(self) -> int | None:
        """Samples so far; None where nobody knows."""
        told = self._told
        return (self._loaded or None) if told is None else told


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()  # the parent's may be held by a thread that is not here


os.register_at_fork(after_in_child=_after_fork)
