"""Whether a dataset changes when it is asked for samples: then the order of asking matters.

Attributes are compared, a few levels deep: counters, generators of its own, positions in files. Not
the contents of tensors, arrays and long lists, which are what a dataset is made of.
"""

from __future__ import annotations

import io
import random
from typing import Any

import numpy as np
import torch

__all__ = ["fingerprint"]

_DEPTH = 5
_LONG = 64  # of a container: longer ones are only measured
_MOST = 5000  # things looked at

_PLAIN = (type(None), bool, int, float, complex, str, bytes)


def fingerprint(dataset: Any) -> Any:
    """Equal, by ``==``, for as long as nothing of the dataset has changed that is looked at."""
    return _Look().at(dataset, _DEPTH)


class _Look:
    def __init__(self) -> None:
        self._left = _MOST
        self._seen: set[int] = set()

    def at(self, value: Any, depth: int) -> Any:
        if type(value) in _PLAIN:
            return value
        self._left -= 1
        state = _state(value)
        if state is not None:
            return id(value), state
        if depth == 0 or self._left < 0 or id(value) in self._seen:
            return id(value)
        self._seen.add(id(value))
        return id(value), self._inside(value, depth - 1)

    def _inside(self, value: Any, depth: int) -> Any:
        if isinstance(value, dict):
            pairs = list(value.items()) if len(value) <= _LONG else []
            return len(value), [(id(k), self.at(v, depth)) for k, v in pairs]
        if isinstance(value, (list, tuple, set, frozenset)):
            return len(value), [self.at(v, depth) for v in value] if len(value) <= _LONG else None
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict) and not isinstance(value, type):
            return [(name, self.at(v, depth)) for name, v in list(attributes.items())]
        return None


def _state(value: Any) -> Any:
    """Of things that have one inside, where `__dict__` does not show it."""
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
    if isinstance(value, io.IOBase):
        try:
            return value.tell()
        except (OSError, ValueError):
            return "no position"
    return None
