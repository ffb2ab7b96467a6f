"""The page for Prometheus, as the client's own parser reads it, and the collector for it."""

from __future__ import annotations

import math
import sys
from typing import Any

import native_items
import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

import torch_spheres as ts
from torch_spheres import ITEM_TIME_EDGES_NS, KissingSpheres


def families(text: str) -> dict[str, Any]:
    found = {family.name: family for family in text_string_to_metric_families(text)}
    assert len(found) == text.count("# TYPE ")
    for family in found.values():
        assert family.name.startswith("torch_spheres_") and family.documentation
        samples = [(s.name, *sorted(s.labels.items())) for s in family.samples]
        assert len(samples) == len(set(samples))
    return found


def worked(levels: int) -> ts.Stats:
    with KissingSpheres(levels=levels, concurrency=4) as spheres:
        spheres.map(abs, range(300))
        spheres.distribute_work(range(10_000), native_items.nothing()).wait(60)
        ts.tree_sum([torch.ones(300_000) for _ in range(12)], spheres=spheres)
        spheres.epoch()
        return spheres.stats()


def test_prometheus_has_a_line_for_each_sphere_with_its_figures() -> None:
    stats = worked(2)
    found = families(stats.to_prometheus())
    kinds = {name.removeprefix("torch_spheres_"): f.type for name, f in found.items()}
    assert kinds == {
        "items_run": "counter",
        "items_stolen": "counter",
        "items_given": "counter",
        "messages_sent": "counter",
        "messages_received": "counter",
        "state_seconds": "counter",
        "queued_items": "gauge",
        "queue_high_water_items": "gauge",
        "item_duration_seconds": "histogram",
        "concurrency": "gauge",
    }
    for name, kind in kinds.items():
        names = {s.name for s in found[f"torch_spheres_{name}"].samples}
        assert kind != "counter" or names == {f"torch_spheres_{name}_total"}
    for name in ("items_run", "items_stolen", "items_given", "messages_sent", "messages_received"):
        samples = found[f"torch_spheres_{name}"].samples
        assert [(s.labels, s.value) for s in samples] == [
            ({"level": str(s.level), "sphere": str(s.id), "path": s.path}, getattr(s, name))
            for s in stats
        ]
    states = found["torch_spheres_state_seconds"].samples
    assert len(states) == 13 * 5
    for sample in states:
        sphere = stats[int(sample.labels["sphere"])]
        ns = getattr(sphere, f"{sample.labels['state']}_ns")
        assert sample.value == pytest.approx(ns / 1e9, rel=1e-12)
    high = found["torch_spheres_queue_high_water_items"].samples
    assert [s.value for s in high] == [s.queue_high_water for s in stats.leaves]
    assert found["torch_spheres_concurrency"].samples[0].value == 4


def test_prometheus_histogram_is_that_of_the_item_times() -> None:
    stats = worked(2)
    samples = families(stats.to_prometheus())["torch_spheres_item_duration_seconds"].samples
    buckets = [s for s in samples if s.name.endswith("_bucket")]
    counts, items = stats.item_time_counts, sum(stats.item_time_counts)
    assert items == 10_300 < stats.items_run
    for sample in buckets[:-1]:
        edge = round(float(sample.labels["le"]) * 1e9)
        assert sample.value == sum(counts[: ITEM_TIME_EDGES_NS.index(edge) + 1])
    edges = [float(s.labels["le"]) for s in buckets]
    assert edges == sorted(edges) and edges[0] == 64e-9 and math.isinf(edges[-1])
    assert buckets[-1].labels["le"] == "+Inf" and len(buckets) == 34
    rest = {s.name.rsplit("_", 1)[1]: s.value for s in samples if not s.name.endswith("_bucket")}
    assert rest == {"count": items, "sum": pytest.approx(stats.item_time_ns / 1e9, rel=1e-12)}
    assert buckets[-1].value == items


@pytest.mark.parametrize("levels", [1, 3])
def test_prometheus_adds_up_levels_of_large_hierarchies_unless_asked(levels: int) -> None:
    stats = worked(levels)
    large = len(stats) > 13
    text = stats.to_prometheus()
    assert ("sphere=" in text) == (not large) and len(text.splitlines()) < 130
    found = families(stats.to_prometheus(per_sphere=False))
    run = found["torch_spheres_items_run"].samples
    assert [s.labels for s in run] == [{"level": str(level)} for level in range(levels)]
    assert [s.value for s in run] == [
        sum(s.items_run for s in stats.level(level)) for level in range(levels)
    ]
    states = found["torch_spheres_state_seconds"].samples
    assert sum(s.value for s in states) == pytest.approx(stats.total(lambda s: s.total_ns) / 1e9)
    every = families(stats.to_prometheus(per_sphere=True))
    assert len(every["torch_spheres_items_run"].samples) == len(stats)
    assert len(every["torch_spheres_queued_items"].samples) == len(stats.leaves)


def test_labels_of_the_users_are_on_every_line_or_refused() -> None:
    stats = KissingSpheres(levels=1).stats()
    nasty = 'a "quoted" \\ path\nin two lines'
    found = families(stats.to_prometheus(labels={"pool": nasty, "run_1": "x"}))
    for family in found.values():
        for sample in family.samples:
            assert sample.labels["pool"] == nasty and sample.labels["run_1"] == "x"
    for name in ("", "1st", "a-b", "__name", "level", "le", "a\n"):
        with pytest.raises(ValueError, match="labels"):
            stats.to_prometheus(labels={name: "x"})


def test_arguments_of_to_prometheus_are_checked() -> None:
    stats = KissingSpheres(levels=1).stats()
    for wrong in ([1], "pool", 3, {1: "a"}):
        with pytest.raises(TypeError, match="labels must map names to values"):
            stats.to_prometheus(labels=wrong)  # type: ignore[arg-type]
    for wrong in ("yes", 1):
        with pytest.raises(TypeError, match=f"per_sphere must be .* got {wrong!r}"):
            stats.to_prometheus(per_sphere=wrong)  # type: ignore[arg-type]


def test_a_difference_has_no_page() -> None:
    stats = KissingSpheres(levels=1).stats()
    with pytest.raises(ValueError, match="a snapshot"):
        (stats - stats).to_prometheus()


def test_a_registry_asks_the_collector_at_each_scrape() -> None:
    registry = CollectorRegistry()

    def items() -> float | None:
        return registry.get_sample_value(
            "torch_spheres_items_run_total", {"pool": "a", "level": "1"}
        )

    with KissingSpheres() as spheres:
        collector = spheres.prometheus_collector(per_sphere=False, labels={"pool": "a"})
        registry.register(collector)
        for done in (0, 50, 100):
            assert items() == done
            spheres.map(abs, range(50))
        page = spheres.stats().to_prometheus(per_sphere=False, labels={"pool": "a"})
        assert families(generate_latest(registry).decode()).keys() == families(page).keys()
        with KissingSpheres() as others, pytest.raises(ValueError, match="Duplicated"):
            registry.register(others.prometheus_collector(labels={"pool": "b"}))
        registry.unregister(collector)
        assert items() is None


def test_without_the_client_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.delitem(sys.modules, "torch_spheres.observe.prometheus", raising=False)
    spheres = KissingSpheres(levels=1)
    for call in (spheres.prometheus_collector, spheres.stats().to_prometheus):
        with pytest.raises(ImportError, match=r'pip install "\.\[prometheus\]"'):
            call()
