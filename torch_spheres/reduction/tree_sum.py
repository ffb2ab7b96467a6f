"""Adds tensors in the fixed tree, on which the bits of all gradients depend.

The twelve children of a node are always added as ::

    ((c0+c1)+(c2+c3)) + ((c4+c5)+(c6+c7)) + ((c8+c9)+(c10+c11))

with the outer two additions left to right and absent children left out. Shard *k* is the leaf whose
path is *k* in base 12, least significant digit first. C++ kernels add dense CPU tensors of float32,
float64, bfloat16 and float16, the half types in float32 with one rounding at the root; torch's own
additions, in the same tree, add everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torch_spheres import _compat, _core

if TYPE_CHECKING:
    from torch_spheres.runtime.pool import SpherePool
    from torch_spheres.spheres import KissingSpheres

__all__ = ["depth_of", "tree_sum", "tree_sums"]

_KISSING = _core.KISSING
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_HALF = (torch.bfloat16, torch.float16)
_form = attrgetter("shape", "dtype", "device", "layout")

_core.read_tensors_by(_compat.dlpack_exchange)  # C++ takes no tensor before


def tree_sum(
    shards: Sequence[Tensor | None],
    *,
    out: Tensor | None = None,
    spheres: KissingSpheres | None = None,
) -> Tensor | None:
    """Adds the tensors of 1, 12, 144 or 1728 shards in a fixed tree.

    The twelve children *c* of a node are added as
    ``((c0+c1)+(c2+c3)) + ((c4+c5)+(c6+c7)) + ((c8+c9)+(c10+c11))``, and absent ones are left out.
    float16 and bfloat16 are added in float32, and rounded once at the root.

    Args:
        shards: tensors of one shape, dtype, device and layout, which may be any; None for absent
            shards. Shard *k* is the leaf whose path is *k* in base 12, least significant digit
            first.
        out: a dense tensor of that shape, dtype and device that gets the sum; it may be one of the
            shards.
        spheres: a pool that shares the work when the tensors are large. The bits do not depend on
            it.

    Returns:
        The sum: `out` if given, else a new tensor; None when every shard is absent.

    Raises:
        TypeError: a shard is neither a tensor nor None.
        ValueError: another number of shards, or tensors that do not match.
    """
    return tree_sums([shards], outs=[out], spheres=spheres)[0]


def tree_sums(
    tensors: Sequence[Sequence[Tensor | None]],
    *,
    outs: Sequence[Tensor | None] | None = None,
    spheres: SpherePool | None = None,
) -> list[Tensor | None]:
    """Adds many tensors, in one pass over the spheres; each row of `tensors` as in `tree_sum`."""
    results: list[Tensor | None] = []
    jobs = {count: _core.SumJob(depth_of(count)) for count in {*map(len, tensors)}}
    copies: list[tuple[Tensor, Tensor]] = []
    keep_alive: list[object] = []  # the jobs have their addresses
    for i, shards in enumerate(tensors):
        out = outs[i] if outs is not None else None
        job = jobs[len(shards)]
        first = next((t for t in shards if t is not None), None)
        if first is None:
            results.append(None)
            continue
        # The usual case: C++ checks the tensors.
        total = _new_like(first) if out is None else out
        if total is None or not job.try_add(shards, total):
            total = _add_unusual(job, shards, first, out, copies, keep_alive)
        results.append(total)
    core = spheres._core if spheres is not None else None
    for job in jobs.values():
        job.run(core)
    for target, total in copies:
        target.copy_(total)
    return results


def _new_like(first: Tensor) -> Tensor | None:
    if first.layout is not torch.strided or first.dtype not in _DTYPES or not first.is_cpu:
        return None
    return torch.empty_like(first, memory_format=torch.contiguous_format)


@torch.no_grad()
def _add_unusual(
    job: _core.SumJob,
    shards: Sequence[Tensor | None],
    first: Tensor,
    out: Tensor | None,
    copies: list[tuple[Tensor, Tensor]],
    keep_alive: list[object],
) -> Tensor:
    """Adds what `try_add` refuses: other layouts, dtypes and devices, overlaps; raises errors."""
    _check(shards, first, out)
    total = _new_like(first)
    if total is None:
        total = _sum_in_torch(shards, job.depth)
        return total if out is None else out.copy_(total)
    plain = [None if t is None else t.resolve_neg().contiguous().clone() for t in shards]
    if not job.try_add(plain, total):  # of a subclass of Tensor
        total.copy_(_sum_in_torch(shards, job.depth))
    keep_alive.append(plain)
    if out is None:
        return total
    copies.append((out, total))
    return out


def depth_of(shards: int) -> int:
    """Levels below the root of the tree with 1, 12, 144 or 1728 shards.

    Raises:
        ValueError: another number of shards.
    """
    for depth in range(_core.MAX_LEVELS):
        if shards == _KISSING**depth:
            return depth
    raise ValueError(f"the tree has 1, 12, 144 or 1728 shards, got {shards}")


def _check(shards: Sequence[Tensor | None], first: Tensor, out: Tensor | None) -> None:
    for k, t in enumerate((*shards, out)):
        if t is None:
            continue
        name = "out" if k == len(shards) else f"shard {k}"
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor or None, got {t!r}")
        if _form(t) != _form(first):
            raise ValueError(
                f"{name} is {t.dtype} {tuple(t.shape)} {t.layout} on {t.device}, but the first "
                f"shard is {first.dtype} {tuple(first.shape)} {first.layout} on {first.device}"
            )


def _sum_in_torch(shards: Sequence[Tensor | None], depth: int) -> Tensor:
    dtype = next(t.dtype for t in shards if t is not None)
    widen: Callable[[Tensor], Tensor] = (lambda t: t.float()) if dtype in _HALF else (lambda t: t)

    def node(level: int, offset: int) -> Tensor | None:
        if level == depth:
            leaf = shards[offset]
            return None if leaf is None else widen(leaf)
        step = _KISSING**level
        return _add_twelve([node(level + 1, offset + step * g) for g in range(_KISSING)])

    total = node(0, 0)
    assert total is not None
    # The sum of a single shard is the shard's own tensor, which the caller may write to.
    is_shard = any(total is t for t in shards)
    return total.clone() if is_shard else total.to(dtype)


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None:
        return b
    return a if b is None else a + b


def _add_twelve(c: list[Tensor | None]) -> Tensor | None:
    q0, q1, q2 = (_add(_add(c[i], c[i + 1]), _add(c[i + 2], c[i + 3])) for i in (0, 4, 8))
    return _add(_add(q0, q1), q2)
