"""Nested values as a flat list of leaves: what pytree knows, and dataclasses and mappings."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from torch_spheres import _compat

__all__ = ["Nesting", "flatten", "unflatten"]


@dataclass(frozen=True)
class Nesting:
    """How leaves were nested; equal for values of the same structure."""

    spec: Any  # pytree's TreeSpec
    opened: tuple[_Opened | None, ...]  # for each leaf of `spec`


@dataclass(frozen=True)
class _Opened:
    """An object that pytree takes for a leaf, and that holds tensors nevertheless."""

    example: Any = dataclasses.field(compare=False)
    kind: type
    names: tuple[Any, ...]  # fields, or keys of a mapping
    inside: Nesting


_TENSOR = Nesting(_compat.pytree and _compat.pytree.tree_flatten(0)[1], (None,))


def flatten(value: Any) -> tuple[list[Any], Nesting]:
    """The leaves of lists, tuples, dicts, dataclasses, mappings and what pytree has registered.

    A dataclass or an unregistered mapping is opened if there is a tensor in it, else it is a leaf.
    A PackedSequence is a leaf.
    """
    if isinstance(value, Tensor):  # what most modules return
        return [value], _TENSOR
    # (A PackedSequence is a named tuple, but its parts mean nothing by themselves.)
    flat, spec = _compat.pytree.tree_flatten(value, is_leaf=lambda v: isinstance(v, PackedSequence))
    leaves: list[Any] = []
    opened: list[_Opened | None] = []
    for leaf in flat:
        found = None if isinstance(leaf, Tensor) else _open(leaf)
        if found is None:
            leaves.append(leaf)
            opened.append(None)
        else:
            leaves.extend(found[0])
            opened.append(found[1])
    return leaves, Nesting(spec, tuple(opened))


def _open(leaf: Any) -> tuple[list[Any], _Opened] | None:
    names: tuple[Any, ...]
    if isinstance(leaf, Mapping):
        names, values = tuple(leaf.keys()), list(leaf.values())
    elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
        names = tuple(f.name for f in dataclasses.fields(leaf) if hasattr(leaf, f.name))
        values = [getattr(leaf, name) for name in names]
    else:
        return None
    leaves, inside = flatten(values)
    if not any(isinstance(v, Tensor) for v in leaves):
        return None
    return leaves, _Opened(leaf, type(leaf), names, inside)


def unflatten(leaves: list[Any], nesting: Nesting) -> Any:
    """The inverse of `flatten`, with other leaves; objects are copies of the first ones."""
    if nesting is _TENSOR and len(leaves) == 1:
        return leaves[0]
    return _take(iter(leaves), nesting)


def _take(leaves: Iterator[Any], nesting: Nesting) -> Any:
    flat = [
        next(leaves) if opened is None else _close(opened, _take(leaves, opened.inside))
        for opened in nesting.opened
    ]
    return _compat.pytree.tree_unflatten(flat, nesting.spec)


def _close(opened: _Opened, values: list[Any]) -> Any:
    made = copy.copy(opened.example)
    for name, value in zip(opened.names, values, strict=True):
        if isinstance(made, Mapping):
            made[name] = value  # type: ignore[index]
        else:
            object.__setattr__(made, name, value)  # frozen dataclasses too
    return made
