"""Searches objects for what they hold: the tensors in them, and sequences without tensors.

`training` uses it for arguments, outputs and side effects of a forward, `data` for datasets.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import types
from collections import deque
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["is_sequence", "parts_of", "row_sequences", "tensor_inside", "walk"]

_MAX_DEPTH, _MAX_OBJECTS = 8, 2000  # of a search
_ATOMS = (
    *(str, bytes, bytearray, int, float, complex, range, type(None), type, types.ModuleType),
    *(torch.dtype, torch.device, np.ndarray, np.generic),
)


def is_sequence(value: Any) -> bool:
    """Whether a value is a list, tuple, deque, range or numpy array (with a dimension)."""
    if isinstance(value, np.ndarray):
        return value.ndim > 0
    return type(value) in (list, tuple, deque, range)


def row_sequences(value: Any, path: str = "", depth: int = _MAX_DEPTH) -> Iterator[tuple[str, Any]]:
    """The outermost sequences in a value that contain no tensor, each with its path."""
    if isinstance(value, Tensor) or depth == 0:
        return
    if is_sequence(value) and tensor_inside(value) is None:
        yield path, value
        return
    inside: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, (list, tuple, deque)) and not isinstance(value, torch.Size):
        inside = enumerate(value)
    elif isinstance(value, Mapping):
        inside = ((repr(key), v) for key, v in value.items())
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        inside = [(f.name, getattr(value, f.name, None)) for f in dataclasses.fields(value)]
    for name, part in inside:
        yield from row_sequences(part, f"{path}[{name}]", depth - 1)


def tensor_inside(value: Any, kinds: type | tuple[type, ...] = Tensor) -> tuple[str, Any] | None:
    """The nearest tensor that an object holds, with its path; None if there is none."""
    return next((found for found in walk([("", value)]) if isinstance(found[1], kinds)), None)


def walk(
    roots: Iterable[tuple[str, Any]],
    closed: Container[int] = (),
    *,
    by_name: bool = False,
    most: int = _MAX_OBJECTS,
) -> Iterator[tuple[str, Any]]:
    """The objects that can be reached from some roots, nearest first, each with its path.

    The search goes through containers, attributes, slots, closures and partial functions.

    Args:
        roots: pairs of a name and an object.
        closed: ids of objects that are skipped.
        by_name: whether the search goes to the global names that users' functions use.
        most: how many objects are visited beside the roots.
    """
    waiting = deque((path, value, 0) for path, value in roots)
    seen: set[int] = set()
    most += len(waiting)
    while waiting and len(seen) < most:
        path, here, depth = waiting.popleft()
        if id(here) in closed or id(here) in seen:
            continue
        if type(here).__module__.startswith("torch_spheres."):
            continue  # an object of this package is not the user's state
        yield path, here
        if isinstance(here, (Tensor, *_ATOMS)) or depth > _MAX_DEPTH:
            continue
        seen.add(id(here))
        parts = itertools.chain(parts_of(here), _globals_of(here) if by_name else ())
        room = max(0, most - len(waiting))
        waiting.extend(
            (f"{path}{name}", part, depth + 1) for name, part in itertools.islice(parts, room)
        )


def _globals_of(value: Any) -> Iterator[tuple[str, Any]]:
    """The global names that a function uses, unless it is part of an installed package."""
    if isinstance(value, types.FunctionType) and not _is_installed(value.__code__.co_filename):
        for name in value.__code__.co_names:
            if name in value.__globals__:
                yield f".{name}", value.__globals__[name]


@functools.cache
def _is_installed(file: str) -> bool:
    return any(folder in file for folder in ("site-packages", "dist-packages", "python3."))


def parts_of(value: Any) -> Iterator[tuple[str, Any]]:
    """The elements, attributes, slots and closure cells of an object, each with its path."""
    if isinstance(value, Mapping):
        yield from ((f"[{key!r}]", v) for key, v in [*value.items()])
    elif isinstance(value, (list, tuple, deque, set, frozenset)):
        yield from ((f"[{i}]", v) for i, v in enumerate([*value]))
    elif type(value) in _DICT_VIEWS:
        yield from (("(...)", v) for v in [*value])
    if isinstance(value, functools.partial):
        yield from ((".func", value.func), (".args", value.args), (".keywords", value.keywords))
    if isinstance(value, nn.Module):
        yield from ((f".{name}", p) for name, p in [*value.named_parameters()])
    if isinstance(value, types.FunctionType):
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # an empty cell
                yield f".{name}", cell.cell_contents
    elif isinstance(value, types.MethodType):
        yield ".__self__", value.__self__
        yield "", value.__func__
    else:
        yield from ((f".{name}", v) for name, v in [*getattr(value, "__dict__", {}).items()])
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                yield f".{name}", getattr(value, name)


_DICT_VIEWS: tuple[type, ...] = (type({}.keys()), type({}.values()), type({}.items()))
