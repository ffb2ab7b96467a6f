"""Counts optimizer steps on behalf of the logs of a pool; the pool has one counter."""

from __future__ import annotations

import weakref
from typing import Any

__all__ = ["StepCounter"]


class StepCounter:
    """Tells the logs of a pool of each step of an optimizer that has a `GradientHook` on the pool.

    An optimizer's step counts once, however many hooks the optimizer has.
    """

    def __init__(self) -> None:
        self.logs: list[Any] = []  # each a `StatsLog` of `observe`
        self._stepping: weakref.WeakSet[Any] = weakref.WeakSet()  # whose step() has begun

    def begin(self, optimizer: Any) -> None:
        """Is called before the optimizer's ``step()``."""
        self._stepping.add(optimizer)

    def end(self, optimizer: Any) -> None:
        """Is called after the optimizer's ``step()``."""
        if optimizer in self._stepping:
            self._stepping.discard(optimizer)
            for log in tuple(self.logs):
                log.step()

    def warn_if_silent(self) -> None:
        """Has each log warn, with `stacklevel` 4, if it never counted a step."""
        for log in self.logs:
            log.warn_if_silent()
