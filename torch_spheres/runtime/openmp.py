"""Has torch's OpenMP threads sleep while spheres need their cores.

An OpenMP thread that has finished its part of a kernel spins for some milliseconds in case another
kernel follows. Meanwhile a sphere that was woken for a shard waits for the core: a step of an MLP
that takes 5 ms on two cores took 9. `training.executor` holds the calling thread's OpenMP threads,
see cpp/openmp_team.h, until the shards are done.

Not in a process that was forked and has not run another program since: if a kernel had used several
threads in its parent, GNU's OpenMP waits there for threads that do not exist, in any region, for
ever. (Kernels of torch hang there too, but a small model has none that uses several threads.)
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

__all__ = ["openmp_threads_asleep"]

_FUNCTIONS = ("GOMP_parallel_start", "GOMP_parallel_end", "omp_get_num_threads")
_FORKED = 0x40  # PF_FORKNOEXEC of Linux's process flags


def _libraries() -> Iterator[ctypes.CDLL]:
    """Where torch may have OpenMP from: first what all of the process sees, as preloaded ones."""
    yield ctypes.CDLL(None)
    for path in sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*.so*")):
        with contextlib.suppress(OSError):  # one that is not loaded
            yield ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD)


def _was_forked() -> bool:
    """Whether this process has been forked and has run no other program since (Linux)."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return bool(int(fields[6]) & _FORKED)


@functools.cache
def _addresses(_process: int) -> tuple[int, int, int] | None:
    """Of `_FUNCTIONS`, for a process; None where no threads can be held."""
    if _was_forked() or "parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return None
    for library in _libraries():
        with contextlib.suppress(AttributeError):  # no OpenMP, or one that lacks them
            start, end, team_size = (
                ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0
                for name in _FUNCTIONS
            )
            return start, end, team_size
    return None


def openmp_threads_asleep() -> contextlib.AbstractContextManager[None]:
    """Inside the block, which runs no kernel of its own, the calling thread's OpenMP threads sleep.

    They are made first if the thread has none yet; its next parallel kernel finds them awake.
    """
    threads, addresses = torch.get_num_threads(), _addresses(os.getpid())
    if threads == 1 or addresses is None:
        return contextlib.nullcontext()
    return HeldTeam(*addresses, threads)
