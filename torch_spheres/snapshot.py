"""Reads the core's counters into `Stats`."""

from __future__ import annotations

import time
from functools import lru_cache

from torch_spheres import _core
from torch_spheres._core import Topology
from torch_spheres.stats import SphereStats, Stats

__all__ = ["Began", "snapshot"]

Began = tuple[int, int]
"""``(time.monotonic_ns(), time.process_time_ns())`` of the first `start()`."""


def snapshot(
    core: _core.System, concurrency: int, *, cores: int, origin: int, began: Began | None
) -> Stats:
    """Reads the counters of a system's spheres."""
    now, cpu = time.monotonic_ns(), time.process_time_ns()
    begin, cpu_before = began or (now, cpu)
    read = core.stats()
    places = _places(len(read))
    return Stats(
        spheres=tuple(map(_from_core, read, places)),
        concurrency=concurrency,
        cores=cores,
        begin_ns=begin,
        time_ns=now,
        cpu_ns=max(0, cpu - cpu_before),  # the child of a fork() begins at 0
        origin=origin,
    )


Place = tuple[str, int, int | None, bool]


@lru_cache(maxsize=4)
def _places(total: int) -> tuple[Place, ...]:
    """Path, level and group of each sphere, and whether it runs items."""
    last = Topology.level(total - 1)

    def place(sphere: int) -> Place:
        level = Topology.level(sphere)
        group = Topology.group(sphere) if level else None
        return Topology.path_string(sphere), level, group, level in (0, last)

    return tuple(map(place, range(total)))


def _from_core(s: _core.SphereStats, place: Place) -> SphereStats:
    ready, processing, idle, waiting, accumulating, _ = s.state_ns
    path, level, group, runs_items = place
    return SphereStats(
        id=s.id,
        path=path,
        level=level,
        group=group,
        state=s.state,
        items_run=s.items_run,
        items_stolen=s.items_stolen,
        items_given=s.items_given,
        messages_sent=s.messages_sent,
        messages_received=s.messages_received,
        queue_high_water=s.queue_high_water,
        processing_ns=processing,
        accumulating_ns=accumulating,
        waiting_ns=waiting,
        idle_ns=idle,
        ready_ns=ready,
        queued=s.queued,
        stolen_from=s.stolen_from if runs_items else (),
        item_time_ns=s.item_time_ns,
        item_time_counts=s.item_time_counts,
    )
