"""Which way to load is faster, found out in the first batches."""

from __future__ import annotations

__all__ = ["Tempo"]

_PROBES = ("caller", "spheres", "caller", "spheres")
_GAIN = 1.05  # what threads have to gain, or the loop's own thread keeps the work


class Tempo:
    """Of one loader, over all its epochs.

    The very first batch is loaded by the caller in any case: whether the dataset draws random
    numbers shows there, before any have been drawn out of order.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}  # least for one sample, of each way
        self._probes = list(_PROBES)
        self.impure = False
        self.changes = 0  # batches after which the dataset was not what it had been

    @property
    def way(self) -> str:
        """``"caller"`` or ``"spheres"``, for the next batch."""
        if self.impure:
            return "caller"
        if self._probes:
            return self._probes[0]
        return "spheres" if self.threads_gain else "caller"

    @property
    def decided(self) -> bool:
        """Whether no more batches are to be measured."""
        return self.impure or not self._probes

    @property
    def threads_gain(self) -> bool:
        """Of a decided one: whether threads were faster."""
        return self._seconds["spheres"] * _GAIN < self._seconds["caller"]

    def measured(self, way: str, seconds: float, samples: int) -> None:
        """A batch has been loaded; those of one sample say nothing."""
        if self.decided or way != self._probes[0] or samples < 2:
            return
        self._probes.pop(0)
        each = seconds / samples
        self._seconds[way] = min(each, self._seconds.get(way, each))
