"""Torch's intra-op threads, which stay in the way of the spheres after a kernel is done.

An OpenMP thread that has finished its part of a kernel spins for some milliseconds in case there is
a next one. Meanwhile a sphere that was woken for a shard waits for the core: a step that takes 10
ms on two cores took 14. `rest` ends the calling thread's OpenMP threads; its next parallel kernel
makes new ones, which costs some 0.1 ms. What they compute, and how many they are, stays as it was.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path

import torch

__all__ = ["rest"]

_SOFT = 1  # omp_pause_soft of OpenMP 5.0


@functools.cache
def _pause() -> Callable[[int], int] | None:
    """omp_pause_resource_all() of the OpenMP library that this torch uses, if it has one."""
    for path in sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*.so*")):
        try:
            library = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD)
            function: Callable[[int], int] = library.omp_pause_resource_all
        except (OSError, AttributeError):
            continue  # not loaded, or older than OpenMP 5.0
        return function
    return None


def rest() -> None:
    """Frees the cores for the spheres, until the calling thread needs its own threads again."""
    pause = _pause()
    if pause is not None:
        pause(_SOFT)  # its result only says that there was something to end
