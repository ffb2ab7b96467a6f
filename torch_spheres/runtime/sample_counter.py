"""Counts the samples that a training loop has processed, for displays of a pool."""

from __future__ import annotations

import os
import threading

__all__ = ["SampleCounter"]

_lock = threading.RLock()  # reentrant: a signal handler may count while its thread does


class SampleCounter:
    """Counts samples, from any thread.

    Wrapped loaders count the rows that they hand out. After the first call of `advance` or `set`
    only the user's own counts are used.
    """

    def __init__(self) -> None:
        self._loaded = 0
        self._by_user: int | None = None

    def loaded(self, rows: int) -> None:
        """Counts a batch that a loader has handed out."""
        with _lock:
            self._loaded += rows

    def advance(self, rows: int) -> None:
        """Adds to the user's count."""
        with _lock:
            self._by_user = (self._by_user or 0) + rows

    def set(self, rows: int) -> None:
        """Sets the user's count."""
        with _lock:
            self._by_user = rows

    @property
    def value(self) -> int | None:
        """Samples so far; None if unknown."""
        count = self._by_user
        return (self._loaded or None) if count is None else count


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()  # a thread of the parent may hold the old one


os.register_at_fork(after_in_child=_after_fork)
