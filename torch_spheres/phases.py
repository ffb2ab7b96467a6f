"""Blocks that a trace shows as phases of a shard."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import TYPE_CHECKING

from torch_spheres import _core

if TYPE_CHECKING:
    from torch_spheres.system import KissingSpheres

__all__ = ["phase"]

_LABELS = {name: label for label, name in enumerate(_core.TRACE_LABELS)}


class _Phase:
    __slots__ = ("_begin", "_core", "_label", "_shard")

    def __init__(self, core: _core.System, label: int, shard: int) -> None:
        self._core, self._label, self._shard = core, label, shard

    def __enter__(self) -> None:
        self._begin = time.monotonic_ns()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._core.trace_phase(self._label, self._shard, self._begin)


_NOTHING = nullcontext()


def phase(
    spheres: KissingSpheres, name: str, shard: int | None = None
) -> AbstractContextManager[None]:
    """For a block that the calling thread is in; does nothing while nobody traces the spheres."""
    if not spheres._tracing:
        return _NOTHING
    return _Phase(spheres._core, _LABELS[name], -1 if shard is None else shard)
