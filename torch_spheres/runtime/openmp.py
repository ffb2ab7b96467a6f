"""Ends torch's OpenMP threads, which would keep cores from the spheres after a parallel kernel.

An OpenMP thread that has finished its part of a kernel spins for some milliseconds in case another
kernel follows. Meanwhile a sphere that was woken for a shard waits for the core: a step that takes
10 ms on two cores took 14. `training.executor` calls `stop_openmp_threads` before it runs shards.

The caller's next parallel kernel makes new threads, in 0.1 ms. But some schedulers put the new
thread on the caller's own core, where it waits while the caller spins for it: 8 ms, seen on Linux
6.18 in a virtual machine. Such placement begins after any number of good steps. So
`training.autotune` measures both, and measures anew when a step takes much longer than it did.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path

import torch

from torch_spheres import _compat

__all__ = ["start_openmp_threads", "stop_openmp_threads"]

_OMP_PAUSE_SOFT = 1  # of OpenMP 5.0
_PARALLEL = 1 << 17  # elements for which torch uses all threads


@functools.cache
def _pause_function() -> Callable[[int], int] | None:
    """``omp_pause_resource_all`` of the OpenMP library that torch has loaded, if it has one."""
    for path in sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*.so*")):
        try:
            library = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD)
            function: Callable[[int], int] = library.omp_pause_resource_all
        except (OSError, AttributeError):
            continue  # not loaded, or older than OpenMP 5.0
        return function
    return None


def start_openmp_threads() -> None:
    """Has the calling thread make its OpenMP threads again, as its next parallel kernel would.

    Where a mode looks at the thread's operators it is left to that kernel.
    """
    if not _compat.dispatch_modes() and not _compat.function_modes():
        torch.empty(_PARALLEL, device="cpu").fill_(0)


def stop_openmp_threads() -> None:
    """Ends the calling thread's OpenMP threads.

    The thread's next parallel kernel starts new ones, as many as before, in some 0.1 ms.
    """
    pause = _pause_function()
    if pause is not None:
        pause(_OMP_PAUSE_SOFT)  # its result only says whether there was something to end
