"""The first call of each of MKL's vector functions, by one thread alone.

torch on x86 hands elementwise functions of float32 and float64 to Intel's MKL, a part of the tensor
on each thread. MKL looks for its kernel in the first call of a function; when that comes from
several threads at once, one of them may compute its whole part with a kernel of low accuracy (3e-4
off in a square root, so in AdamW's first step). The next call is right again, and nobody is told:
https://github.com/pytorch/pytorch/issues/188792. One run in some dozens had other bits on a busy
machine; see tools/first_call_race.py.
"""

from __future__ import annotations

import torch

from torch_spheres.runtime.caller_context import unset
from torch_spheres.runtime.process_wide import is_on

__all__ = ["FUNCTIONS", "settle"]

# Those that aten/src/ATen/cpu/vml.h implements by MKL.
FUNCTIONS = (
    "acos", "asin", "atan", "cos", "erf", "erfc", "erfinv", "exp", "log", "log10", "log2", "sin",
    "sqrt", "tan", "tanh", "trunc",
)  # fmt: skip


def settle() -> None:
    """Has MKL choose all kernels now, on the thread that imports the first part that needs threads.

    Takes some milliseconds, mostly to read the kernels' pages. With another MKL, or none, it does
    nothing; ``TORCH_SPHERES_WARM_UP_MKL=0`` in the environment leaves it out.
    """
    if not is_on("TORCH_SPHERES_WARM_UP_MKL"):
        return
    with unset(), torch.no_grad():
        for dtype in (torch.float32, torch.float64):
            x = torch.full((1,), 0.5, dtype=dtype, device="cpu")
            for name in FUNCTIONS:
                getattr(torch, name)(x)
