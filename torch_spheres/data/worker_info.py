"""What a dataset sees of the logical worker that loads it: `get_worker_info` in every thread.

`torch.utils.data.get_worker_info` reads a global of its module, which is right for processes only.
With `install` a thread that loads for a logical worker sees that one's info, and everybody else
what torch's own function says.

`default_collate` takes shared memory wherever there is a worker info, to hand tensors to another
process. In threads nothing is handed over: while it stacks tensors, there is none.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from torch_spheres import _compat

__all__ = ["Position", "asked_for_info", "current_batch", "install", "sample_seed", "shown"]


class _Here(threading.local):
    info: Any = None
    asked: bool = False  # for it
    position: Position | None = None


_here = _Here()
_lock = threading.Lock()
_plain_map = dict(_compat.collate_fns)


@contextlib.contextmanager
def shown(**values: Any) -> Iterator[None]:
    """On the calling thread, inside the block: what `get_worker_info()` returns is `info`, and
    `sample_seed()` is that of `position`.
    """
    outer = {name: getattr(_here, name) for name in values}
    vars(_here).update(values)
    try:
        yield
    finally:
        vars(_here).update(outer)


def asked_for_info() -> bool:
    """Whether anybody on this thread has asked for a logical worker's info."""
    return _here.asked


def current_batch() -> int:
    """The number of the batch that this thread is loading; -1 if it loads none."""
    return -1 if _here.position is None else _here.position.batch


def _collate_tensors(batch: Any, *, collate_fn_map: Any = None) -> Any:
    """`default_collate`'s own for tensors; without shared memory on threads of this process."""
    with shown(info=None):
        return _compat.collate_tensors(batch, collate_fn_map=collate_fn_map)


def install() -> None:
    """Makes both right for threads; once, by the first wrapped loader."""
    with _lock:
        map_ = _compat.collate_fns
        if map_.get(torch.Tensor) is _compat.collate_tensors:  # else it is the user's own
            map_[torch.Tensor] = _collate_tensors
        _compat.answer_worker_info(_here)


def collates_plainly() -> bool:
    """Whether `default_collate` does what torch's does: nobody has registered anything."""
    now = dict(_compat.collate_fns)
    if now.get(torch.Tensor) is _collate_tensors:
        now[torch.Tensor] = _compat.collate_tensors
    return now == _plain_map


# ---- a seed for each sample ----


@dataclass(slots=True)
class Position:
    """Where in the epoch a thread loads: what a sample's seed is made of."""

    base_seed: int
    batch: int
    over: threading.Event | None = None  # set: nobody waits for the batch any more
    places: Sequence[int] | None = None  # in the batch of all processes, of this one's samples
    place: int = 0


_MASK = 2**64 - 1


def _mixed(value: int) -> int:
    """SplitMix64's step (Steele, Lea, Flood: Fast splittable pseudorandom generators, 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def sample_seed() -> int:
    """A seed for the sample that is being loaded, in ``Dataset.__getitem__`` of a wrapped loader.

    It depends on the epoch's base seed, the number of the batch and the place in the batch: not on
    the number of workers, on the concurrency or on which thread loads. Where the dataset is asked
    for a whole batch (``__getitems__``, ``collate_fn``, iterable datasets) it is the batch's.

    Returns:
        0 to 2**63 - 1, fit for ``torch.Generator().manual_seed``, ``numpy.random.default_rng`` and
        ``random.Random``.

    Raises:
        RuntimeError: no loader that `wrap` has returned is loading in this thread; worker
            processes (``workers="process"``) do not know it either.
    """
    position = _here.position
    if position is None:
        raise RuntimeError(
            "sample_seed() is known while a loader from torch_spheres.wrap() loads, in "
            "Dataset.__getitem__ and what it calls; this thread loads nothing"
        )
    mixed = _mixed(position.base_seed & _MASK)
    for number in (position.batch, position.place):
        mixed = _mixed(mixed ^ number)
    return mixed >> 1
