"""Has torch's OpenMP threads sleep while spheres need their cores.

An OpenMP thread that has finished its part of a kernel spins for some milliseconds in case another
kernel follows. Meanwhile a sphere that was woken for a shard waits for the core: a step of an MLP
that takes 5 ms on two cores took 9. `training.executor` holds the calling thread's OpenMP threads,
see cpp/openmp_team.h, until the shards are done.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from torch_spheres._core import HeldTeam
from torch_spheres.runtime.forks import came_from_threads

__all__ = ["openmp_threads_asleep"]


_FUNCTIONS = ("GOMP_parallel_start", "GOMP_parallel_end", "omp_get_num_threads")


def _libraries() -> Iterator[ctypes.CDLL]:
    """Where torch may have OpenMP from: first what all of the process sees, as preloaded ones."""
    yield ctypes.CDLL(None)
    for path in sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*.so*")):
        with contextlib.suppress(OSError):  # one that is not loaded
            yield ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD)


@functools.cache
def _addresses() -> tuple[int, int, int] | None:
    """Of `_FUNCTIONS`; None where torch does without OpenMP, or with one that lacks them."""
    if "parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return None
    for library in _libraries():
        with contextlib.suppress(AttributeError):
            start, end, team_size = (
                ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0
                for name in _FUNCTIONS
            )
            return start, end, team_size
    return None


def openmp_threads_asleep() -> contextlib.AbstractContextManager[None]:
    """Inside the block, which runs no kernel of its own, the calling thread's OpenMP threads sleep.

    They are made first if the thread has none yet; its next parallel kernel finds them awake. (What
    runs in the block nevertheless, a signal handler for one, has one intra-op thread.)
    """
    threads, addresses = torch.get_num_threads(), _addresses()
    if threads == 1 or addresses is None or came_from_threads():
        return contextlib.nullcontext()
    return HeldTeam(*addresses, threads)
