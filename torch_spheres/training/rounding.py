"""How far two results may differ when kernels of other shapes have computed them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torch_spheres.runtime.caller_context import AUTOCAST_DEVICES

if TYPE_CHECKING:
    from torch_spheres.training.sharded_call import ShardedCall

__all__ = ["differs", "rounding_of"]

_PIECE = 1 << 20  # elements
_TIES = 0.01  # of all integers
_COARSE = torch.finfo(torch.float16).eps  # a mantissa of ten bits, which TF32 has too


def rounding_of(call: ShardedCall) -> float:
    """The relative precision in which a call's results are computed: of the coarsest type."""
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
    """Whether they differ by more than rounding.

    Half of the digits may be lost on the way through a deep network, each of whose sums is made in
    another order: the square root of the precision (or `relative`) times the largest value. (A
    model that looks across rows differs by far more.) A least or largest value that is there
    several times, such as the -1e9 of what is masked, is none to compare with. Integers have to be
    equal, but for a few that are places in an order of nearly equal numbers; those made of numbers
    of half precision have ties that fall either way.
    """
    if a.shape != b.shape:
        return True
    if not (a.is_floating_point() or a.is_complex()):
        return eps < _COARSE and float((a != b).double().mean()) > _TIES if a.numel() else False
    eps = max(eps, torch.finfo(a.dtype).eps)
    largest = most = 0.0
    # In pieces: logits of a language model fill the memory, and more so in double precision.
    for p, q in zip(
        a.detach().flatten().split(_PIECE), b.detach().flatten().split(_PIECE), strict=True
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
    # Values that cancel leave what is rounding of larger ones.
    return most > max((relative or math.sqrt(eps)) * largest, 32 * eps)


def _double(values: Tensor) -> Tensor:
    return values.to(torch.complex128 if values.is_complex() else torch.float64)
