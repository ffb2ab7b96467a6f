"""The iterator of a wrapped loader with ``workers="process"``: torch's own, with figures."""

from __future__ import annotations

import time
from typing import Any

import torch

from torch_spheres.data.device_transfer import DeviceTransfer
from torch_spheres.data.loader_stats import Meter

__all__ = ["ProcessIterator"]


class ProcessIterator:
    """Counts what torch's iterator over worker processes gives, and copies it to a device."""

    def __init__(self, iterator: Any, meter: Meter, device: torch.device | None) -> None:
        self._iterator, self._meter = iterator, meter
        self._transfer = DeviceTransfer(device)
        self._last_next: float | None = None

    def __iter__(self) -> ProcessIterator:
        return self

    def __next__(self) -> Any:
        begin = time.perf_counter()
        batch = self._transfer.start(next(self._iterator))()
        end = time.perf_counter()
        self._meter.count_batch(batch, 0, 0)
        since = begin if self._last_next is None else self._last_next
        self._meter.count_wait(end - begin, end - since, end)
        self._last_next = end
        return batch

    def __len__(self) -> int:
        return len(self._iterator)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._iterator, name)
