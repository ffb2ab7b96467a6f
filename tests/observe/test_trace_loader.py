"""What a trace and its pictures show of the batches of wrapped loaders."""

from __future__ import annotations

from collections import Counter

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from trace_support import check_file, check_trace, load, phases_in

import torch_spheres as ts
from torch_spheres.observe.plots import plot_timeline


class Rows(Dataset):
    def __len__(self):
        return 50

    def __getitem__(self, index):
        return torch.full((3,), float(index))


def test_each_batch_is_loaded_once_under_its_number(tmp_path):
    with ts.KissingSpheres(concurrency=2) as spheres:
        loader = ts.wrap(DataLoader(Rows(), 8, num_workers=2), spheres)
        with spheres.trace() as trace:
            assert len([*loader]) == 7
            spheres.epoch()  # the loop has its last batch before the item that loaded it ends
    assert phases_in(trace) == {("load", batch): 1 for batch in range(7)}
    for phase in trace.slices:
        if phase.kind == "phase" and phase.sphere >= 0:
            assert any(
                item.kind == "item"
                and item.sphere == phase.sphere
                and item.begin_ns <= phase.begin_ns
                and phase.end_ns <= item.end_ns
                for item in trace.slices
            )
    trace.save(tmp_path / "run.json")
    data = load(tmp_path / "run.json")
    check_file(data)
    events = [e for e in data["traceEvents"] if e.get("cat") == "phase"]
    assert Counter(e["name"] for e in events) == Counter(f"load {k}" for k in range(7))
    assert sorted(e["args"]["item"] for e in events) == [*range(7)]
    axes = plot_timeline(trace)
    bars = [path for c in axes.collections if c.get_gid() == "load" for path in c.get_paths()]
    assert len(bars) == 7
    legends = [*axes.figure.legends, axes.get_legend()]
    labels = [t.get_text() for legend in legends if legend for t in legend.get_texts()]
    assert "loading a batch" in labels


class Stream(IterableDataset):
    """The second worker has more."""

    def __iter__(self):
        return iter(range(8 if get_worker_info().id == 0 else 24))


def test_batches_that_a_worker_did_not_have_any_more_are_none():
    with ts.KissingSpheres(concurrency=2) as spheres:
        loader = ts.wrap(DataLoader(Stream(), 4, num_workers=2), spheres)
        with spheres.trace() as trace:
            assert len([*loader]) == 8
    found = phases_in(trace)
    assert {name for name, _ in found} == {"load"} and [*found.values()] == [1] * 8


def test_without_workers_the_loops_thread_loads_each_batch():
    with ts.KissingSpheres(concurrency=2) as spheres:
        loader = ts.wrap(DataLoader(Rows(), 12), spheres)
        with spheres.trace() as trace:
            assert len([*loader]) == 5
        check_trace(trace, spheres)
    assert phases_in(trace) == {("load", batch): 1 for batch in range(5)}


def test_nothing_is_told_of_an_epoch_that_is_not_traced():
    with ts.KissingSpheres(concurrency=2) as spheres:
        loader = ts.wrap(DataLoader(Rows(), 8, num_workers=2), spheres)
        assert len([*loader]) == 7
        with spheres.trace() as trace:
            pass
    assert phases_in(trace) == {}
