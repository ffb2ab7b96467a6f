"""Reads the core's counters into `Stats`."""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from operator import attrgetter
from typing import Any

from torch_spheres import _core
from torch_spheres._core import State, Topology
from torch_spheres.stats import SphereStats

__all__ = ["sphere_stats"]

_FIELDS = [field.name for field in fields(SphereStats) if hasattr(_core.SphereStats, field.name)]
_figures = attrgetter(*_FIELDS)
_STATES = [f"{state.name.lower()}_ns" for state in State if state is not State.TERMINATING]


def sphere_stats(core: _core.System) -> tuple[SphereStats, ...]:
    """The figures of all spheres now, by id."""
    read = core.stats()
    last = Topology.level(len(read) - 1)
    return tuple(_from_core(figures, last) for figures in read)


@cache
def _place(sphere: int) -> tuple[str, int, int | None]:
    """Path, level and group."""
    level = Topology.level(sphere)
    return Topology.path_string(sphere), level, Topology.group(sphere) if level else None


def _from_core(core: _core.SphereStats, last: int) -> SphereStats:
    path, level, group = _place(core.id)
    figures: dict[str, Any] = dict(zip(_FIELDS, _figures(core), strict=True))
    if level not in (0, last):
        figures["stolen_from"] = ()  # it runs no items
    times = zip(_STATES, core.state_ns, strict=False)
    return SphereStats(path=path, level=level, group=group, **figures, **dict(times))
