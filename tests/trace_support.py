"""What must hold of every trace, and of every file in Chrome's trace-event format."""

from __future__ import annotations

import gzip
import json
import time
from collections import Counter, defaultdict
from decimal import Decimal
from itertools import pairwise

import torch_spheres as ts

ARROWS = ("work", "steal", "gradient")


def load(path):
    """A trace file, its times exact."""
    data = path.read_bytes()
    text = gzip.decompress(data) if path.suffix == ".gz" else data
    return json.loads(text, parse_float=Decimal)


def check_file(data):
    """Events are well-formed; slices nest on each track; arrows begin and end on slices.

    Returns:
        The tracks: {name: slices by time}.
    """
    assert set(data) >= {"traceEvents", "displayTimeUnit"}
    events = data["traceEvents"]
    names, slices, flows = {}, defaultdict(list), defaultdict(list)
    last_counted = {}
    for event in events:
        assert event["ph"] in set("XMsfC"), event
        if event["ph"] == "M":
            if event["name"] == "thread_name":
                names[event["pid"], event["tid"]] = event["args"]["name"]
            continue
        assert event["ts"] >= 0 and isinstance(event["name"], str)
        if event["ph"] == "X":
            assert event["dur"] >= 0
            slices[event["pid"], event["tid"]].append(event)
        elif event["ph"] in "sf":
            assert event["cat"] in ARROWS
            flows[event["cat"], event["id"]].append(event)
        elif event["ph"] == "C":
            (value,) = event["args"].values()
            assert value >= 0
            assert event["ts"] >= last_counted.get(event["name"], 0), "counters go on in time"
            last_counted[event["name"]] = event["ts"]
    tracks = {}
    for track, found in slices.items():
        begins = [s["ts"] for s in found]
        assert begins == sorted(begins), "times are monotonic on each track"
        found.sort(key=lambda s: (s["ts"], -s["dur"]))
        check_nesting([(s["ts"], s["ts"] + s["dur"]) for s in found])
        tracks[names[track]] = found
    for flow in flows.values():
        assert [e["ph"] for e in flow] == ["s", "f"]
        start, finish = flow
        assert start["ts"] <= finish["ts"] and finish["bp"] == "e"
        for end in flow:
            around = slices[end["pid"], end["tid"]]
            assert any(s["ts"] <= end["ts"] <= s["ts"] + s["dur"] for s in around), end
    return tracks


def check_nesting(intervals):
    """Of two intervals, in order of begin, one is in the other, or they are apart."""
    stack = []
    for begin, end in intervals:
        assert begin <= end
        while stack and stack[-1] <= begin:
            stack.pop()
        assert not stack or end <= stack[-1], (begin, end, stack[-1])
        stack.append(end)


def check_trace(trace, spheres):
    """A trace's slices, arrows and counters fit each other and the spheres."""
    topology = spheres.topology
    by_sphere = defaultdict(list)
    for s in trace.slices:
        assert trace.begin_ns <= s.begin_ns <= s.end_ns <= trace.end_ns
        assert s.sphere in trace.threads or topology.contains(s.sphere)
        by_sphere[s.sphere].append(s)
        if s.kind == "item":
            assert s.owner == topology.leaf_of_item(s.item)
    assert [s.begin_ns for s in trace.slices] == sorted(s.begin_ns for s in trace.slices)
    for sphere, found in by_sphere.items():
        check_nesting([(s.begin_ns, s.end_ns) for s in found])
        states = [s for s in found if s.kind == "state"]
        for before, after in pairwise(states):
            assert before.end_ns <= after.begin_ns
            if before.end_ns == after.begin_ns:
                assert [before.name, after.name].count("ready") == 1  # the hub
        if sphere >= 0:
            for s in found:
                if s.kind == "item":
                    inside = [t for t in states if t.begin_ns <= s.begin_ns <= t.end_ns]
                    assert any(t.end_ns >= s.end_ns for t in inside)
    for arrow in trace.arrows:
        assert trace.begin_ns <= arrow.sent_ns <= arrow.received_ns <= trace.end_ns
        if arrow.kind == "steal":
            assert arrow.sent_ns == arrow.received_ns
        if arrow.kind == "work":
            assert topology.is_leaf(arrow.target) and topology.is_leaf(arrow.source)
            assert arrow.source != arrow.target
    values = defaultdict(list)
    for c in trace.counters:
        values[c.name].append(c.value)
    assert set(values) == {"running spheres", "queued items"}
    assert max(values["running spheres"]) <= spheres.concurrency
    return by_sphere


def wait_until_idle(spheres):
    """Until all spheres sleep, and nobody looks for work."""
    while any(s.state is not ts.State.IDLE for s in spheres.stats()):
        time.sleep(0.001)


def items_in(trace):
    return sum(s.count for s in trace.slices if s.kind == "item")


def steals_in(trace):
    return sum(a.count for a in trace.arrows if a.kind == "steal")


def phases_in(trace):
    """{(phase, shard): how often}"""
    return Counter((s.name, s.item) for s in trace.slices if s.kind == "phase")
