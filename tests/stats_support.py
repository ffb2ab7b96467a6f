"""Statistics of spheres, made by hand."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import torch_spheres as ts
from torch_spheres import ITEM_TIME_EDGES_NS


def made(
    busy: Sequence[float] = (),
    *,
    seconds: float = 10.0,
    concurrency: int = 4,
    cores: int = 4,
    cores_used: float | None = None,
    item: float = 0.01,
    inside: float = 0.99,
    waiting: int = 4,
) -> ts.Stats:
    """Thirteen spheres by hand: leaves that worked `busy` seconds each, in equal items."""
    busy = [*busy, *[0.0] * (12 - len(busy))]

    def sphere(id_: int) -> ts.SphereStats:
        work = int(busy[id_ - 1] * 1e9) if id_ else 0
        items = int(work * inside / (item * 1e9))
        counts = [0] * (len(ITEM_TIME_EDGES_NS) + 1)
        counts[bisect_right(ITEM_TIME_EDGES_NS, item * 1e9)] = items
        return ts.SphereStats(
            id=id_,
            path=ts.Topology.path_string(id_),
            level=min(id_, 1),
            group=id_ - 1 if id_ else None,
            state=ts.State.IDLE,
            items_run=items,
            items_stolen=0,
            items_given=0,
            messages_sent=0,
            messages_received=0,
            queue_high_water=waiting // 12 + (id_ <= waiting % 12) if id_ else 0,
            processing_ns=work,
            accumulating_ns=0,
            waiting_ns=0,
            idle_ns=int(seconds * 1e9) - work,
            ready_ns=0,
            item_time_ns=int(work * inside),
            item_time_counts=tuple(counts),
        )

    used = sum(busy) / seconds if cores_used is None else cores_used
    return ts.Stats(
        spheres=tuple(map(sphere, range(13))),
        concurrency=concurrency,
        cores=cores,
        time_ns=int(seconds * 1e9),
        cpu_ns=int(used * seconds * 1e9),
    )
