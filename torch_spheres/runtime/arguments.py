"""Checks users' arguments and converts them; errors name the argument and its value."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any, TypeVar

__all__ = ["as_index", "as_number", "as_timeout", "native_items", "python_items"]

T = TypeVar("T")


def as_index(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """Converts an argument to an integer from `least` to `most`; else TypeError or ValueError."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if (least is not None and number < least) or (most is not None and number > most):
        span = f"at least {least}" if most is None else f"{least} to {most}"
        raise ValueError(f"{name} must be {span}, got {number}")
    return number


def as_number(name: str, value: Any, what: str = "a number") -> float:
    """Converts an argument to a float, or raises a TypeError that says `what` it must be."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return float(+value)  # float() alone would take strings
    except (TypeError, ValueError, OverflowError):
        raise TypeError(f"{name} must be {what}, got {value!r}") from None


def as_timeout(value: Any) -> float | None:
    """Converts a timeout to seconds, None or infinity to None; else TypeError or ValueError."""
    if value is None:
        return None
    seconds = as_number("timeout", value, "None or a number of seconds")
    if math.isnan(seconds) or seconds < 0:
        raise ValueError(f"timeout must be None or at least 0 seconds, got {value!r}")
    return None if math.isinf(seconds) else seconds


def python_items(items: Iterable[T], fn: object) -> tuple[T, ...]:
    """Reads the items for a callable `fn`; TypeError if `fn` or `items` cannot be that."""
    if not callable(fn):
        raise TypeError(f"fn must be callable, got {fn!r} of type {type(fn).__name__}")
    try:
        return tuple(items)
    except TypeError:
        if isinstance(items, Iterable):
            raise  # the iterable's own error
        raise TypeError(
            f"items must be iterable, got {items!r} of type {type(items).__name__}"
        ) from None


def native_items(items: Iterable[Any]) -> int | list[int]:
    """Reads the items for a `NativeFunction`: integers, or their number if they are 0, 1, 2, ..."""
    if isinstance(items, range) and items == range(len(items)):
        return len(items)
    if not isinstance(items, Iterable):
        raise TypeError(f"items must be iterable, got {items!r} of type {type(items).__name__}")
    values = [as_index("an item of a NativeFunction", item) for item in items]
    for extreme in (min(values, default=0), max(values, default=0)):
        if not -(2**63) <= extreme < 2**63:
            raise OverflowError(f"an item of a NativeFunction must fit 64 bits, got {extreme}")
    return values
