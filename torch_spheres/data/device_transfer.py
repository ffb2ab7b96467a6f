"""Batches on their device: pinned and copied in the background, ready when handed over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_spheres import _compat

__all__ = ["Delivery", "Transfer"]

Delivery = Callable[[], Any]
"""Gives the batch to the thread that will use it."""


class Transfer:
    """To a device. On CUDA by a stream of its own, beside what the loop computes.

    Args:
        device: where batches go; None or the CPU: they stay where they are.
        pins_for: the accelerator's type for which those that stay are pinned, as a `DataLoader`
            does with ``pin_memory=True``; None: they stay as they are.
    """

    def __init__(self, device: torch.device | None, pins_for: str | None = None) -> None:
        self._device = None if device is None or device.type == "cpu" else device
        self._pins_for = pins_for
        is_cuda = device is not None and device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if is_cuda else None
        self.does_nothing = self._device is None and pins_for is None

    def send(self, batch: Any) -> Delivery:
        """On the thread that has loaded: starts the copies."""
        device = self._device
        if device is None:
            kept = batch if self._pins_for is None else _compat.pin_memory(batch, self._pins_for)
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
            # The loop's stream waits for the copies, the loop's thread does not. (Pinned memory is
            # kept by torch until the copy from it is done.)
            stream = torch.cuda.current_stream(device)
            stream.wait_event(done)
            for leaf in _compat.pytree.tree_leaves(moved):
                if isinstance(leaf, Tensor) and leaf.is_cuda:
                    leaf.record_stream(stream)
            return moved

        return deliver
