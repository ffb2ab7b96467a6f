"""How often tests repeat things: enough to find faults in minutes, or, with `--long`, in hours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

LONG = 20  # times as many

_is_long = False


def take_long() -> None:
    """Called by conftest.py, before any test file is imported."""
    global _is_long
    _is_long = True


def rounds(count: int) -> int:
    """`count`, or LONG times as many with `--long`."""
    return count * LONG if _is_long else count


def every(step: int, cases: Sequence[T], first: int = 0) -> Sequence[T]:
    """Each `step`-th case, from that number on; with `--long` all of them."""
    return cases if _is_long else cases[first % step :: step]
