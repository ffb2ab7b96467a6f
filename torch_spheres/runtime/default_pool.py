"""Spheres for whoever was given none: of a class that only the top of the package knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["new_pool", "register_pool_class"]

_find_class: Callable[[], Any] | None = None


def register_pool_class(find: Callable[[], Any]) -> None:
    """Sets what finds the class, `KissingSpheres`; it is called when a pool is made."""
    global _find_class
    _find_class = find


def new_pool(levels: int = 2, *, concurrency: int | None = None) -> Any:
    """A pool of that class; arguments as of its constructor."""
    assert _find_class is not None  # torch_spheres/__init__.py has registered it
    return _find_class()(levels, concurrency=concurrency)
