"""Records what a trace of a pool shows: phases of shards and batches, and gradients passed on.

The functions record nothing while no trace of the pool is being recorded
(`observe.trace_recorder`).
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from torch_spheres import _core

if TYPE_CHECKING:
    from torch_spheres.runtime.sphere_threads import SphereThreads

__all__ = ["begin_trace", "end_trace", "gradients_taken", "here_and_now", "phase", "phase_since"]

_LABELS = {name: label for label, name in enumerate(_core.TRACE_LABELS)}


def begin_trace(spheres: SphereThreads, recorder: Any, capacity: int) -> None:
    """Begins to record the last `capacity` events of each thread; RuntimeError if a trace runs."""
    spheres._core.begin_trace(capacity)
    spheres._recorder = recorder


def end_trace(spheres: SphereThreads) -> _core.TraceRecord:
    """Ends recording, and returns the events."""
    spheres._recorder = None
    return spheres._core.end_trace()


class _Phase:
    """The context of `phase`. A generator would take longer, and a step has a hundred of these."""

    __slots__ = ("_begin", "_name", "_number", "_spheres")

    def __init__(self, spheres: SphereThreads, name: str, number: int | None) -> None:
        self._spheres, self._name, self._number = spheres, name, number

    def __enter__(self) -> None:
        self._begin = time.monotonic_ns()

    def __exit__(self, *_: object) -> None:
        if self._spheres._recorder is not None:
            phase_since(self._spheres, self._name, self._number, self._begin)


def phase(
    spheres: SphereThreads, name: str, number: int | None = None
) -> AbstractContextManager[None]:
    """Context that records its block as a phase of the calling thread.

    `name` is one of `_core.TRACE_LABELS`, `number` that of the shard or of the batch.
    """
    return _Phase(spheres, name, number)


def phase_since(spheres: SphereThreads, name: str, number: int | None, begin_ns: int) -> None:
    """Records a phase that began at a ``time.monotonic_ns()`` and ends now; see `phase`."""
    recorder = spheres._recorder
    if recorder is not None:
        recorder.name_thread()
        spheres._core.trace_phase(_LABELS[name], -1 if number is None else number, begin_ns)


def here_and_now() -> tuple[int, int]:
    """The calling thread's sphere (-1: none) and the time, to be given to `gradients_taken`."""
    return _core.current_sphere(), time.monotonic_ns()


def gradients_taken(spheres: SphereThreads, makers: Iterable[tuple[int, int]]) -> None:
    """Records an arrow from each maker of gradients to the calling thread, which adds them.

    `makers` has `here_and_now` of each thread when its gradients were ready.
    """
    if spheres._recorder is None:
        return
    here = _core.current_sphere()
    for sphere, made in makers:
        if sphere not in (-1, here):
            spheres._core.trace_gradient(sphere, made)
