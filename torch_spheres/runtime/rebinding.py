"""Replaces the parts of a module (or dataset) by a copy's, in values that refer to these parts.

A module refers to its own parts in many places beside its registries: in a list of registered
layers, a bound method that was assigned to an attribute, a weak reference to a parameter. In a
replica (`training`), and in a worker's copy of a dataset (`data`), these must be the copy's own
parts. All other values are the user's own objects, which are never copied.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping
from operator import is_
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["MUTABLE", "DictSnapshot", "held_by", "mapping_values", "rebound"]

_PLAIN = frozenset(
    (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
)
_SEQUENCES = (list, tuple, set, frozenset, deque)
_MAPPINGS = (dict, OrderedDict)
_DEPTH = 5
MUTABLE = (list, dict, set, deque)


def held_by(value: Any, depth: int = _DEPTH) -> Iterator[Any]:
    """The modules, tensors and owners of bound methods in `depth` levels of built-in containers."""
    kind = type(value)
    if kind in _PLAIN:
        return
    if isinstance(value, (nn.Module, Tensor)):
        yield value
    elif kind is MethodType:
        yield from held_by(value.__self__, 1)
    elif kind is weakref.ref:
        yield from held_by(value(), 1)
    elif depth > 0:
        for inner in _inside(value):
            yield from held_by(inner, depth - 1)


def _inside(value: Any) -> Iterator[Any]:
    if type(value) in _MAPPINGS:
        if _PLAIN.issuperset(map(type, value.values())) and _PLAIN.issuperset(map(type, value)):
            return iter(())
        return itertools.chain(value.keys(), value.values())
    if type(value) in _SEQUENCES or _is_named_tuple(value):
        return iter(() if _PLAIN.issuperset(map(type, value)) else value)
    if type(value) is functools.partial:
        return iter((value.func, *value.args, *value.keywords.values()))
    return iter(())


def mapping_values(container: Any) -> Iterable[Any]:
    """The values of a mapping; nothing for another container, which iteration shows in full."""
    return container.values() if isinstance(container, Mapping) else ()


def rebound(value: Any, replacements: Mapping[int, Any], depth: int = _DEPTH) -> Any:
    """Returns `value` with objects in it replaced, or `value` itself if nothing is replaced.

    Containers are rebuilt, to `depth` levels; `replacements` is by id of the replaced objects.
    """
    kind = type(value)
    if kind in _PLAIN:
        return value
    found = replacements.get(id(value))
    if found is not None:
        return found
    if kind is MethodType:
        owner = replacements.get(id(value.__self__))
        return value if owner is None else MethodType(value.__func__, owner)
    if kind is weakref.ref:
        found = replacements.get(id(value()))
        return value if found is None else weakref.ref(found)
    if depth == 0:
        return value
    inside = [*_inside(value)]
    if not inside:
        return value
    new = [rebound(inner, replacements, depth - 1) for inner in inside]
    if all(a is b for a, b in zip(new, inside, strict=True)):
        return value
    return _rebuild(value, new)


def _rebuild(value: Any, inside: list[Any]) -> Any:
    """A container like `value`, made from what `_inside` lists of it."""
    kind = type(value)
    if kind in _MAPPINGS:
        half = len(inside) // 2
        return kind(zip(inside[:half], inside[half:], strict=True))
    if kind is functools.partial:
        args, names = inside[1 : 1 + len(value.args)], value.keywords
        rest = inside[1 + len(value.args) :]
        return kind(inside[0], *args, **dict(zip(names, rest, strict=True)))
    if kind is deque:
        return deque(inside, value.maxlen)
    return kind(*inside) if _is_named_tuple(value) else kind(inside)


def _is_named_tuple(value: Any) -> bool:
    return isinstance(value, tuple) and hasattr(type(value), "_fields")


class DictSnapshot:
    """Remembers which objects some dicts hold, to see later whether they still do."""

    def __init__(self, dicts: list[dict[Any, Any]]) -> None:
        self._dicts = dicts
        self._sizes = [*map(len, dicts)]
        self._views = [d.values() for d in dicts]
        self._values = [*itertools.chain.from_iterable(self._views)]

    def matches(self, dicts: list[dict[Any, Any]]) -> bool:
        """Whether these are the same dicts and hold the same objects."""
        return (
            all(map(is_, dicts, self._dicts))
            and [*map(len, dicts)] == self._sizes
            and all(map(is_, itertools.chain.from_iterable(self._views), self._values))
        )
