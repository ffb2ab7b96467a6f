"""What a shard costs beside torch's own operators, and where that goes.

python benchmarks/bench_shard.py [--quick] [--json PATH]

The shards of a batch run one after another on the calling thread, with one intra-op thread, and the
functions of each part of the work are timed, without what they call of other parts. (Each timed
call adds about 0.3 microseconds to the part that it is called from.) The module's forward and the
backward engine are torch's time, whatever they do.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from common import Report, Row, Section, arguments
from models import TASKS
from torch import nn

import torch_spheres as ts
from torch_spheres import _compat
from torch_spheres.reduction.streaming_sum import StreamingSum
from torch_spheres.training import engine, shard, sharded_call
from torch_spheres.training.autotune import Plan

SHARDS = 12
MODELS = ("MNIST MLP", "MNIST CNN", "GPT-2, 4 layers")
MOST = 25.0  # microseconds that a shard's forward may cost beside torch, and its backward
TORCH = "torch"
CALL = "once a call: checks of the module, outputs, buffers"
REST = "the rest of a shard"
SUM = "the gradients' sum"
PARTS: dict[str, list[tuple[Any, str]]] = {
    CALL: [(engine.Engine, "forward"), (sharded_call.ShardedCall, "run_backward")],
    REST: [(sharded_call.ShardedCall, "_forward_shard"), (shard.Shard, "backward")],
    TORCH: [(_compat, "gradients")],
    SUM: [(StreamingSum, "begin"), (StreamingSum, "add"), (StreamingSum, "finish")],
    "rows of the arguments": [
        (sharded_call.Split, "parts"), (sharded_call.CallArguments, "build"),
    ],
    "the replica and its buffers": [
        (sharded_call.ReplicaPool, "borrow"), (sharded_call.ReplicaPool, "give_back"),
        (shard.Replica, "begin_shard"), (sharded_call.ForwardEffects, "record_attributes"),
    ],
    "settings and random numbers": [
        (shard.in_shard, name) for name in ("__init__", "__enter__", "__exit__")
    ],
    "writes to the arguments": [(shard, "contents"), (shard, "version_of"),
                                (sharded_call.ForwardEffects, "compare_arguments")],
    "outputs and targets": [
        (shard, "flatten_output"), (sharded_call.ReachedTensors, "targets"),
        (sharded_call.ReachedTensors, "merge"),
    ],
}  # fmt: skip


class Clock:
    """Nanoseconds of each part, without those of parts that it calls."""

    def __init__(self) -> None:
        self.spent: Counter[str] = Counter()
        self._parts = ["outside"]
        self._since = time.perf_counter_ns()

    def switch(self) -> None:
        now = time.perf_counter_ns()
        self.spent[self._parts[-1]] += now - self._since
        self._since = now

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.switch()
            self._parts.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.switch()
                self._parts.pop()

        return call

    def read(self) -> Counter[str]:
        """What was spent since the last reading."""
        self.switch()
        spent, self.spent = self.spent, Counter()
        return spent


class Timed(nn.Module):
    """A model whose forward is torch's time."""

    def __init__(self, model: nn.Module, clock: Clock) -> None:
        super().__init__()
        self.model = model
        self.run = clock.timed(TORCH, lambda model, *inputs: model(*inputs))

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.run(self.model, *inputs)


def measure(name: str, steps: int) -> tuple[list[Counter[str]], list[Counter[str]]]:
    """Of each step's forward and backward, the parts' nanoseconds."""
    task, clock = TASKS[name], Clock()
    inputs, targets = task.batch(task.small, torch.Generator().manual_seed(1))
    forwards, backwards = [], []
    with (
        ts.KissingSpheres(concurrency=1) as spheres,
        mock.patch.multiple(engine, reproducible_ways=lambda *_: [Plan(SHARDS, 0)]),
    ):
        patches = [
            mock.patch.object(owner, attribute, clock.timed(part, getattr(owner, attribute)))
            for part, functions in PARTS.items()
            for owner, attribute in functions
        ]
        for patch in patches:
            patch.start()
        try:
            model = ts.SphereParallel(Timed(task.seeded(), clock), spheres, shards=SHARDS)
            for step in range(steps + 10):  # the first look for more than later ones
                model.zero_grad()
                clock.read()
                output = model(*inputs)
                forward = clock.read()
                loss = task.loss(output, targets)
                clock.read()
                loss.backward()
                if step >= 10:
                    forwards.append(forward)
                    backwards.append(clock.read())
        finally:
            for patch in patches:
                patch.stop()
    return forwards, backwards


def section(name: str, steps: int) -> Section:
    made = Section(
        f"{name}, {TASKS[name].small} rows in {SHARDS} shards: microseconds for each shard",
        "of all that is not torch",
    )
    for what, spent in zip(("forward", "backward"), measure(name, steps), strict=True):
        medians = {
            part: statistics.median(each[part] for each in spent) / SHARDS / 1e3 for part in PARTS
        }
        ours = sum(medians.values()) - medians[TORCH]
        for part, microseconds in sorted(medians.items(), key=lambda item: -item[1]):
            if microseconds:
                note = "" if part == TORCH else f"{microseconds / ours:.0%} of ours"
                made.add(Row(f"{what}: {part}", f"{microseconds:.1f}", note=note))
        of_shard = ours - medians[CALL] - medians[SUM]
        made.add(
            Row(
                f"{what}: all but torch, the sum and what is done once a call",
                f"{of_shard:.1f}",
                target=f"<= {MOST:g}",
                met=of_shard <= MOST,
            )
        )
        made.samples[what] = [{part: each[part] for part in PARTS} for each in spent]
    return made


def main() -> None:
    options = arguments("shard", __doc__.partition("\n")[0])
    torch.set_num_threads(1)
    report = Report("bench_shard", {"shards": SHARDS, "quick": options.quick})
    for name in MODELS:
        report.add(section(name, 3 if options.quick else 60))
    report.save(options.json)


if __name__ == "__main__":
    main()
