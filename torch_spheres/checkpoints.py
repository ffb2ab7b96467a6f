"""Activation checkpointing with ``use_reentrant=True`` inside a shard.

Such a checkpoint runs a backward of its own inside the backward, which adds to ``.grad`` of the
leaves it meets, whatever the outer backward was asked for. So a shard that contains one computes
its gradients in the same way. (With ``use_reentrant=False`` there is nothing special.)
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from torch.utils.checkpoint import CheckpointFunction

__all__ = ["Checkpoints"]

_here = threading.local()
_forward: Any = CheckpointFunction.forward


class Checkpoints:
    """Whether reentrant checkpoints were met in a shard."""

    def __init__(self) -> None:
        self.reentrant = False

    @contextlib.contextmanager
    def noticed(self) -> Iterator[None]:
        """On the calling thread: those inside the block are noticed."""
        outer = getattr(_here, "checkpoints", None)
        _here.checkpoints = self
        try:
            yield
        finally:
            _here.checkpoints = outer


def _noticed_forward(ctx: Any, *args: Any) -> Any:
    checkpoints = getattr(_here, "checkpoints", None)
    if checkpoints is not None:
        checkpoints.reentrant = True
    return _forward(ctx, *args)


CheckpointFunction.forward = staticmethod(_noticed_forward)  # type: ignore[method-assign]
