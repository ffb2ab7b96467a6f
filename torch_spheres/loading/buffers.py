"""Memory of batches that nobody has any more, for the batches to come.

A batch of megabytes from the allocator is memory that is in no cache, if it is there at all. What
the loop had two batches ago is. A storage is used again when no tensor, view or array refers to it:
its reference count says so.
"""

from __future__ import annotations

import math
from collections import deque

import torch
from torch import Tensor, UntypedStorage

__all__ = ["Buffers"]

_WORTH_KEEPING = 64 << 10  # bytes
_MOST = 6  # storages: a few batches of a few tensors


class Buffers:
    """Of one iterator, from one thread at a time."""

    def __init__(self) -> None:
        self._known: deque[UntypedStorage] = deque(maxlen=_MOST)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """As `torch.empty`, on the CPU."""
        size = math.prod(shape) * dtype.itemsize
        if size < _WORTH_KEEPING:
            return torch.empty(shape, dtype=dtype, device="cpu")
        for storage in self._known:
            if storage.nbytes() == size and _is_free(storage):
                out = torch.empty(0, dtype=dtype, device="cpu")
                return out.set_(storage, 0, shape)  # type: ignore[call-overload, no-any-return]
        made = torch.empty(shape, dtype=dtype, device="cpu")
        self._known.append(made.untyped_storage())
        return made


def _is_free(storage: UntypedStorage) -> bool:
    owners: int = torch._C._storage_Use_Count(storage._cdata)
    # (Moved to shared memory, it would make later batches shared as well.)
    return owners == 1 and not storage.is_shared()
