"""Exports a `Stats` as metrics of `prometheus_client`, an extra; imported when it is used."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, TypeVar

from torch_spheres.observe.histogram import ITEM_TIME_EDGES_NS

try:
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
        Metric,
    )
    from prometheus_client.registry import Collector
except ImportError as error:
    raise ImportError(
        "to_prometheus() and prometheus_collector() need prometheus_client: "
        'pip install ".[prometheus]" in a checkout of torch_spheres'
    ) from error

if TYPE_CHECKING:
    from torch_spheres.observe.stats import Stats

__all__ = ["SphereCollector", "page"]

F = TypeVar("F", CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily)

_LABEL = re.compile(r"(?!__)[a-zA-Z_][a-zA-Z0-9_]*")
_OURS = {"level", "sphere", "path", "state", "le"}
_FEW_SPHERES = 13
_COUNTERS = {
    "items_run": "Work items run, stolen ones included.",
    "items_stolen": "Work items run that belonged to another sphere.",
    "items_given": "Work items of the own queue that other spheres ran.",
    "messages_sent": "Messages sent along edges.",
    "messages_received": "Messages taken out of mailboxes.",
}
_STATES = ("processing", "accumulating", "waiting", "idle", "ready")


def page(stats: Stats, per_sphere: bool | None, labels: Mapping[str, str] | None) -> str:
    """Returns the text of `Stats.to_prometheus`, whose errors it raises."""
    if stats.is_difference:
        raise ValueError(
            "to_prometheus() wants a snapshot, spheres.stats(), whose counters only grow; "
            "Prometheus makes the differences (rate(...))"
        )
    registry = CollectorRegistry()
    registry.register(SphereCollector(lambda: stats, per_sphere, labels))
    return generate_latest(registry).decode()


class SphereCollector(Collector):
    """Collects metrics of the `Stats` that `read` returns; see `Stats.to_prometheus`."""

    def __init__(
        self,
        read: Callable[[], Stats],
        per_sphere: bool | None,
        labels: Mapping[str, str] | None,
    ) -> None:
        if per_sphere is not None and not isinstance(per_sphere, bool):
            raise TypeError(f"per_sphere must be True, False or None, got {per_sphere!r}")
        labels = {} if labels is None else labels
        if not isinstance(labels, Mapping) or not all(isinstance(name, str) for name in labels):
            raise TypeError(f"labels must map names to values, {{'pool': 'a'}}, got {labels!r}")
        for name in labels:
            if not _LABEL.fullmatch(name) or name in _OURS:
                raise ValueError(
                    f"labels: {name!r} cannot be used; names are letters, digits and _, do not "
                    f"begin with a digit or __, and are none of {', '.join(sorted(_OURS))}"
                )
        self._read, self._per_sphere = read, per_sphere
        self._names = list(labels)
        self._values = [str(value) for value in labels.values()]

    def describe(self) -> Iterator[Metric]:
        """As `collect`; a registry refuses a second collector with the same names."""
        return self.collect()

    def collect(self) -> Iterator[Metric]:
        """Yields the metrics, all from one snapshot."""
        stats = self._read()
        last = stats.spheres[-1].level
        per_sphere = len(stats) <= _FEW_SPHERES if self._per_sphere is None else self._per_sphere
        names = ("level", "sphere", "path") if per_sphere else ("level",)
        groups = [(s,) for s in stats] if per_sphere else map(stats.level, range(last + 1))
        # Each group of spheres with the values of the labels in `names`.
        placed = [((f"{g[0].level}", f"{g[0].id}", g[0].path)[: len(names)], g) for g in groups]
        leaves = [(place, group) for place, group in placed if group[0].level == last]

        for name, meaning in _COUNTERS.items():
            counter = self._new(CounterMetricFamily, name, meaning, names)
            for place, group in placed:
                counter.add_metric([*self._values, *place], sum(getattr(s, name) for s in group))
            yield counter
        meaning = "Time of the spheres' threads in each state, added up."
        times = self._new(CounterMetricFamily, "state_seconds", meaning, (*names, "state"))
        for place, group in placed:
            for state in _STATES:
                seconds = sum(getattr(s, f"{state}_ns") for s in group) / 1e9
                times.add_metric([*self._values, *place, state], seconds)
        yield times
        meaning = "Work items that wait in the leaves' queues."
        queued = self._new(GaugeMetricFamily, "queued_items", meaning, names)
        meaning = "Most work items that ever waited in one leaf's queue."
        high = self._new(GaugeMetricFamily, "queue_high_water_items", meaning, names)
        for place, group in leaves:
            queued.add_metric([*self._values, *place], sum(s.queued for s in group))
            high.add_metric([*self._values, *place], max(s.queue_high_water for s in group))
        yield from (queued, high)
        meaning = "Time that work items took, but for pieces of gradient sums."
        items = self._new(HistogramMetricFamily, "item_duration_seconds", meaning)
        counts, seconds = _buckets(stats.item_time_counts), stats.item_time_ns / 1e9
        items.add_metric(self._values, counts, seconds)
        yield items
        turns = self._new(GaugeMetricFamily, "concurrency", "Leaves that may run at once.")
        turns.add_metric(self._values, stats.concurrency)
        yield turns

    def _new(self, kind: type[F], name: str, meaning: str, labels: Sequence[str] = ()) -> F:
        return kind(f"torch_spheres_{name}", meaning, labels=[*self._names, *labels])


def _buckets(counts: Sequence[int]) -> list[tuple[str, int]]:
    """How many items took less than each power of two of nanoseconds; the edges in seconds."""
    seen = list(accumulate(counts))
    found = [(repr(edge / 1e9), seen[i]) for i, edge in enumerate(ITEM_TIME_EDGES_NS)]
    return [*found[::4], ("+Inf", seen[-1])]
