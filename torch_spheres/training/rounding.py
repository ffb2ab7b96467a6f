"""Tells rounding from real differences between two results of other shapes; for row_check.py."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torch_spheres.runtime.caller_context import AUTOCAST_DEVICES

if TYPE_CHECKING:
    from torch_spheres.training.sharded_call import ShardedCall

__all__ = ["differs", "rounding_of"]

_CHUNK = 1 << 20  # elements that are compared at a time
_TIES = 0.01  # share of integers that may differ
_COARSE = torch.finfo(torch.float16).eps  # a mantissa of ten bits, which TF32 has too


def rounding_of(call: ShardedCall) -> float:
    """The machine epsilon of the coarsest type that a call computes in."""
    tensors = [*call.module.parameters(), *call.split.flat]
    eps = 0.0
    for value in tensors:
        if not isinstance(value, Tensor):
            continue
        if value.is_floating_point() or value.is_complex():
            eps = max(eps, torch.finfo(value.dtype).eps)
        kind = value.device.type
        if kind in AUTOCAST_DEVICES and torch.is_autocast_enabled(kind):
            eps = max(eps, torch.finfo(torch.get_autocast_dtype(kind)).eps)
        if not value.is_cpu:
            eps = max(eps, _COARSE)  # convolutions take TF32 for float32 by default
    if torch.get_float32_matmul_precision() != "highest":
        eps = max(eps, torch.finfo(torch.bfloat16).eps)
    return eps or torch.finfo(torch.get_default_dtype()).eps


def differs(a: Tensor, b: Tensor, eps: float, relative: float | None = None) -> bool:
    """Whether two results differ by more than rounding.

    A deep network may lose half of the digits, since each of its sums is made in another order. So
    the limit is the square root of `eps` (or `relative`) times the largest value; a model that
    looks across rows differs by far more. An extreme value that occurs several times, such as the
    -1e9 of masked positions, does not count as the largest. Integers have to be equal but for a
    few, which may be ranks of nearly equal numbers; with half precision any may be.
    """
    if a.shape != b.shape:
        return True
    if not (a.is_floating_point() or a.is_complex()):
        return eps < _COARSE and float((a != b).double().mean()) > _TIES if a.numel() else False
    eps = max(eps, torch.finfo(a.dtype).eps)
    largest = most = 0.0
    # In chunks, since a language model's logits in double precision may not fit into memory.
    for p, q in zip(
        a.detach().flatten().split(_CHUNK), b.detach().flatten().split(_CHUNK), strict=True
    ):
        p, q = _double(p), _double(q)
        finite = p.isfinite() & q.isfinite()
        if not torch.equal(p.isfinite(), q.isfinite()):
            return True
        p, q = p[finite], q[finite]
        if p.numel():
            most = max(most, float((p - q).abs().max()))
            size = torch.maximum(p.abs(), q.abs())
            if not p.is_complex():
                for extreme in (p.min(), p.max()):
                    there = (p == extreme) & (q == extreme)
                    if int(there.sum()) > 1:
                        size[there] = 0
            largest = max(largest, float(size.max()))
    # Values that cancel leave the rounding of larger ones.
    return most > max((relative or math.sqrt(eps)) * largest, 32 * eps)


def _double(values: Tensor) -> Tensor:
    return values.to(torch.complex128 if values.is_complex() else torch.float64)
