"""One way to train one model, as a process of its own that does what it is told through a pipe.

`crews.py` starts it. It imports what its way needs and nothing else; torch_spheres only if it is
ours, so that no peer is measured, for better or worse, with the library loaded.
"""

from __future__ import annotations

import gc
import inspect
import math
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import serving
import torch
from models import TASKS, Task
from torch import Tensor, nn

PLAIN = "plain"
EAGER = "plain, not compiled"  # only where the others are
ACCUMULATE = "accumulate"
DDP = "DDP"
TUNED = "reproducible=False"
REPRODUCIBLE = "reproducible=True"
FORWARD_BACKWARD = "forward_backward"

FEWER = {f"reproducible=True, shards={n}": n for n in (4, 2)}

PEERS = (PLAIN, EAGER, ACCUMULATE, DDP)
OURS = (TUNED, REPRODUCIBLE, *FEWER, FORWARD_BACKWARD)

SHARDS = 12
BATCHES = 4  # that are trained on in turn
PAUSE = 0.02  # seconds; the last contestant's threads spin a little before they sleep

Gradients = Callable[[tuple[Tensor, ...], Tensor], Tensor]
"""Forward, loss and backward of a batch; returns the loss."""


@dataclass(frozen=True)
class Setup:
    way: str
    task: str
    rows: int
    """Of the whole batch, however many share it."""
    workers: int
    """Intra-op threads, processes or spheres that run at once, as the way has it."""
    optimizer: str = "SGD"
    levels: int = 2
    compiled: bool = False
    """Whether the model is compiled by `torch.compile`, but for `EAGER`."""
    rank: int = 0
    meeting: str = ""
    """A file through which DDP's processes find each other."""

    @property
    def processes(self) -> int:
        return self.workers if self.way == DDP else 1


# ---- the ways ----


def whole(model: nn.Module, task: Task, scale: float = 1.0) -> Gradients:
    """The usual loop; `scale` is for a share of the batch that is not an equal one."""

    def gradients(inputs: tuple[Tensor, ...], targets: Tensor) -> Tensor:
        loss = task.loss(model(*inputs), targets)
        if scale != 1:
            loss = loss * scale
        loss.backward()
        return loss.detach()

    return gradients


def accumulated(model: nn.Module, task: Task) -> Gradients:
    """The usual loop for gradient accumulation, over the shards that ours has."""

    def gradients(inputs: tuple[Tensor, ...], targets: Tensor) -> Tensor:
        total = torch.zeros(())
        pieces = zip(*(x.tensor_split(SHARDS) for x in (*inputs, targets)), strict=True)
        for *xs, y in pieces:
            loss = task.loss(model(*xs), y) * (len(y) / len(targets))
            loss.backward()
            total += loss.detach()
        return total

    return gradients


def distributed(setup: Setup, model: nn.Module) -> nn.Module:
    """The model as each process of DDP has it, set up to be fast.

    Buffers are not kept equal: they are batch norm's statistics, and those of the first process do.
    Buckets are torch's 25 MiB; 5 or 100 made no difference that could be measured.
    """
    from torch.distributed import init_process_group
    from torch.nn.parallel import DistributedDataParallel

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # whatever the host's name resolves to
    # Depthwise convolutions have gradients of another layout than their weights: DDP copies them.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    init_process_group(
        "gloo",
        init_method=Path(setup.meeting).as_uri(),
        rank=setup.rank,
        world_size=setup.workers,
    )
    known = inspect.signature(DistributedDataParallel).parameters
    no_sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options = {no_sync: False}  # by its name in this release
    return DistributedDataParallel(
        model, gradient_as_bucket_view=True, static_graph=True, **options
    )


def on_spheres(setup: Setup, model: nn.Module) -> nn.Module:
    import torch_spheres as ts

    spheres = ts.KissingSpheres(setup.levels, concurrency=setup.workers)
    shards = FEWER.get(setup.way)
    return ts.SphereParallel(model, spheres, reproducible=setup.way != TUNED, shards=shards)


def build(setup: Setup, task: Task) -> tuple[nn.Module, Gradients]:
    model: nn.Module = task.seeded()
    if setup.compiled and setup.way != EAGER:
        model = torch.compile(model)  # type: ignore[assignment]
    if setup.way in (PLAIN, EAGER):
        return model, whole(model, task)
    if setup.way == ACCUMULATE:
        return model, accumulated(model, task)
    if setup.way == DDP:
        begin, end = share(setup)
        model = distributed(setup, model)
        return model, whole(model, task, (end - begin) * setup.workers / setup.rows)
    model = on_spheres(setup, model)
    if setup.way == FORWARD_BACKWARD:
        return model, lambda inputs, targets: model.forward_backward(task.loss, inputs, targets)
    return model, whole(model, task)


def share(setup: Setup) -> tuple[int, int]:
    """The rows of the batch that this process has."""
    begin, end = (setup.rows * (setup.rank + i) // setup.processes for i in (0, 1))
    return begin, end


# ---- what a contestant can be told to do ----


class Contestant:
    """The public methods are the commands that come through the pipe."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        torch.set_num_threads(1 if setup.way == DDP else setup.workers)
        task = TASKS[setup.task]
        generator = torch.Generator().manual_seed(1)
        mine = slice(*share(setup))
        self._batches = [
            (tuple(x[mine].clone() for x in inputs), targets[mine].clone())
            for inputs, targets in (task.batch(setup.rows, generator) for _ in range(BATCHES))
        ]
        self._model, self._gradients = build(setup, task)
        parameters = self._model.parameters()
        if setup.optimizer == "AdamW":
            self._optimizer: torch.optim.Optimizer = torch.optim.AdamW(parameters, lr=1e-4)
        else:
            self._optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)
        self._steps = 0

    def check(self) -> tuple[float, float]:
        """The first batch's loss, and the norm of its gradient, in evaluation mode.

        There batch norm does not depend on how the batch is cut, so all contestants must agree.
        """
        self._model.eval()
        loss = self._gradients(*self._batches[0])
        if self.setup.processes > 1:
            torch.distributed.all_reduce(loss)
            loss /= self.setup.processes
        norms = [p.grad.norm().item() for p in self._model.parameters() if p.grad is not None]
        self._optimizer.zero_grad()
        self._model.train()
        return loss.item(), math.hypot(*norms)

    def warm(self) -> bool:
        """A step; True when there have been enough for this way to be at its best."""
        self._step()
        return self._steps >= 2 and (self.setup.way != TUNED or self.plan() is not None)

    def plan(self) -> str | None:
        """What a model that tunes itself has chosen, if it has."""
        plan = self._model.plan
        return None if plan is None else str(plan)

    def run(self, steps: int) -> float:
        """Seconds of a step, over so many; for several processes, of the slowest."""
        gc.collect()
        gc.disable()
        try:
            time.sleep(PAUSE)
            self._meet()
            start = time.perf_counter()
            for _ in range(steps):
                self._step()
            self._meet()
            return (time.perf_counter() - start) / steps
        finally:
            gc.enable()

    def memory(self) -> dict[str, int]:
        """Bytes: the peak of what was resident, and how much of that are files (libraries)."""
        status = serving.kibibytes("/proc/self/status")
        return {
            "peak": status["VmHWM"],
            "files": status["RssFile"] + status["RssShmem"],
            "pss at the end": serving.kibibytes("/proc/self/smaps_rollup").get("Pss", 0),
        }

    def _step(self) -> None:
        inputs, targets = self._batches[self._steps % BATCHES]
        self._optimizer.zero_grad()
        self._gradients(inputs, targets)
        self._optimizer.step()
        self._steps += 1

    def _meet(self) -> None:
        if self.setup.processes > 1:
            torch.distributed.barrier()


# ---- the process ----


def prepare() -> None:
    import torch._dynamo  # the optimizers do it later, which takes each of them a second
    import torch.distributed  # noqa: F401


if __name__ == "__main__":
    serving.main(lambda order: Contestant(Setup(**order)), prepare)
