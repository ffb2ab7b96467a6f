"""Merges one output of all shards; used by merge_outputs.py and row_check.py."""

from __future__ import annotations

import enum
import functools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from torch_spheres.runtime.object_graph import is_sequence, parts_of, tensor_inside

__all__ = [
    "FIRST",
    "ONCE",
    "ROWS",
    "SCALAR",
    "STATISTIC",
    "MergeRule",
    "Refused",
    "is_array",
    "merge_output",
    "same",
]  # fmt: skip

SCALAR, ONCE, ROWS, FIRST = "scalar", "once", "rows", "first"


@dataclass(frozen=True)
class Refused:
    """The rule of an output that cannot be merged, whatever its values are."""

    why: str


MergeRule = int | str | Refused | None
"""How an output is merged.

An integer: concatenated along that dimension; `SCALAR`: a mean or sum; `ONCE`: the same for all
shards, of which one gets the gradient; `ROWS`: a sequence with an element for each row; `FIRST`:
the first shard's, for values that are no tensors; None: not known.
"""


def is_array(value: Any) -> bool:
    """Whether a value is a tensor or a numpy array."""
    return isinstance(value, (Tensor, np.ndarray))


def _dimensions(value: Any) -> int | None:
    return len(value.shape) if is_array(value) else None


def _described(value: Any) -> str:
    if is_array(value):
        return f"a {type(value).__name__.lower()} of shape {tuple(value.shape)}"
    return "None" if value is None else f"of type {type(value).__name__}"


def merge_output(
    i: int,
    values: Sequence[Any],
    sizes: Sequence[int],
    rule: MergeRule,
    preferred: int,
    total: Callable[[Sequence[Tensor]], Tensor],
) -> tuple[Any, MergeRule]:
    """Merges output `i` of the module; returns the output and its rule.

    Args:
        i: number of the output, for errors.
        values: of each shard.
        sizes: number of rows of each shard.
        rule: that the comparison with the bare module has found.
        preferred: dimension, if `rule` is None.
        total: returns the sum or mean of the shards' scalars.

    Raises:
        TypeError: values of this type cannot be merged.
        ValueError: the shards' values do not fit together.
    """
    first = values[0]
    if any(isinstance(v, PackedSequence) for v in values):
        raise TypeError(
            "SphereParallel cannot put together a PackedSequence that the module returned; "
            "pad it inside the module (torch.nn.utils.rnn.pad_packed_sequence, total_length=)"
        )
    for k, value in enumerate(values):
        if _dimensions(value) != _dimensions(first):
            raise ValueError(
                f"output {i} of the module is {_described(first)} for shard 0, but "
                f"{_described(value)} for shard {k}: what the module returns must not depend "
                "on the rows"
            )
    if isinstance(rule, Refused):
        raise ValueError(
            f"output {i} of the module, {_described(first)} for {sizes[0]} rows, {rule.why}"
        )
    if not is_array(first):
        return _merge_others(i, values, sizes, rule)
    if not len(first.shape) and isinstance(first, Tensor) and rule != ONCE:
        return total(values), SCALAR
    if rule == ONCE or not len(first.shape):
        return _once(i, values, sizes), ONCE
    dim = rule if isinstance(rule, int) else _dim_by_shape(values, sizes, preferred)
    _check_rows(i, values, sizes, dim)
    if isinstance(first, Tensor):
        return torch.cat(list(values), dim), dim
    if isinstance(first, np.ma.MaskedArray):
        return np.ma.concatenate(values, dim), dim  # type: ignore[no-untyped-call]
    return np.concatenate(values, dim), dim


STATISTIC = (
    "has no rows and differs from shard to shard, as a statistic over the batch does: each shard "
    "knows its own rows alone. Compute it from the outputs that have rows, outside of the module, "
    "or return one value for each row (expand it; a count is the sum of such). Floating-point "
    "tensors without dimensions are averaged or summed, see scalars=. If the batch is not "
    "dimension 0 of the arguments (batch_first=False), SphereParallel(..., batch_dim=1) says so"
)


def _once(i: int, values: Sequence[Any], sizes: Sequence[int]) -> Any:
    """The value of an output that does not depend on the rows."""
    first = values[0]
    if not all(same(value, first) for value in values):
        raise ValueError(
            f"output {i} of the module, {_described(first)} for {sizes[0]} rows, {STATISTIC}"
        )
    return first.detach().clone() if isinstance(first, Tensor) else first


def _dim_by_shape(values: Sequence[Any], sizes: Sequence[int], preferred: int) -> int:
    """The dimension of rows, by the shapes: the preferred one, if it can be that."""
    preferred = min(preferred, len(values[0].shape) - 1)
    fitting = [d for d in range(len(values[0].shape)) if _misfit(values, sizes, d) is None]
    # Shards of different sizes show which dimension follows the rows; equal ones do not.
    if preferred not in fitting and len(fitting) == 1 and len({*sizes}) > 1:
        return fitting[0]
    return preferred


def _misfit(values: Sequence[Any], sizes: Sequence[int], dim: int) -> int | None:
    """The first shard whose shape does not follow its rows along `dim`."""
    first = values[0].shape
    times, rest = divmod(first[dim], sizes[0])
    others = (*first[:dim], *first[dim + 1 :])
    for k, value in enumerate(values):
        shape = value.shape
        if rest or shape[dim] != times * sizes[k] or (*shape[:dim], *shape[dim + 1 :]) != others:
            return k
    return None


def _check_rows(i: int, values: Sequence[Any], sizes: Sequence[int], dim: int) -> None:
    if len(values) == 1:
        return
    k = _misfit(values, sizes, dim)
    if k is not None:
        raise ValueError(
            f"output {i} of shard {k} has shape {tuple(values[k].shape)} for {sizes[k]} rows "
            f"(shard 0's: {tuple(values[0].shape)} for {sizes[0]}): SphereParallel puts this "
            f"output together along dimension {dim}, which must be the batch's rows, "
            "or a fixed number of rows for each; transpose it inside the module"
        )


# ---- values that are no tensors ----


def _merge_others(
    i: int, values: Sequence[Any], sizes: Sequence[int], rule: MergeRule
) -> tuple[Any, MergeRule]:
    first = values[0]
    held = None if first is None else tensor_inside(first)
    if held is not None:
        raise TypeError(
            f"output {i} of the module is a {type(first).__name__} that holds a tensor"
            f"{f' ({held[0]})' if held[0] else ''}, which SphereParallel cannot put together: "
            "return the tensors themselves, in a tuple, dict or dataclass, and make the object of "
            "them outside; or register its class with torch.utils._pytree.register_pytree_node"
        )
    if isinstance(first, Iterator):
        raise TypeError(
            f"output {i} of the module is a {type(first).__name__}, which can be read only once; "
            "return a list or a tensor"
        )
    if len(values) == 1:
        return first, ROWS if rule == ROWS else FIRST
    equal = all(same(value, first) for value in values)
    by_rows = is_sequence(first) and all(map(is_sequence, values)) and rule != ONCE
    if by_rows and all(len(v) == n for v, n in zip(values, sizes, strict=True)):
        if rule == ROWS or not equal:
            return _joined(values), ROWS
        raise ValueError(
            f"output {i} of the module is a {type(first).__name__} of {len(first)} elements, "
            "as many as a shard has rows, and the same for all shards: it is not clear whether "
            "it has one for each row; return a tensor"
        )
    if not equal:
        raise ValueError(
            f"output {i} of the module, {_described(first)}, is no tensor and differs from shard "
            f"to shard ({_short(first)}, {_short(next(v for v in values if not same(v, first)))}); "
            "return a tensor: one value for each row is put together, one without dimensions is "
            "averaged or summed"
        )
    return first, FIRST


def _joined(values: Sequence[Any]) -> Any:
    elements = [element for value in values for element in value]
    kind = type(values[0])
    return kind(elements) if kind in (tuple, deque) else elements


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."


def same(a: Any, b: Any, depth: int = 4) -> bool:
    """Whether two values are equal: tensors bit by bit, objects by what they hold."""
    if a is b or depth < 0:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        if a.is_meta:
            return True  # meta tensors have no values
        a, b = (t.to_dense() if t.layout is not torch.strided else t for t in (a, b))
        if torch.equal(a, b):
            return True
        return bool(((a == b) | ((a != a) & (b != b))).all())  # NaN equals NaN here
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.shape == b.shape and all(map(same, a.ravel().tolist(), b.ravel().tolist()))
    if isinstance(a, float) and isinstance(b, float):
        return a == b or (math.isnan(a) and math.isnan(b))
    if type(a) is not type(b):
        return False
    if is_sequence(a):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, enum.Enum):
        return False  # members are the same object if equal
    if getattr(type(a), "__eq__", None) is object.__eq__ or isinstance(a, functools.partial):
        return _same_state(a, b, depth)
    try:
        return bool(a == b)
    except (ValueError, TypeError, RuntimeError):  # data frames compare by element
        equals = getattr(a, "equals", None)
        return bool(equals(b)) if callable(equals) else repr(a) == repr(b)


def _same_state(a: Any, b: Any, depth: int) -> bool:
    """Whether two objects without ``__eq__`` hold the same."""
    mine, other = [*parts_of(a)], [*parts_of(b)]
    if not mine and not other:
        is_plain = repr(a).endswith(f" at {hex(id(a))}>") or callable(a)
        return is_plain or repr(a) == repr(b)
    return len(mine) == len(other) and all(
        name == name_b and same(value, value_b, depth - 1)
        for (name, value), (name_b, value_b) in zip(mine, other, strict=True)
    )
