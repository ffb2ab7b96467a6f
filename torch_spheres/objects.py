"""What lies inside values that are no tensors: plain sequences, and tensors in objects."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import types
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["is_sequence", "row_sequences", "tensor_inside"]

_DEPTH, _VALUES = 8, 2000  # of a search
_CLOSED = (
    *(str, bytes, bytearray, int, float, complex, range, type(None), type, types.ModuleType),
    *(torch.dtype, torch.device, np.ndarray, np.generic),
)


def is_sequence(value: Any) -> bool:
    """Whether it has an order and a length: a list, tuple, deque, range or numpy array."""
    if isinstance(value, np.ndarray):
        return value.ndim > 0
    return type(value) in (list, tuple, deque, range)


def row_sequences(value: Any, path: str = "", depth: int = _DEPTH) -> Iterator[tuple[str, Any]]:
    """The outermost sequences in a value that have no tensor in them, and where they are."""
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
    """The first tensor that an object holds, and by which attributes it is reached.

    In containers, attributes, slots, closures and partial functions, to a bounded depth. Modules
    are not looked into by name, but are found to hold parameters.
    """
    waiting: deque[tuple[str, Any, int]] = deque([("", value, 0)])
    seen: set[int] = set()
    while waiting and len(seen) < _VALUES:
        path, here, depth = waiting.popleft()
        if isinstance(here, kinds):
            return path, here
        if isinstance(here, _CLOSED) or id(here) in seen or depth > _DEPTH:
            continue
        seen.add(id(here))
        waiting.extend((f"{path}{name}", part, depth + 1) for name, part in _parts(here))
    return None


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from ((f"[{key!r}]", v) for key, v in [*value.items()])
    elif isinstance(value, (list, tuple, deque, set, frozenset)):
        yield from ((f"[{i}]", v) for i, v in enumerate([*value]))
    elif type(value) in _VIEWS:
        yield from (("(...)", v) for v in [*value])
    if isinstance(value, functools.partial):
        yield from ((".func", value.func), (".args", value.args), (".keywords", value.keywords))
    if isinstance(value, nn.Module):
        yield from ((f".{name}", p) for name, p in [*value.named_parameters()])
    if isinstance(value, types.FunctionType):
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # an empty one
                yield f".{name}", cell.cell_contents
    elif isinstance(value, types.MethodType):
        yield ".__self__", value.__self__
    else:
        yield from ((f".{name}", v) for name, v in [*getattr(value, "__dict__", {}).items()])
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                yield f".{name}", getattr(value, name)


_VIEWS: tuple[type, ...] = (type({}.keys()), type({}.values()), type({}.items()))
