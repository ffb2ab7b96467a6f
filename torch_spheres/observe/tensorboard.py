"""Logs figures of a `Stats` every few steps, to TensorBoard or anything like it."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch

from torch_spheres.runtime.arguments import as_index

if TYPE_CHECKING:
    from torch_spheres.observe.stats import Stats
    from torch_spheres.spheres import KissingSpheres

__all__ = ["ScalarWriter", "StatsLog"]


class ScalarWriter(Protocol):
    """The writer of `KissingSpheres.log_to`, such as ``torch.utils.tensorboard.SummaryWriter``."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int, /) -> Any:
        """Writes a figure of a step."""


def _figures(stats: Stats) -> dict[str, float]:
    """The figures of a difference that `StatsLog` writes; item times only if items were run."""
    values = {
        "utilization": stats.utilization,
        "imbalance": stats.imbalance,
        "steal_rate": stats.steal_rate,
        "items_per_second": stats.items_per_second,
        "cores_used": stats.cores_used,
        "queued": float(stats.queued),
        "queue_high_water": float(max(s.queue_high_water for s in stats.spheres)),
        "messages_per_second": stats.messages / stats.elapsed if stats.elapsed > 0 else 0.0,
    }
    if sum(stats.item_time_counts):
        values["item_time_p50_seconds"] = stats.item_time(0.5)
        values["item_time_p95_seconds"] = stats.item_time(0.95)
    return values


class StatsLog:
    """Counts steps, and writes figures every n steps; made by `KissingSpheres.log_to`.

    Use it from one thread at a time. As a context manager it is closed at the end of the block.

    Args:
        spheres: whose figures are written.
        writer: that gets them, with ``add_scalar(tag, value, global_step)``.
        every: steps from one writing to the next.
        optimizer: whose steps are counted. None: see `KissingSpheres.log_to`.
        tag: how the figures' names begin.
        first_step: steps done before.

    Raises:
        TypeError: an argument is of another type.
        ValueError: `every` is less than 1, or `first_step` less than 0.
    """

    def __init__(
        self,
        spheres: KissingSpheres,
        writer: ScalarWriter,
        every: int,
        optimizer: torch.optim.Optimizer | None,
        tag: str,
        first_step: int,
    ) -> None:
        if not callable(getattr(writer, "add_scalar", None)):
            raise TypeError(
                "writer must have add_scalar(tag, value, global_step), as torch.utils.tensorboard's"
                f" SummaryWriter, got {writer!r} of type {type(writer).__name__}"
            )
        if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer must be None or a torch.optim.Optimizer, got {type(optimizer).__name__}"
            )
        if not isinstance(tag, str) or not tag:
            raise TypeError(f"tag must be a string that is not empty, got {tag!r}")
        every, first_step = as_index("every", every, 1), as_index("first_step", first_step, 0)
        self._spheres, self._writer, self._every, self._tag = spheres, writer, every, tag
        self._first = self._steps = self._written = first_step
        self._last = spheres.stats()
        self._closed = self._stepping = False
        self._wrote_or_warned = False
        self._handles: tuple[Any, ...] = ()  # of the hooks on a given optimizer
        if optimizer is None:
            spheres._steps.logs.append(self)
        else:
            self._handles = (
                optimizer.register_step_pre_hook(self._before_step),
                optimizer.register_step_post_hook(self._after_step),
            )

    def _before_step(self, *_: object) -> None:
        self._stepping = True

    def _after_step(self, *_: object) -> None:
        # torch calls the hooks twice where a class's step() calls its base's.
        if self._stepping:
            self._stepping = False
            self.step()

    @property
    def steps(self) -> int:
        """Steps counted so far, on top of ``first_step``."""
        return self._steps

    def step(self) -> None:
        """Counts a step, and writes if it is the n-th; for loops without an optimizer.

        Raises:
            Exception: the writer's. The step counts nevertheless, and its figures are written after
                the next n steps.
            RuntimeError: the log is closed.
        """
        if self._closed:
            raise RuntimeError("step() of a log that is closed; call spheres.log_to() again")
        self._steps += 1
        if (self._steps - self._first) % self._every == 0:
            self.write()

    def write(self) -> None:
        """Writes the figures since the last time now.

        Raises:
            Exception: the writer's.
        """
        now = self._spheres.stats()
        for name, value in _figures(now - self._last).items():
            self._writer.add_scalar(f"{self._tag}/{name}", value, self._steps)
        # Not if the writer raised: the next write() is to include these steps.
        self._last, self._written, self._wrote_or_warned = now, self._steps, True

    def close(self) -> None:
        """Writes the figures since the last time, and counts no more steps.

        The writer stays open. May be called more than once. Warns if no step was counted.

        Raises:
            Exception: the writer's; the log is closed nevertheless.
        """
        self._end(write=True)

    def warn_if_silent(self) -> None:
        """Warns, once, that no step was counted though the spheres have run items."""
        if self._wrote_or_warned or self._steps > self._first:
            return
        if (self._spheres.stats() - self._last).items_run:
            self._wrote_or_warned = True
            warnings.warn(
                "log_to() has counted no steps: no optimizer that it was given, or that has a "
                "GradientHook on these spheres, has stepped; give it optimizer=..., or call "
                "log.step() in the loop",
                UserWarning,
                stacklevel=4,  # the caller of close() or stop(), or the end of the block
            )

    def _end(self, *, write: bool) -> None:
        if self._closed:
            return
        self._closed = True
        for handle in self._handles:
            handle.remove()
        if not self._handles:
            self._spheres._steps.logs.remove(self)
        if write:
            self.warn_if_silent()
            if self._steps > self._written:
                self.write()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._end(write=kind is None)  # or the writer's exception could hide the block's
