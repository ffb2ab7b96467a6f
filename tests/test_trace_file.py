"""Traces as files, alone and together with what torch's profiler has seen."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile
from trace_support import check_file, load

import torch_spheres as ts

X = torch.randn(36, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def spheres():
    with ts.KissingSpheres(levels=2, concurrency=3) as made:
        yield made


def test_a_trace_made_by_hand_is_saved(tmp_path):
    trace = ts.Trace(
        levels=2,
        concurrency=2,
        begin_ns=1000,
        end_ns=9001,
        slices=[
            ts.Slice(0, 1000, 9001, "state", "idle"),
            ts.Slice(3, 1000, 9001, "state", "processing"),
            ts.Slice(3, 1500, 2501, "item", "item", 0, 1),
            ts.Slice(3, 1500, 2501, "phase", "forward", 0),
        ],
        arrows=[
            ts.Arrow("steal", 0, 3, 1500, 1500),
            ts.Arrow("work", 0, 5, 1500, 1600),  # nothing stands on the track of sphere 5
        ],
        counters=[ts.Counter("running spheres", 1000, 1)],
    )
    trace.save(tmp_path / "run.json")
    data = load(tmp_path / "run.json")
    tracks = check_file(data)
    assert list(tracks) == ["sphere root", "sphere 2"]
    state, item, shard = tracks["sphere 2"]
    assert (state["name"], state["ts"], str(state["dur"])) == ("processing", 0, "8.001")
    assert (item["name"], str(item["ts"]), str(item["dur"])) == ("item 0", "0.500", "1.001")
    assert item["args"] == {"item": 0, "items": 1, "owner": "0", "stolen": True}
    assert shard["name"] == "forward, shard 0"
    assert [e["name"] for e in data["traceEvents"] if e["ph"] in "sf"] == ["steal"] * 2
    with pytest.raises(ValueError, match="made by hand"):
        trace.save(tmp_path / "run.json", profiler=tmp_path / "run.json")


def train(spheres, tmp_path, steps=3):
    """A profiled and traced model; the profiler, the trace."""
    model = ts.SphereParallel(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), spheres)
    everything = _ExperimentalConfig(profile_all_threads=True)
    model(X).sum().backward()
    with (
        profile(activities=[ProfilerActivity.CPU], experimental_config=everything) as profiler,
        spheres.trace() as trace,
    ):
        for _ in range(steps):
            model(X).sum().backward()
    return profiler, trace


SLACK_US = 5  # two clocks are compared; a phase begins and ends some microseconds further out


@pytest.mark.parametrize("how", ["object", "path", "compressed path"])
def test_operators_of_a_shard_stand_under_the_sphere_that_ran_it(spheres, tmp_path, how):
    profiler, trace = train(spheres, tmp_path)
    source = profiler
    if how != "object":
        source = tmp_path / ("profile.json" if how == "path" else "profile.json.gz")
        profiler.export_chrome_trace(str(source))
    trace.save(tmp_path / "run.json", profiler=source)
    data = load(tmp_path / "run.json")
    check_file(data)
    events = data["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    threads = Counter(e["tid"] for e in events if e["name"] == "thread_name")
    tracks = {}
    for e in events:
        if e["ph"] == "X" and names.get(e["tid"], "").startswith("sphere "):
            tracks.setdefault(e["tid"], []).append(e)
    assert all(threads[tid] == 1 for tid in tracks)
    operators = phases = 0
    for found in tracks.values():
        ours = [e for e in found if e.get("cat") == "phase"]
        for e in found:
            if e["name"].startswith("SphereParallel shard "):
                _, _, shard, what = e["name"].split()
                phases += 1
            elif e["name"] in ("aten::addmm", "aten::linear"):
                what, shard = "forward", None
                operators += 1
            else:
                continue
            around = [
                p
                for p in ours
                if p["name"].startswith(what)
                and p["ts"] - SLACK_US <= e["ts"]
                and e["ts"] + e["dur"] <= p["ts"] + p["dur"] + SLACK_US
            ]
            assert around, e
            if shard is not None:
                assert any(p["args"]["shard"] == int(shard) for p in around)
    assert phases == 3 * 12 * 2
    assert operators == 3 * 12 * 4
    assert len({e["ts"] for e in events if e["ph"] == "X"}) > 100


@pytest.mark.parametrize("first", ["export", "save"])
def test_a_profiler_that_was_written_before_says_what_to_pass(spheres, tmp_path, first):
    profiler, trace = train(spheres, tmp_path, steps=1)
    if first == "export":
        profiler.export_chrome_trace(str(tmp_path / "profile.json"))
    else:
        trace.save(tmp_path / "first.json", profiler=profiler)
    with pytest.raises(RuntimeError, match="only once: give the path of that file"):
        trace.save(tmp_path / "run.json", profiler=profiler)
    assert not (tmp_path / "run.json").exists()
    if first == "export":
        trace.save(tmp_path / "run.json", profiler=tmp_path / "profile.json")
        check_file(load(tmp_path / "run.json"))


def test_a_profiler_that_saw_nothing_of_the_spheres_is_worth_a_warning(spheres, tmp_path):
    path = tmp_path / "run.json"

    def work():
        spheres.map(lambda k: torch.ones(3) + k, range(20))

    with profile(activities=[ProfilerActivity.CPU]) as earlier:
        torch.ones(3).add(1)
    with profile(activities=[ProfilerActivity.CPU]) as blind, spheres.trace() as trace:
        torch.ones(3).add(1)
        work()
    with pytest.warns(UserWarning, match="did not look at all threads") as seen:
        trace.save(path, profiler=blind)
    assert seen[0].filename == __file__
    check_file(load(path))
    with pytest.warns(UserWarning, match="of another time; profile and trace the same"):
        trace.save(path, profiler=earlier)
    # Where spheres ran nothing, there is nothing to miss.
    with profile(activities=[ProfilerActivity.CPU]) as alone, spheres.trace() as trace:
        torch.ones(3).add(1)
    trace.save(path, profiler=alone)


def test_what_cannot_be_merged_says_why(spheres, tmp_path):
    with spheres.trace() as trace:
        spheres.map(abs, range(5))
    path = tmp_path / "run.json"
    running = pytest.raises(RuntimeError, match="leave its 'with' block")
    with profile(activities=[ProfilerActivity.CPU]) as profiler, running:
        trace.save(path, profiler=profiler)
    with pytest.raises(TypeError, match="got int"):
        trace.save(path, profiler=3)
    with pytest.raises(FileNotFoundError):
        trace.save(path, profiler=tmp_path / "missing.json")
    other = tmp_path / "other.json"
    other.write_text("no JSON")
    with pytest.raises(ValueError, match=r"other.json is no trace of torch\.profiler"):
        trace.save(path, profiler=other)
    other.write_text("[]")
    with pytest.raises(ValueError, match="no 'traceEvents'"):
        trace.save(path, profiler=other)
    other.write_text('{"traceEvents": [{"ph": "M", "name": "process_name", "pid": -5}]}')
    with pytest.raises(ValueError, match="of another process"):
        trace.save(path, profiler=other)
    assert not path.exists()
