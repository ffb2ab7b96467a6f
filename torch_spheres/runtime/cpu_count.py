"""Counts the cores that this process may use: the default of a pool's `concurrency`."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path

__all__ = ["usable_cores"]


def usable_cores() -> int:
    """Counts the cores that this process may use: the default of `KissingSpheres.concurrency`.

    Returns:
        The size of the CPU affinity mask, or the cgroup's CPU quota (rounded up) if that is less;
        at least 1.
    """
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        cores = os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        # Without a quota the file has "max 100000", of which int() raises ValueError.
        cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(1, cores)
