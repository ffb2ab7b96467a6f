"""What a trace's file says."""

from __future__ import annotations

from trace_support import check_file, load

import torch_spheres as ts


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
    assert (item["name"], str(item["ts"]), str(item["dur"])) == ("item 0", "0.5", "1.001")
    assert item["args"] == {"item": 0, "items": 1, "owner": "0", "stolen": True}
    assert shard["name"] == "forward 0"
    assert [e["name"] for e in data["traceEvents"] if e["ph"] in "sf"] == ["steal"] * 2
