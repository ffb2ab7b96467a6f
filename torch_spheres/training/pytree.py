"""Flattens nested values to a list of leaves, and back.

Beside what torch's pytree knows, these functions open distributions, key-value caches, dataclasses
and mappings. Used for arguments (row_dims.py), outputs and random states of a call.
"""

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
    """The structure of a nested value; equal for values of the same structure."""

    spec: Any  # pytree's TreeSpec
    objects: tuple[_ObjectSpec | None, ...]  # for each leaf of `spec`

    def in_objects(self) -> list[bool]:
        """For each leaf, whether it is inside a distribution, a transform or a key-value cache."""
        found: list[bool] = []
        for opened in self.objects:
            if opened is None:
                found.append(False)
            else:
                inside = opened.inside.in_objects()
                found += [True] * len(inside) if opened.example is None else inside
        return found


@dataclass(frozen=True)
class _ObjectSpec:
    """An object that pytree takes for a leaf, although it holds tensors."""

    example: Any = dataclasses.field(compare=False)  # to copy; None: made from `names` alone
    kind: type
    names: tuple[Any, ...]  # fields, attributes, or keys of a mapping
    inside: Nesting


_TENSOR = Nesting(_compat.pytree and _compat.pytree.tree_flatten(0)[1], (None,))


def flatten(value: Any, is_leaf: IsLeaf | None = None) -> tuple[list[Any], Nesting]:
    """The leaves of `value` and its structure.

    Containers that pytree knows are opened, distributions and key-value caches too; a dataclass or
    an unregistered mapping is opened if it holds a tensor. A PackedSequence is a leaf.

    Args:
        value: anything.
        is_leaf: whether a container is a leaf.
    """
    if isinstance(value, Tensor) or type(value) in _PLAIN:  # the usual case
        return [value], _TENSOR
    # A PackedSequence is a named tuple, but its parts mean nothing by themselves.
    flat, spec = _compat.pytree.tree_flatten(
        value, is_leaf=lambda v: isinstance(v, _LEAVES) or (is_leaf is not None and is_leaf(v))
    )
    leaves: list[Any] = []
    objects: list[_ObjectSpec | None] = []
    for leaf in flat:
        found = None if isinstance(leaf, Tensor) else _flatten_object(leaf, is_leaf)
        if found is None:
            leaves.append(leaf)
            objects.append(None)
        else:
            leaves.extend(found[0])
            objects.append(found[1])
    return leaves, Nesting(spec, tuple(objects))


def flatten_output(value: Any) -> tuple[list[Any], Nesting]:
    """`flatten`, with lists and tuples without tensors as leaves: they may have one per row."""
    return flatten(value, _is_plain_sequence)


def _is_plain_sequence(value: Any) -> bool:
    if not is_sequence(value) or isinstance(value, np.ndarray):
        return False
    if any(isinstance(v, Tensor) for v in value):
        return False  # the usual case
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
        # Attributes beside the fields may have been computed from those.
        names = tuple(dict.fromkeys([*fields, *getattr(leaf, "__dict__", ())]))
        values = [getattr(leaf, name) for name in names]
    else:
        return None
    leaves, inside = _flatten_fields(values, is_leaf)
    if not any(isinstance(v, Tensor) or (is_leaf is not None and _has_rows(v)) for v in leaves):
        return None
    return leaves, _ObjectSpec(leaf, type(leaf), names, inside)


def _check_copies(mapping: Mapping[Any, Any], names: tuple[Any, ...]) -> None:
    """Raises a TypeError for a mapping that cannot be copied with other values."""
    if isinstance(mapping, MappingProxyType):
        return
    sentinel, name = object(), names[0]
    before = mapping[name]
    try:
        made: Any = copy.copy(mapping)
        made[name] = sentinel
        shares = mapping[name] is sentinel
        made[name] = before  # the copy may be the caller's own object
    except TypeError:
        shares = True
    if shares:
        raise TypeError(
            f"a {type(mapping).__name__} holds tensors, and copy.copy() gives no copy of it that "
            "could hold others; use a dict, or register it with "
            "torch.utils._pytree.register_pytree_node"
        )


def _flatten_fields(values: list[Any], is_leaf: IsLeaf | None) -> tuple[list[Any], Nesting]:
    # `values` is no user's list, so that it is no leaf.
    return flatten(values, is_leaf and (lambda v: v is not values and is_leaf(v)))


def _has_rows(leaf: Any) -> bool:
    return isinstance(leaf, (np.ndarray, list, tuple)) and len(leaf) > 0


# ---- distributions, transforms and key-value caches ----

_OBJECTS = (Distribution, Transform)
_Inverse = type(AffineTransform(0.0, 1.0).inv)


def is_opened_object(value: Any) -> bool:
    """Whether a value is a distribution, a transform or a key-value cache."""
    return isinstance(value, _OBJECTS) or _is_cache(value)


def _is_cache(value: Any) -> bool:
    """Whether a value is a cache of Hugging Face's transformers, or a layer of one."""
    module = sys.modules.get("transformers.cache_utils")
    if module is None:
        return False
    kinds = (getattr(module, name, None) for name in ("Cache", "CacheLayerMixin"))
    return isinstance(value, tuple(kind for kind in kinds if isinstance(kind, type)))


def _state(value: Any) -> dict[str, Any]:
    """An object's attributes, as values that can be cut and merged."""
    if isinstance(value, _Inverse):
        return {"inv": value.inv}
    state = dict(vars(value))
    if isinstance(value, Distribution):
        # A tensor of this shape, without memory, is cut by rows as others are.
        shape = torch.zeros((), dtype=torch.bool, device="cpu").expand(value.batch_shape)
        state["_batch_shape"] = shape
    elif isinstance(value, Transform):
        state["_inv"] = None
        if "_cached_x_y" in state:
            state["_cached_x_y"] = None, None
    return state


def _from_state(kind: type, state: dict[str, Any]) -> Any:
    if kind is _Inverse:
        return state["inv"].inv
    made: Any = object.__new__(kind)
    if isinstance(made, Distribution):
        state["_batch_shape"] = state["_batch_shape"].shape
    vars(made).update(state)
    return made


def unflatten(leaves: list[Any], nesting: Nesting) -> Any:
    """The inverse of `flatten`, with other leaves; objects are copies of the original ones."""
    if nesting is _TENSOR and len(leaves) == 1:
        return leaves[0]
    return _unflatten_from(iter(leaves), nesting)


def _unflatten_from(leaves: Iterator[Any], nesting: Nesting) -> Any:
    flat = [
        next(leaves)
        if opened is None
        else _unflatten_object(opened, _unflatten_from(leaves, opened.inside))
        for opened in nesting.objects
    ]
    return _compat.pytree.tree_unflatten(flat, nesting.spec)


def _unflatten_object(opened: _ObjectSpec, values: list[Any]) -> Any:
    if opened.example is None:
        return _from_state(opened.kind, dict(zip(opened.names, values, strict=True)))
    if isinstance(opened.example, MappingProxyType):
        return MappingProxyType(dict(zip(opened.names, values, strict=True)))
    made = copy.copy(opened.example)
    for name, value in zip(opened.names, values, strict=True):
        if isinstance(made, Mapping):
            made[name] = value  # type: ignore[index]
        else:
            object.__setattr__(made, name, value)  # frozen dataclasses too
    return made
