"""Merges the outputs of all shards, and cuts their gradients for the shards' backward.

Used by `ShardedCall`; merge_rules.py has the rules for one output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torch_spheres.training.batch_split import aligned
from torch_spheres.training.merge_rules import FIRST, ONCE, SCALAR, merge_output
from torch_spheres.training.row_check import compare_with_bare_module
from torch_spheres.training.shard import Shard

if TYPE_CHECKING:
    from torch_spheres.training.sharded_call import ShardedCall

__all__ = ["cut_grad", "merge_input_grad", "merge_outputs"]


def merge_outputs(call: ShardedCall, shards: Sequence[Shard]) -> list[Any]:
    """The whole batch's outputs, as flat leaves; sets the call's `merge_rules`."""
    if not shards:
        return []
    first = shards[0]
    call.nesting = first.nesting
    for k, shard in enumerate(shards):
        if shard.nesting != first.nesting:
            raise ValueError(
                f"the module returned {_described(first)} for shard 0, but {_described(shard)} for "
                f"shard {k}: the outputs' structure must not depend on the rows, as that of a list "
                "with tensors for each row does; stack or pad them into one tensor"
            )
    for i, value in enumerate(first.outputs):
        if isinstance(value, Tensor) and value.is_nested:
            raise TypeError(
                f"output {i} of the module is a nested tensor, which SphereParallel cannot put "
                "together; pad it inside the module (torch.nested.to_padded_tensor, output_size=)"
            )
        if isinstance(value, Tensor) and value.layout not in (torch.strided, torch.sparse_coo):
            raise TypeError(
                f"output {i} of the module is a tensor of layout {value.layout}, which "
                "SphereParallel cannot put together; return to_dense()"
            )
    columns = [*zip(*(shard.outputs for shard in shards), strict=True)]
    call.differentiable_outputs = [
        any(isinstance(v, Tensor) and v.requires_grad for v in values) for values in columns
    ]
    comparison = compare_with_bare_module(call, first.outputs, first.nesting)
    found = comparison.rules
    if comparison.means:
        call.scalars_are_sums = False
    assert call.nesting is not None
    inside = call.nesting.in_objects()
    sizes, dim = call.split.sizes, call.options.default_dim
    total = lambda v: call.collective.scalars_total(call, call.weighted(v))  # noqa: E731
    outputs: list[Any] = []
    with torch.no_grad():
        for i, values in enumerate(columns):
            rule = found[i]
            if inside[i] and isinstance(values[0], Tensor) and values[0].dim() == 0:
                rule = ONCE  # a parameter of a distribution is no loss
            elif rule == SCALAR and not _can_be_summed(values[0], call.scalars_are_sums):
                rule = ONCE
            output, rule = merge_output(i, values, sizes, rule, dim, total)
            outputs.append(output)
            call.merge_rules.append(rule)
    return outputs


def _can_be_summed(value: Any, sums: bool) -> bool:
    """Whether the shards' scalars have a total: no booleans, and integers only if summed."""
    if not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex():
        return True
    return sums and value.dtype is not torch.bool


def _described(shard: Shard) -> str:
    nesting = "" if shard.nesting is None else repr(shard.nesting.spec)
    return f"{len(shard.outputs)} values ({' '.join(nesting.split())[:100]})"


def cut_grad(
    call: ShardedCall, grad: Tensor | None, i: int, shards: list[Shard | None]
) -> list[Tensor | None] | None:
    """The part of each shard in the gradient of output `i`; None if it has none."""
    rule = call.merge_rules[i]
    if grad is None or rule == FIRST:
        return None
    if rule == SCALAR:
        return [*call.weighted([grad] * len(shards))]
    if rule == ONCE:
        return [grad, *[None] * (len(shards) - 1)]
    assert isinstance(rule, int)
    kinds = {s.outputs[i].layout for s in shards if s is not None}
    if kinds - {torch.strided}:
        raise TypeError(
            f"output {i} of the module is a tensor of layout {kinds.pop()}, whose gradient "
            "SphereParallel cannot cut into shards; return to_dense()"
        )
    sizes = [0 if shard is None else shard.outputs[i].shape[rule] for shard in shards]
    pieces = grad.split(sizes, rule) if sizes else ()
    return [aligned(piece if rule == 0 else piece.contiguous()) for piece in pieces]


def merge_input_grad(
    call: ShardedCall, value: Tensor, dim: int | None, parts: list[Tensor | None]
) -> Tensor | None:
    """The gradient of an argument, from those of its parts."""
    if dim is None:  # each shard had the whole argument
        return call.totals([parts], [value])[0]
    if all(part is None for part in parts):
        return None
    filled = [
        torch.zeros_like(value.narrow(dim, begin, end - begin)) if part is None else part
        for (begin, end), part in zip(call.split.bounds, parts, strict=True)
    ]
    return torch.cat(filled, dim)
