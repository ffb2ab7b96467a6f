"""Whether a dataset changes when it is asked for samples: then the order of asking matters.

All that it holds is compared, a few levels deep: attributes and slots of itself and of its classes,
containers, small arrays, what functions have closed over, iterators, generators, positions in
files. Not the contents of tensors (but their versions), large arrays and long containers, which are
what a dataset is made of; and not what it reaches through modules' globals.

Where something can be looked into by no means (handles of databases, generators in the middle of a
function) there is no fingerprint.
"""

from __future__ import annotations

import copyreg
import ctypes
import enum
import functools
import io
import logging
import random
import sys
import threading
import types
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

__all__ = ["fingerprint"]

_DEPTH = 16
_LONG = 64  # of a container: longer ones are only measured
_MOST = 5000  # things looked at
_SMALL = 4096  # bytes of an array

_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(Ellipsis))
_CONTAINERS = (list, tuple, set, frozenset, deque)

# What does not change, or what belongs to a thread or to nobody.
_FIXED = (
    type,
    types.ModuleType,
    types.BuiltinFunctionType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    property,
    enum.Enum,
    threading.local,
    type(threading.Lock()),
    type(threading.RLock()),
    weakref.ReferenceType,
    np.dtype,
    np.ufunc,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    functools._lru_cache_wrapper,
    logging.Logger,
    logging.Handler,
)
_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: made by a class statement


class _Opaque(Exception):  # noqa: N818
    """Something that nobody can look into."""


def fingerprint(dataset: Any) -> Any:
    """Equal, by ``==``, for as long as nothing of the dataset has changed; None: who knows."""
    try:
        return _Look().at(dataset, _DEPTH)
    except _Opaque:
        return None


class _Look:
    def __init__(self) -> None:
        self._left = _MOST
        self._seen: dict[int, Any] = {}  # holds them: an id may not come twice
        self._made_anew = 0  # above 0: what is looked at was made to be looked at

    def at(self, value: Any, depth: int) -> Any:
        if type(value) in _PLAIN:
            return value
        if isinstance(value, type):
            return id(value), self._of_class(value, depth)
        if isinstance(value, _FIXED):
            return id(value)
        self._left -= 1
        which = type(value).__name__ if self._made_anew else id(value)
        state = _state(value)
        if state is not None:
            return which, state
        if depth == 0 or self._left < 0 or id(value) in self._seen:
            return which
        self._seen[id(value)] = value
        return which, self._inside(value, depth - 1)

    def _inside(self, value: Any, depth: int) -> Any:
        found: list[Any] = []
        if isinstance(value, dict):
            pairs = list(value.items()) if len(value) <= _LONG else []
            found.append((len(value), [(self.at(k, 0), self.at(v, depth)) for k, v in pairs]))
        elif isinstance(value, _CONTAINERS):
            parts = [self.at(v, depth) for v in value] if len(value) <= _LONG else None
            found.append((len(value), parts))
        elif isinstance(value, types.FunctionType):
            cells = value.__closure__ or ()
            held = (*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
            found.append([self.at(v, depth) for v in held])
        elif isinstance(value, types.CellType):
            try:
                found.append(self.at(value.cell_contents, depth))
            except ValueError:  # nothing in it yet
                found.append(None)
        elif isinstance(value, types.MethodType):
            found.append((self.at(value.__self__, depth), self.at(value.__func__, depth)))
        elif isinstance(value, functools.partial):
            held = (value.func, *value.args, *value.keywords.values())
            found.append([self.at(v, depth) for v in held])
        elif not _is_made_in_python(type(value)):
            found.append(self._reduced(value, depth))
        for name, held in _attributes(value):
            found.append((name, self.at(held, depth)))
        found.append(self._of_class(type(value), depth))
        return found

    def _of_class(self, kind: type, depth: int) -> Any:
        """Attributes of classes that are data: counters are often kept there."""
        if depth == 0 or id(kind) in self._seen:
            return None
        self._seen[id(kind)] = kind
        return [
            (name, self.at(value, depth - 1))
            for base in kind.__mro__
            if base.__flags__ & _HEAP_TYPE and not base.__module__.startswith("torch.")
            for name, value in list(vars(base).items())
            if not name.startswith(("__", "_abc_"))
            and not callable(value)
            and not hasattr(type(value), "__get__")
        ]

    def _reduced(self, value: Any, depth: int) -> Any:
        """Of a type made in C: what it would be pickled as, which shows an iterator's position."""
        try:
            known = copyreg.dispatch_table.get(type(value))
            reduced = value.__reduce_ex__(4) if known is None else known(value)
        except Exception:  # noqa: BLE001
            raise _Opaque from None
        self._made_anew += 1
        try:
            return self.at(reduced, depth)
        finally:
            self._made_anew -= 1


def _is_made_in_python(kind: type) -> bool:
    """Whether all that its instances hold is in `__dict__` and slots, as `copyreg` finds it out."""
    slots: list[str] = copyreg._slotnames(kind)  # type: ignore[attr-defined]
    pointers = len(slots) + (kind.__dictoffset__ > 0) + (kind.__weakrefoffset__ > 0)
    return kind.__basicsize__ <= object.__basicsize__ + pointers * ctypes.sizeof(ctypes.c_void_p)


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    attributes = getattr(value, "__dict__", None)
    if isinstance(attributes, dict):
        yield from list(attributes.items())
    for base in type(value).__mro__:
        slots = vars(base).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            mangled = (
                f"_{base.__name__.lstrip('_')}{name}"
                if name.startswith("__") and not name.endswith("__")
                else name
            )
            if mangled not in ("__dict__", "__weakref__") and hasattr(value, mangled):
                yield mangled, getattr(value, mangled)


def _state(value: Any) -> Any:
    """Of things that have one inside, where neither attributes nor pickling show it."""
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return repr(value.get_state())
    if isinstance(value, torch.Generator):
        return value.get_state().numpy().tobytes()
    if isinstance(value, torch.Tensor):
        return 0 if value.is_inference() else value._version
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tobytes() if value.nbytes <= _SMALL and value.dtype != object else value.nbytes
    if isinstance(value, (bytearray, memoryview)):
        return bytes(value) if len(value) <= _SMALL else len(value)
    if value is sys.stdout or value is sys.stderr:
        return "everybody's"
    if isinstance(value, io.IOBase) or (
        callable(getattr(value, "tell", None)) and not isinstance(value, type)
    ):
        try:
            return "at", value.tell()
        except (OSError, ValueError, TypeError):
            return "no position"
    return None
