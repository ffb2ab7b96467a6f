"""Makes a pool for a model or loader that was given none.

The class, `KissingSpheres`, is above the packages that make one, so the package's ``__init__``
registers it here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["new_pool", "register_pool_class"]

_find_class: Callable[[], Any] | None = None


def register_pool_class(find: Callable[[], Any]) -> None:
    """Sets the function that imports and returns `KissingSpheres`, called for each new pool."""
    global _find_class
    _find_class = find


def new_pool(levels: int = 2, *, concurrency: int | None = None) -> Any:
    """Returns a new `KissingSpheres`; the arguments are those of its constructor."""
    assert _find_class is not None  # torch_spheres/__init__.py has registered it
    return _find_class()(levels, concurrency=concurrency)
