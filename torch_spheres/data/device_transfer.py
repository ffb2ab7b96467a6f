"""Batches on their device: copied in the background by the iterators of wrapped loaders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_spheres import _compat

__all__ = ["Delivery", "DeviceTransfer"]

Delivery = Callable[[], Any]
"""Returns the batch to the thread that will use it."""


class DeviceTransfer:
    """Copies batches to a device: on CUDA in a stream of its own, while the loop computes.

    Args:
        device: where batches go; None or the CPU: they stay where they are.
        pin_for: the accelerator's type for which batches that stay are pinned, as a `DataLoader`
            does with ``pin_memory=True``; None: they are not.
    """

    def __init__(self, device: torch.device | None, pin_for: str | None = None) -> None:
        self._device = None if device is None or device.type == "cpu" else device
        self._pin_for = pin_for
        is_cuda = device is not None and device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if is_cuda else None
        self.does_nothing = self._device is None and pin_for is None

    def start(self, batch: Any) -> Delivery:
        """Starts the copies; on the thread that has loaded the batch."""
        device = self._device
        if device is None:
            kept = batch if self._pin_for is None else _compat.pin_memory(batch, self._pin_for)
            return lambda: kept
        if self._stream is None:
            moved = _compat.map_having("to", lambda value: value.to(device), batch)
            return lambda: moved
        with torch.cuda.stream(self._stream):
            pinned = _compat.pin_memory(batch, device.type)
            moved = _compat.map_having(
                "to", lambda value: value.to(device, non_blocking=True), pinned
            )
            done = self._stream.record_event()

        def deliver() -> Any:
            # The loop's stream waits for the copies, the loop's thread does not. (Torch keeps
            # pinned memory until the copy from it is done.)
            stream = torch.cuda.current_stream(device)
            stream.wait_event(done)
            for leaf in _compat.pytree.tree_leaves(moved):
                if isinstance(leaf, Tensor) and leaf.is_cuda:
                    leaf.record_stream(stream)
            return moved

        return deliver
