"""DataPipes, which torch no longer develops, treated as torch's own loader does.

They are not made for threads: each logical worker has a deep copy, seeds whatever shuffles in it as
all other workers do, and takes its part where the pipe says that it can be divided.
"""

from __future__ import annotations

import copy
import threading
from typing import Any

import torch
import torch.distributed as dist
import torch.utils.data

__all__ = ["DATA_PIPES", "copy_pipe", "seed_pipe", "shard_pipe"]

# (Torch may drop these classes.)
_ITERABLE = getattr(torch.utils.data, "IterDataPipe", None)
_MAP = getattr(torch.utils.data, "MapDataPipe", None)
# Torch finds the pipes inside a pipe by a hook that it sets on the class, so only one thread may do
# so at a time; a deep copy meanwhile would call the hook, too.
_hook_lock = threading.Lock()
DATA_PIPES = tuple(kind for kind in (_ITERABLE, _MAP) if kind is not None)


def copy_pipe(pipe: Any) -> Any:
    """A deep copy; with a new wrapper, as copying the one that the loader uses would pickle it."""
    inner = getattr(pipe, "_datapipe", None)
    with _hook_lock:
        return copy.deepcopy(pipe) if inner is None else type(pipe)(copy.deepcopy(inner))


def seed_pipe(pipe: Any, seed: int | None) -> None:
    """Seeds whatever shuffles in a pipe, for an epoch."""
    if seed is not None and _ITERABLE is not None and isinstance(pipe, _ITERABLE):
        generator = torch.Generator().manual_seed(seed)
        with _hook_lock:
            torch.utils.data.graph_settings.apply_random_seed(pipe, generator)


def shard_pipe(pipe: Any, workers: int, number: int) -> None:
    """Has a pipe give one worker's part: worker `number` of `workers` in each process."""
    world, rank = 1, 0
    if dist.is_available() and dist.is_initialized():
        world, rank = dist.get_world_size(), dist.get_rank()
    with _hook_lock:
        torch.utils.data.graph_settings.apply_sharding(pipe, workers * world, number * world + rank)
