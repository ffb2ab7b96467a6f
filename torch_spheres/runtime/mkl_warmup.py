"""Calls each of MKL's vector functions once on import, before several threads may call it first.

torch on x86 computes elementwise functions of float32 and float64 by Intel's MKL, a part of the
tensor on each thread. MKL chooses a kernel in the first call of a function. If several threads make
that call at once, one of them may compute its whole part with a kernel of low accuracy (a square
root, and so AdamW's first step, was off by 3e-4); the next call is right again, and nothing reports
it: https://github.com/pytorch/pytorch/issues/188792. On a busy machine one run in some dozens had
other bits; tools/first_call_race.py shows it.
"""

from __future__ import annotations

import torch

from torch_spheres.runtime.caller_context import default_context
from torch_spheres.runtime.process_wide import is_on

__all__ = ["FUNCTIONS", "choose_kernels"]

# The functions that aten/src/ATen/cpu/vml.h implements by MKL.
FUNCTIONS = (
    "acos", "asin", "atan", "cos", "erf", "erfc", "erfinv", "exp", "log", "log10", "log2", "sin",
    "sqrt", "tan", "tanh", "trunc",
)  # fmt: skip


def choose_kernels() -> None:
    """Has MKL choose all kernels now, on the calling thread.

    Takes some milliseconds, mostly to read the kernels' pages. With another library it has no
    effect; ``TORCH_SPHERES_WARM_UP_MKL=0`` in the environment leaves it out.

    Raises:
        ValueError: the environment variable is neither 0 nor 1.
    """
    if not is_on("TORCH_SPHERES_WARM_UP_MKL"):
        return
    with default_context(), torch.no_grad():
        for dtype in (torch.float32, torch.float64):
            x = torch.full((1,), 0.5, dtype=dtype, device="cpu")
            for name in FUNCTIONS:
                getattr(torch, name)(x)
