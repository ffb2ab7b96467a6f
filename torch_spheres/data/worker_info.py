"""What a dataset sees of the logical worker that loads it: `get_worker_info`, `sample_seed`.

`torch.utils.data.get_worker_info` reads a global of its module, which is right for processes only.
After `install`, it returns to a logical worker's thread that worker's info, and to other threads
what torch's own function returns.

`default_collate` takes shared memory wherever there is a worker info, to hand tensors to another
process. Threads hand nothing over: while `default_collate` stacks tensors, there is no worker info.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from torch_spheres import _compat

__all__ = [
    "LoadPosition",
    "asked_for_info",
    "collates_plainly",
    "current_batch",
    "install",
    "sample_seed",
    "thread_shows",
]


class _ThreadState(threading.local):
    info: Any = None
    asked: bool = False  # whether the thread has read the info; `answer_worker_info` sets it
    position: LoadPosition | None = None


_thread = _ThreadState()
_install_lock = threading.Lock()
_torch_collate_fns = dict(_compat.collate_fns)


@contextlib.contextmanager
def thread_shows(**values: Any) -> Iterator[None]:
    """Sets the calling thread's `info` or `position` for a block.

    `get_worker_info()` returns the first; `sample_seed()` is computed from the second.
    """
    outer = {name: getattr(_thread, name) for name in values}
    vars(_thread).update(values)
    try:
        yield
    finally:
        vars(_thread).update(outer)


def asked_for_info() -> bool:
    """Whether code on this thread has asked for a logical worker's info."""
    return _thread.asked


def current_batch() -> int:
    """The number of the batch that this thread is loading; -1 if it loads none."""
    return -1 if _thread.position is None else _thread.position.batch


def _collate_tensors(batch: Any, *, collate_fn_map: Any = None) -> Any:
    """Torch's function for tensors; without shared memory on threads of this process."""
    with thread_shows(info=None):
        return _compat.collate_tensors(batch, collate_fn_map=collate_fn_map)


def install() -> None:
    """Makes `get_worker_info` and `default_collate` right for threads; repeated, does nothing."""
    with _install_lock:
        functions = _compat.collate_fns
        if functions.get(torch.Tensor) is _compat.collate_tensors:  # else it is the user's own
            functions[torch.Tensor] = _collate_tensors
        _compat.answer_worker_info(_thread)


def collates_plainly() -> bool:
    """Whether `default_collate` does what torch's does: no other functions are registered."""
    now = dict(_compat.collate_fns)
    if now.get(torch.Tensor) is _collate_tensors:
        now[torch.Tensor] = _compat.collate_tensors
    return now == _torch_collate_fns


# ---- a seed for each sample ----


@dataclass(slots=True)
class LoadPosition:
    """Where in the epoch a thread loads: what a sample's seed is made of."""

    base_seed: int
    batch: int  # its number in the epoch, from 0
    abandoned: threading.Event | None = None  # is set when nobody waits for the batch any more
    rows: Sequence[int] | None = None  # the samples' positions in the global batch; None: 0, 1, ...
    seed_index: int = 0  # 0: the batch as a whole; else 1 + the sample's position


_MASK = 2**64 - 1


def _splitmix64(value: int) -> int:
    """One step of SplitMix64."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def sample_seed() -> int:
    """A seed for the sample that ``Dataset.__getitem__`` of a wrapped loader is loading.

    It depends on the epoch's base seed, the number of the batch and the position in the batch: not
    on the number of workers, on the concurrency or on which thread loads. Where a whole batch is
    loaded at once (``__getitems__``, ``collate_fn``, iterable datasets) it is the batch's seed.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.

    Returns:
        0 to 2**63 - 1, fit for ``torch.Generator().manual_seed``, ``numpy.random.default_rng`` and
        ``random.Random``.

    Raises:
        RuntimeError: no loader that `wrap` has returned is loading in this thread; worker
            processes (``workers="process"``) do not know it either.
    """
    position = _thread.position
    if position is None:
        raise RuntimeError(
            "sample_seed() is known while a loader from torch_spheres.wrap() loads, in "
            "Dataset.__getitem__ and what it calls; this thread loads nothing"
        )
    mixed = _splitmix64(position.base_seed & _MASK)
    for number in (position.batch, position.seed_index):
        mixed = _splitmix64(mixed ^ number)
    return mixed >> 1
