"""What a trace shows of shards and batches: phases, and how gradients go from one to the next."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from torch_spheres import _core

if TYPE_CHECKING:
    from torch_spheres.runtime.pool import SpherePool

__all__ = ["gradients_taken", "here_and_now", "phase", "phase_since"]

_LABELS = {name: label for label, name in enumerate(_core.TRACE_LABELS)}


class _Phase:
    """See `phase`; no generator, which takes longer: a step has a hundred of these."""

    __slots__ = ("_begin", "_name", "_number", "_spheres")

    def __init__(self, spheres: SpherePool, name: str, number: int | None) -> None:
        self._spheres, self._name, self._number = spheres, name, number

    def __enter__(self) -> None:
        self._begin = time.monotonic_ns()

    def __exit__(self, *_: object) -> None:
        if self._spheres._recording is not None:
            phase_since(self._spheres, self._name, self._number, self._begin)


def phase(
    spheres: SpherePool, name: str, number: int | None = None
) -> AbstractContextManager[None]:
    """For a block that the calling thread is in; records nothing while nobody traces the spheres.

    Args:
        spheres: on whose behalf.
        name: what is done; one of `_core.TRACE_LABELS`.
        number: of the shard, or of the batch that is loaded.
    """
    return _Phase(spheres, name, number)


def phase_since(spheres: SpherePool, name: str, number: int | None, begin_ns: int) -> None:
    """As `phase`, for a block that began at a ``time.monotonic_ns()`` and ends now."""
    recording = spheres._recording
    if recording is not None:
        recording.name_thread()
        spheres._core.trace_phase(_LABELS[name], -1 if number is None else number, begin_ns)


def here_and_now() -> tuple[int, int]:
    """Where gradients are made, and when: for `gradients_taken`."""
    return _core.current_sphere(), time.monotonic_ns()


def gradients_taken(spheres: SpherePool, makers: Iterable[tuple[int, int]]) -> None:
    """The calling thread is about to add what was made there and then: a trace's arrows."""
    here = _core.current_sphere()
    for sphere, made in makers:
        if sphere not in (-1, here):
            spheres._core.trace_gradient(sphere, made)
