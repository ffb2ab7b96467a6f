"""Marks of a tensor or an object that show whether it has changed in place.

Used by shard.py, forward_effects.py and shared_writes.py.
"""

from __future__ import annotations

import itertools
import zlib
from array import array
from collections import deque
from collections.abc import Mapping, Sequence
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torch_spheres.runtime.object_graph import parts_of
from torch_spheres.training.pytree import is_opened_object

__all__ = ["FUNCTIONS", "PLAIN", "checksum", "content_of", "contents", "version_of"]

PLAIN = frozenset((type(None), bool, int, float, complex, str, bytes))
FUNCTIONS = (FunctionType, BuiltinFunctionType, MethodType)
_MAX_ELEMENTS = 1000  # of a container that are compared
_MAX_NESTED = 10_000  # elements, with those of containers in it
_MAX_BYTES = 1 << 20  # of an array that is compared
_AS_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def contents(keys: Sequence[int | str], values: Sequence[Any]) -> list[tuple[int | str, Any, Any]]:
    """Key, value and content of arguments that must not change in place.

    Key-value caches are meant to be changed, and distributions change themselves.
    """
    return [
        (key, value, content_of(value))
        for key, value in zip(keys, values, strict=True)
        if not isinstance(value, Tensor)
        and type(value) not in PLAIN
        and not is_opened_object(value)
    ]


def version_of(value: Any) -> int:
    """A number that changes when torch writes to a tensor; 0 for other values."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0


def checksum(tensor: Any) -> Any:
    """A value that changes with a tensor's bits; None if those cannot be read as integers."""
    if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or tensor.is_meta:
        return None
    bits = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    kind = _AS_INTEGERS.get(bits.element_size())
    if kind is None or bits.is_quantized:
        return None
    if bits.dtype is not torch.bool:
        bits = bits.view(kind)
    return bits.data_ptr(), int(bits.sum(dtype=torch.int64))


def content_of(value: Any, depth: int = 2, left: list[int] | None = None) -> Any:
    """A value that changes when an object changes in place; None if the object holds nothing.

    Args:
        value: anything.
        depth: of nested containers that are compared.
        left: number of elements that may still be compared.
    """
    left = [_MAX_NESTED] if left is None else left
    if isinstance(value, (nn.Module, Tensor, type, ModuleType, *FUNCTIONS)):
        return None
    if type(value).__module__.startswith("torch_spheres."):
        return None
    if isinstance(value, np.ndarray):
        known = value.nbytes <= _MAX_BYTES and not value.dtype.hasobject
        return zlib.crc32(value.tobytes()) if known else value.shape
    if isinstance(value, (bytearray, array)):
        return zlib.crc32(value)
    items: Any = value
    if isinstance(value, Mapping):
        items = itertools.chain.from_iterable(value.items())
    elif not isinstance(value, (list, tuple, set, frozenset, deque)):
        value = [part for _, part in parts_of(value)]
        if not value:
            return None
        items = value
    allowed = min(_MAX_ELEMENTS, left[0])
    left[0] -= min(allowed, len(value))
    found = [
        v if type(v) in PLAIN else (id(v), content_of(v, depth - 1, left) if depth > 0 else None)
        for v in itertools.islice(items, allowed)
    ]
    return len(value), found
