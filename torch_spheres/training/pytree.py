"""Nested values as a flat list of leaves: what pytree knows, and other things that hold tensors."""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import AffineTransform, Distribution, Transform
from torch.nn.utils.rnn import PackedSequence

from torch_spheres import _compat
from torch_spheres.runtime.object_graph import is_sequence, tensor_inside

__all__ = ["Nesting", "flatten", "flatten_output", "is_opened_object", "unflatten"]

_LEAVES = (Tensor, PackedSequence, torch.Size)
_PLAIN = (type(None), bool, int, float, str)
IsLeaf = Callable[[Any], bool]


@dataclass(frozen=True)
class Nesting:
    """How leaves were nested; equal for values of the same structure."""

    spec: Any  # pytree's TreeSpec
    opened: tuple[_ObjectSpec | None, ...]  # for each leaf of `spec`

    def in_objects(self) -> list[bool]:
        """Of each leaf, whether it is part of a distribution or the like."""
        found: list[bool] = []
        for opened in self.opened:
            if opened is None:
                found.append(False)
            else:
                inside = opened.inside.in_objects()
                found += [True] * len(inside) if opened.example is None else inside
        return found


@dataclass(frozen=True)
class _ObjectSpec:
    """An object that pytree takes for a leaf, and that holds tensors nevertheless."""

    example: Any = dataclasses.field(compare=False)  # None: it is made anew, from all it has
    kind: type
    names: tuple[Any, ...]  # fields, attributes, or keys of a mapping
    inside: Nesting


_TENSOR = Nesting(_compat.pytree and _compat.pytree.tree_flatten(0)[1], (None,))


def flatten(value: Any, is_leaf: IsLeaf | None = None) -> tuple[list[Any], Nesting]:
    """The leaves of lists, tuples, dicts, dataclasses, mappings and what pytree has registered.

    Distributions and key-value caches are opened; a dataclass or an unregistered mapping is if
    there is a tensor in it, else it is a leaf. A PackedSequence is a leaf.

    Args:
        value: anything.
        is_leaf: tells which containers are to be leaves.
    """
    if isinstance(value, Tensor) or type(value) in _PLAIN:  # what most arguments are
        return [value], _TENSOR
    # (A PackedSequence is a named tuple, but its parts mean nothing by themselves.)
    flat, spec = _compat.pytree.tree_flatten(
        value, is_leaf=lambda v: isinstance(v, _LEAVES) or (is_leaf is not None and is_leaf(v))
    )
    leaves: list[Any] = []
    opened: list[_ObjectSpec | None] = []
    for leaf in flat:
        found = None if isinstance(leaf, Tensor) else _flatten_object(leaf, is_leaf)
        if found is None:
            leaves.append(leaf)
            opened.append(None)
        else:
            leaves.extend(found[0])
            opened.append(found[1])
    return leaves, Nesting(spec, tuple(opened))


def flatten_output(value: Any) -> tuple[list[Any], Nesting]:
    """As `flatten`; a list or tuple without tensors is a leaf: it may have an element per row."""
    return flatten(value, _is_plain_sequence)


def _is_plain_sequence(value: Any) -> bool:
    if not is_sequence(value) or isinstance(value, np.ndarray):
        return False
    if any(isinstance(v, Tensor) for v in value):
        return False  # (the usual case, in less time)
    return tensor_inside(value, (Tensor, np.ndarray)) is None


def _flatten_object(leaf: Any, is_leaf: IsLeaf | None) -> tuple[list[Any], _ObjectSpec] | None:
    names: tuple[Any, ...]
    if is_opened_object(leaf):
        state = _state(leaf)
        leaves, inside = _flatten_fields([*state.values()], is_leaf)
        return leaves, _ObjectSpec(None, type(leaf), tuple(state), inside)
    if isinstance(leaf, Mapping):
        names, values = tuple(leaf.keys()), list(leaf.values())
        if any(isinstance(v, Tensor) for v in values):
            _check_copies(leaf, names)
    elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
        fields = (f.name for f in dataclasses.fields(leaf) if hasattr(leaf, f.name))
        # (Attributes that it has computed from its fields are of those.)
        names = tuple(dict.fromkeys([*fields, *getattr(leaf, "__dict__", ())]))
        values = [getattr(leaf, name) for name in names]
    else:
        return None
    leaves, inside = _flatten_fields(values, is_leaf)
    if not any(isinstance(v, Tensor) or (is_leaf is not None and _has_rows(v)) for v in leaves):
        return None
    return leaves, _ObjectSpec(leaf, type(leaf), names, inside)


def _check_copies(mapping: Mapping[Any, Any], names: tuple[Any, ...]) -> None:
    """Raises a TypeError for a mapping that cannot be made anew with other values."""
    if isinstance(mapping, MappingProxyType):
        return
    mark, name = object(), names[0]
    before = mapping[name]
    try:
        made: Any = copy.copy(mapping)
        made[name] = mark
        shares = mapping[name] is mark
        made[name] = before  # it may be the caller's very own
    except TypeError:
        shares = True
    if shares:
        raise TypeError(
            f"a {type(mapping).__name__} holds tensors, and copy.copy() gives no copy of it that "
            "could hold others; use a dict, or register it with "
            "torch.utils._pytree.register_pytree_node"
        )


def _flatten_fields(values: list[Any], is_leaf: IsLeaf | None) -> tuple[list[Any], Nesting]:
    # (This list is ours, and no leaf.)
    return flatten(values, is_leaf and (lambda v: v is not values and is_leaf(v)))


def _has_rows(leaf: Any) -> bool:
    return isinstance(leaf, (np.ndarray, list, tuple)) and len(leaf) > 0


# ---- objects of which all is known ----

_OBJECTS = (Distribution, Transform)
_Inverse = type(AffineTransform(0.0, 1.0).inv)


def is_opened_object(value: Any) -> bool:
    """Whether it is a distribution, a transform or a key-value cache."""
    return isinstance(value, _OBJECTS) or _is_cache(value)


def _is_cache(value: Any) -> bool:
    """Whether it is a key-value cache of Hugging Face's transformers, or a layer of one."""
    module = sys.modules.get("transformers.cache_utils")
    if module is None:
        return False
    kinds = (getattr(module, name, None) for name in ("Cache", "CacheLayerMixin"))
    return isinstance(value, tuple(kind for kind in kinds if isinstance(kind, type)))


def _state(value: Any) -> dict[str, Any]:
    """All that an object has, as values to be put together."""
    if isinstance(value, _Inverse):
        return {"inv": value.inv}
    state = dict(vars(value))
    if isinstance(value, Distribution):
        # As a tensor of this shape, without memory: its rows are found as those of others.
        shape = torch.zeros((), dtype=torch.bool, device="cpu").expand(value.batch_shape)
        state["_batch_shape"] = shape
    elif isinstance(value, Transform):
        state["_inv"] = None
        if "_cached_x_y" in state:
            state["_cached_x_y"] = None, None
    return state


def _made(kind: type, state: dict[str, Any]) -> Any:
    if kind is _Inverse:
        return state["inv"].inv
    made: Any = object.__new__(kind)
    if isinstance(made, Distribution):
        state["_batch_shape"] = state["_batch_shape"].shape
    vars(made).update(state)
    return made


# ---- back again ----


def unflatten(leaves: list[Any], nesting: Nesting) -> Any:
    """The inverse of `flatten`, with other leaves; objects are copies of the first ones."""
    if nesting is _TENSOR and len(leaves) == 1:
        return leaves[0]
    return _take(iter(leaves), nesting)


def _take(leaves: Iterator[Any], nesting: Nesting) -> Any:
    flat = [
        next(leaves) if opened is None else _unflatten_object(opened, _take(leaves, opened.inside))
        for opened in nesting.opened
    ]
    return _compat.pytree.tree_unflatten(flat, nesting.spec)


def _unflatten_object(opened: _ObjectSpec, values: list[Any]) -> Any:
    if opened.example is None:
        return _made(opened.kind, dict(zip(opened.names, values, strict=True)))
    if isinstance(opened.example, MappingProxyType):
        return MappingProxyType(dict(zip(opened.names, values, strict=True)))
    made = copy.copy(opened.example)
    for name, value in zip(opened.names, values, strict=True):
        if isinstance(made, Mapping):
            made[name] = value  # type: ignore[index]
        else:
            object.__setattr__(made, name, value)  # frozen dataclasses too
    return made
