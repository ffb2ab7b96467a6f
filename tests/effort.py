"""How often tests repeat things: enough to find faults in minutes, or, with `--long`, in hours."""

from __future__ import annotations

LONG = 20  # times as many

_is_long = False


def take_long() -> None:
    """Called by conftest.py, before any test file is imported."""
    global _is_long
    _is_long = True


def rounds(count: int) -> int:
    """`count`, or LONG times as many with `--long`."""
    return count * LONG if _is_long else count
