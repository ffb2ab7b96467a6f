"""DataPipes, which torch no longer develops, as its own loader treats them.

They are not made for threads: each logical worker has a deep copy, gives the same seed to what
shuffles in it as all others do, and takes its part where the pipe says that it can be divided.
"""

from __future__ import annotations

import copy
import threading
from typing import Any

import torch
import torch.distributed as dist
import torch.utils.data

__all__ = ["DATA_PIPES", "copy_pipe", "seed_pipe", "shard_pipe"]

# (torch may drop them.)
_ITERABLE = getattr(torch.utils.data, "IterDataPipe", None)
_MAP = getattr(torch.utils.data, "MapDataPipe", None)
# Torch finds the pipes in a pipe with a hook that it sets on the class, for one thread at a time; a
# deep copy meanwhile would have the hook called too.
_one_at_a_time = threading.Lock()
DATA_PIPES = tuple(kind for kind in (_ITERABLE, _MAP) if kind is not None)


def copy_pipe(pipe: Any) -> Any:
    """All of it; without the wrapper that the loader has it in, which would be pickled."""
    inner = getattr(pipe, "_datapipe", None)
    with _one_at_a_time:
        return copy.deepcopy(pipe) if inner is None else type(pipe)(copy.deepcopy(inner))


def seed_pipe(pipe: Any, seed: int | None) -> None:
    """For an epoch, whatever shuffles in it."""
    if seed is not None and _ITERABLE is not None and isinstance(pipe, _ITERABLE):
        generator = torch.Generator().manual_seed(seed)
        with _one_at_a_time:
            torch.utils.data.graph_settings.apply_random_seed(pipe, generator)


def shard_pipe(pipe: Any, workers: int, number: int) -> None:
    """One worker's part, of those of all processes."""
    world, rank = 1, 0
    if dist.is_available() and dist.is_initialized():
        world, rank = dist.get_world_size(), dist.get_rank()
    with _one_at_a_time:
        torch.utils.data.graph_settings.apply_sharding(pipe, workers * world, number * world + rank)
