"""Batches on their device: pinned and copied in the background, ready when handed over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_spheres import _compat

__all__ = ["Delivery", "Pinning", "Transfer", "mapped"]

Delivery = Callable[[], Any]
"""Gives the batch to the thread that will use it."""


def mapped(batch: Any, move: Callable[[Any], Any]) -> Any:
    """The batch with what has a ``to()`` (tensors, packed sequences, users' types) moved."""

    def one(leaf: Any) -> Any:
        return move(leaf) if hasattr(leaf, "to") else leaf

    # (A PackedSequence is a named tuple that moves as a whole.)
    return _compat.pytree.tree_map(one, batch, is_leaf=lambda v: hasattr(v, "to"))


class Pinning:
    """Into page-locked memory, as a `DataLoader` with ``pin_memory=True``.

    Args:
        device: the accelerator's type, or None: batches stay as they are.
    """

    def __init__(self, device: str | None) -> None:
        self._device = device

    def send(self, batch: Any) -> Delivery:
        """On the thread that has loaded."""
        if self._device is not None:
            batch = _compat.pin_memory(batch, self._device)
        return lambda: batch


class Transfer:
    """To a device. On CUDA by a stream of its own, beside what the loop computes.

    Args:
        device: where batches go.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def send(self, batch: Any) -> Delivery:
        """On the thread that has loaded: starts the copies."""
        if self._stream is None:
            moved = mapped(batch, lambda value: value.to(self.device))
            return lambda: moved
        with torch.cuda.stream(self._stream):
            pinned = _compat.pin_memory(batch, self.device.type)
            moved = mapped(pinned, lambda value: value.to(self.device, non_blocking=True))
            done = self._stream.record_event()

        def deliver() -> Any:
            # The loop's stream waits for the copies, the loop's thread does not. (Pinned memory is
            # kept by torch until the copy from it is done.)
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(done)
            for leaf in _compat.pytree.tree_leaves(moved):
                if isinstance(leaf, Tensor) and leaf.is_cuda:
                    leaf.record_stream(stream)
            return moved

        return deliver
