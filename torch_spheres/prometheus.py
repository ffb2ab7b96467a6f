"""The figures as metrics of `prometheus_client`, an extra that this module imports."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from torch_spheres.item_times import ITEM_TIME_EDGES_NS

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
        'pip install "torch_spheres[prometheus]"'
    ) from error

if TYPE_CHECKING:
    from torch_spheres.stats import SphereStats, Stats

__all__ = ["SphereCollector", "page"]

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
    """See `Stats.to_prometheus`."""
    registry = CollectorRegistry()
    registry.register(SphereCollector(lambda: stats, per_sphere, labels))
    return generate_latest(registry).decode()


class SphereCollector(Collector):
    """What `KissingSpheres.prometheus_collector` returns: reads the figures when it is asked."""

    def __init__(
        self,
        read: Callable[[], Stats],
        per_sphere: bool | None,
        labels: Mapping[str, str] | None,
    ) -> None:
        if per_sphere is not None and not isinstance(per_sphere, bool):
            raise TypeError(f"per_sphere must be True, False or None, got {per_sphere!r}")
        labels = {} if labels is None else labels
        if not isinstance(labels, Mapping):
            raise TypeError(f"labels must map names to values, {{'pool': 'a'}}, got {labels!r}")
        for name in labels:
            if not isinstance(name, str):
                raise TypeError(f"labels: names must be strings, got {name!r}")
            if not _LABEL.fullmatch(name) or name in _OURS:
                raise ValueError(
                    f"labels: {name!r} cannot be used; names are letters, digits and _, do not "
                    f"begin with a digit or __, and are none of {', '.join(sorted(_OURS))}"
                )
        self._read, self._per_sphere = read, per_sphere
        self._names = list(labels)
        self._values = [str(value) for value in labels.values()]

    def describe(self) -> Iterator[Metric]:
        """As `collect`: with these names a registry refuses a second collector of the same."""
        return self.collect()

    def collect(self) -> Iterator[Metric]:
        """One metric after the other, all from one snapshot."""
        stats = self._read()
        last = stats.spheres[-1].level
        per_sphere = len(stats) <= _FEW_SPHERES if self._per_sphere is None else self._per_sphere
        groups: list[tuple[SphereStats, ...]] = (
            [(s,) for s in stats] if per_sphere else [stats.level(n) for n in range(last + 1)]
        )
        place = ["level", "sphere", "path"] if per_sphere else ["level"]

        def where(group: tuple[SphereStats, ...]) -> list[str]:
            first = group[0]
            return [str(first.level), str(first.id), first.path][: len(place)]

        leaves = [group for group in groups if group[0].level == last]
        for name, meaning in _COUNTERS.items():
            values = [(where(g), sum(getattr(s, name) for s in g)) for g in groups]
            yield self._metric(CounterMetricFamily, name, meaning, place, values)
        yield self._metric(
            CounterMetricFamily,
            "state_seconds",
            "Time of the spheres' threads in each state, added up.",
            [*place, "state"],
            [
                ([*where(g), state], sum(getattr(s, f"{state}_ns") for s in g) / 1e9)
                for g in groups
                for state in _STATES
            ],
        )
        yield self._metric(
            GaugeMetricFamily,
            "queued_items",
            "Work items that wait in the leaves' queues.",
            place,
            [(where(g), sum(s.queued for s in g)) for g in leaves],
        )
        yield self._metric(
            GaugeMetricFamily,
            "queue_high_water_items",
            "Most work items that ever waited in one leaf's queue.",
            place,
            [(where(g), max(s.queue_high_water for s in g)) for g in leaves],
        )
        yield self._metric(
            HistogramMetricFamily,
            "item_duration_seconds",
            "Time that work items took, but for pieces of gradient sums.",
            [],
            [([], _buckets(stats.item_time_counts), stats.item_time_ns / 1e9)],
        )
        yield self._metric(
            GaugeMetricFamily,
            "concurrency",
            "Leaves that may run at once.",
            [],
            [([], stats.concurrency)],
        )

    def _metric(
        self,
        kind: type[CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily],
        name: str,
        meaning: str,
        labels: list[str],
        samples: Iterable[tuple[Any, ...]],
    ) -> Metric:
        """Each sample: the values of the labels, and what its kind of metric asks for."""
        metric = kind(f"torch_spheres_{name}", meaning, labels=self._names + labels)
        for values, *rest in samples:
            metric.add_metric(self._values + values, *rest)
        return metric


def _buckets(counts: Sequence[int]) -> list[tuple[str, int]]:
    """How many items took less than each power of two of nanoseconds, in seconds."""
    seen = list(accumulate(counts))
    found = [(repr(edge / 1e9), seen[i]) for i, edge in enumerate(ITEM_TIME_EDGES_NS)]
    return [*found[::4], ("+Inf", seen[-1])]
