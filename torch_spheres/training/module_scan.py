"""`ModuleScan`: the tensors, modules and flags on a module's attributes; used by `ReplicaPool`."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from torch_spheres import _compat
from torch_spheres.runtime.rebinding import held_by

__all__ = ["SKIPPED_ATTRIBUTES", "ModuleScan"]

SKIPPED_ATTRIBUTES = frozenset((
    *_compat.FORWARD_HOOKS, *_compat.OTHER_HOOKS, "_parameters", "_buffers", "_modules",
    "_compiled_call_impl",
))  # fmt: skip
"""Attributes that each replica has its own of, or that no forward reads."""
_PLAIN = frozenset((type(None), bool, int, float, str))
_FLAGS = frozenset((bool, str))
_SIZED = frozenset((list, tuple, dict, set))
_LARGE = 256  # elements of a container that is not searched at every call


class ModuleScan:
    """What the attributes of a module hold at the beginning of a call.

    Args:
        parts: the module's ``modules()``.
        parameters: the module's ``parameters()``.
        user_module: the object that the user calls, where that is not the module.
        before: the scan of the call before.

    Attributes:
        attributes: for each of `parts`, names of attributes that hold parts of the module, or
            `leaves`, and so are the replica's own.
        flags: strings, enumerations and booleans, which may choose what a forward computes.
        leaves: tensors that require a gradient and are no parameters.
        plain_tensors: tensors without a gradient: number of the module, name, tensor.
        unregistered_modules: modules that are no parts of the module.
        callables: functions and other objects that can be called.
    """

    def __init__(
        self,
        parts: Sequence[nn.Module],
        parameters: Iterable[Tensor],
        user_module: nn.Module | None,
        before: ModuleScan | None = None,
    ) -> None:
        # Large containers in which nothing was found, and their lengths.
        self._empty: dict[tuple[int, str], tuple[Any, int]] = before._empty if before else {}
        known = {*map(id, parts), id(user_module), *map(id, parameters)}
        self.attributes: list[list[str]] = [[] for _ in parts]
        self.plain_tensors: list[tuple[int, str, Tensor]] = []
        self.callables: list[Any] = []
        leaves: dict[int, Tensor] = {}
        modules: dict[int, nn.Module] = {}
        flags: list[Any] = []
        for i, part in enumerate(parts):
            for name, value in vars(part).items():
                if type(value) in _PLAIN or name in SKIPPED_ATTRIBUTES:
                    if type(value) in _FLAGS and name != "training":
                        flags.append(value)
                    continue
                if isinstance(value, enum.Enum):
                    flags.append(value)
                    continue
                if callable(value):
                    self.callables.append(value)
                for held in self._tensors_and_modules(i, name, value):
                    if id(held) in known:
                        self.attributes[i].append(name)
                    elif isinstance(held, nn.Module):
                        modules[id(held)] = held
                    elif held.requires_grad:
                        self.attributes[i].append(name)
                        leaves[id(held)] = held
                    else:
                        self.plain_tensors.append((i, name, held))
        self.flags = tuple(flags)
        self.leaves, self.unregistered_modules = [*leaves.values()], [*modules.values()]

    def _tensors_and_modules(self, i: int, name: str, value: Any) -> Iterable[Any]:
        """Tensors and modules in an attribute; a large container without any is searched once."""
        size = len(value) if type(value) in _SIZED else 0
        if size < _LARGE:
            simple = type(value) in (list, tuple) and _PLAIN.issuperset(map(type, value))
            return () if simple else held_by(value)
        seen, length = self._empty.get((i, name), (None, -1))
        if seen is value and length == size:
            return ()
        found = [*held_by(value)]
        if not found:
            self._empty[i, name] = value, size
        return found
