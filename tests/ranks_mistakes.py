"""What each rank of test_rank_errors.py runs: mistakes that all ranks hear of."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from loop_support import W, no_graph_left_behind
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler

import torch_spheres as ts
from torch_spheres.distributed import failures
from torch_spheres.distributed.group import find_ranks

LOSSES = ("killed, big", "killed", "hangs", "raises")  # of a rank


class Fails(nn.Module):
    """Where and when it is told."""

    def __init__(self):
        super().__init__()
        self.linear, self.when = nn.Linear(4, 3), ""

    def forward(self, x):
        y = self.linear(x)
        if self.when == "forward":
            raise KeyError("no such thing")
        if self.when == "backward":
            y.register_hook(self.fail)
        return y

    @staticmethod
    def fail(_grad):
        raise ZeroDivisionError("in a hook")


class Frozen(Mapping):
    """A mapping of which no copy with other values can be made."""

    def __init__(self, values):
        self.values_ = values

    def __getitem__(self, key):
        return self.values_[key]

    def __iter__(self):
        return iter(self.values_)

    def __len__(self):
        return len(self.values_)


def part(rows=48, columns=4):
    """This rank's rows."""
    mine = next(iter(ts.SphereBatchSampler(range(rows), rows)))
    return torch.arange(rows * float(columns)).view(rows, columns)[mine]


def expect_everywhere(model, run, match, own=None):
    """A mistake of all is a ValueError; one of rank 1 is its own there, and told elsewhere."""
    kind = ValueError if own is None else own if dist.get_rank() == 1 else ts.RankError
    with pytest.raises(kind, match=match if kind is not own else None):
        run()
    model.zero_grad()
    model(part()).sum().backward()
    total = model.module.linear.weight.grad.clone()
    dist.all_reduce(total)
    assert torch.equal(total, model.module.linear.weight.grad * dist.get_world_size())


def mistakes(spheres):
    rank = dist.get_rank()
    second = rank == 1
    torch.manual_seed(0)
    module = Fails()
    model = ts.SphereParallel(module, spheres)

    def train(x=None, targets=None):
        x = part() if x is None else x
        model(x).sum().backward()

    def train_by_shard(rows=None):
        x = part()
        targets = torch.zeros(len(x) if rows is None else rows, dtype=torch.long)
        model.forward_backward(F.cross_entropy, x, targets)

    # Rows, shapes, modes, seeds.
    expect_everywhere(
        model, lambda: train(part()[: 5 if second else None]), "the ranks have .* rows"
    )
    expect_everywhere(model, lambda: train(part(columns=4 + second)), "types or shapes")

    def other_mode():
        model.train(not second)
        try:
            train()
        finally:
            model.train()

    expect_everywhere(model, other_mode, "different modes")

    def other_call():
        (train_by_shard if second else train)()

    expect_everywhere(model, other_call, "different ways")

    def other_seed():
        torch.manual_seed(rank)
        try:
            train()
        finally:
            torch.manual_seed(0)

    expect_everywhere(model, other_seed, "seeded differently .*: 0 on rank 0, 1 on rank 1")

    # Errors in the module, in a loss, in the arguments.
    for when, error in (("forward", KeyError), ("backward", ZeroDivisionError)):
        for run in (train, train_by_shard):

            def fail(run=run, when=when):
                module.when = when if second else ""
                try:
                    run()
                finally:
                    module.when = ""

            expect_everywhere(model, fail, f"rank 1 of 2: {error.__name__}", error)
            with no_graph_left_behind(), pytest.raises((error, ts.RankError)):
                fail()
            model.zero_grad()
    expect_everywhere(
        model, lambda: train_by_shard(3 if second else None), "targets of 3", ValueError
    )
    expect_everywhere(
        model, lambda: train([1] if second else None), "found no tensor with rows", ValueError
    )
    frozen = Frozen({"x": part()})
    expect_everywhere(
        model, lambda: train(frozen if second else None), "gives no copy of it", TypeError
    )
    expect_everywhere(
        model,
        lambda: model.forward_backward(
            F.mse_loss, (frozen if second else part(),), part(columns=3)
        ),
        "gives no copy of it",
        TypeError,
    )

    # Gradients that the ranks have no place for, and buffers that they could not agree on.
    strange = W(lambda s, x: s.h[0](s.n(x)), h=[nn.Linear(4, 4)])
    grown = W(lambda s, x: setattr(s, "b", x[:, 0].detach()) or s.n(x))
    grown.register_buffer("b", torch.zeros(0))
    for module, kind, match in (
        (strange, RuntimeError, "have to be parameters of registered layers"),
        (grown, ValueError, "was given others while the shards ran"),
    ):
        with pytest.raises(kind, match=match):
            ts.SphereParallel(module, spheres)(part())
    with torch.no_grad():
        ts.SphereParallel(strange, spheres)(part())

    # Models and settings.
    for make, match in (
        (
            lambda: nn.Linear(4, 3 + second),
            r"rank 0 has 'weight' .*\(3, 4\).* rank 1 has .*\(4, 4\)",
        ),
        (lambda: nn.Linear(4, 3, bias=not second), "rank 0 has 'bias'.* rank 1 has nothing"),
    ):
        with pytest.raises(ValueError, match=match):
            ts.SphereParallel(make(), spheres)
    with (
        ts.KissingSpheres(2 + second) as others,
        pytest.raises(ValueError, match="levels is 2 on rank 0 and 3 on rank 1"),
    ):
        ts.SphereParallel(nn.Linear(2, 2), others)
    data = range(48)
    for loader, match in (
        (DataLoader(data, 12, sampler=DistributedSampler(data)), "DistributedSampler"),
        (DataLoader(data, None), "batch_size=None"),
    ):
        with pytest.raises(ValueError, match=match):
            ts.wrap(loader, spheres)
    with pytest.raises(ValueError, match="SphereBatchSampler"):
        ts.wrap(DataLoader(data, 12, num_workers=1), spheres, workers="process")

    # Draws of one rank alone: the shards' stay the same on all, and it is said once.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            if second:
                torch.rand(1)
            train()
    assert [w for w in caught if "not at the same place on all ranks" in str(w.message)]


def parts_company(how, spheres):
    """Rank 1 does something else than the others, after a good step."""
    torch.manual_seed(0)
    wide = 200_000 if "big" in how else 3  # of more than a bucket
    model = ts.SphereParallel(nn.Sequential(nn.Linear(4, wide), nn.Linear(wide, 3)), spheres)
    model(part()).sum().backward()
    second = dist.get_rank() == 1
    loss = model(part()).sum()
    try:
        if not second:
            loss.backward()
        elif "loader" in how:
            next(iter(ts.wrap(DataLoader(range(48), 12), spheres)))
        elif "gather" in how:
            model.gather(part())
        elif "by shard" in how:
            model.forward_backward(lambda y, t: y.sum(), part(), part())
        elif "checkpoint" in how:
            ts.save_checkpoint("never.pt", model=model)
        else:
            model(part())
    except ts.RankError as error:
        print("apart", error.ranks, error, flush=True)
    try:
        model(part())
    except ts.RankError as error:
        print("still", error.ranks, error, flush=True)


def loses_a_rank(how, spheres, limit):
    """Rank 1 goes; the others say so."""
    torch.manual_seed(0)
    if how == "late":
        return late()
    big = nn.Sequential(nn.Linear(4, 100_000), nn.Linear(100_000, 3))
    model = ts.SphereParallel(big if how == "killed, big" else Fails(), spheres)
    model(part()).sum().backward()
    if how == "killed, big":  # its sums are sent when there is nobody to send them to
        loss = model(part()).sum()
    lost = torch.tensor(os.getpid())
    dist.broadcast(lost, 1)
    # The timeout is for what comes now: connecting and the first step take what they take.
    dist.distributed_c10d._set_pg_timeout(limit)
    failures._ROLL_CALL = 8.0  # nor is a rank lost that has no core for a while
    if how == "killed, big":
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        while Path(f"/proc/{lost.item()}").exists():
            time.sleep(0.01)
        try:
            loss.backward()
        except ts.RankError as error:
            print("ranks", error.ranks, error, flush=True)
        return None
    if dist.get_rank() == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif how == "raises":
            raise KeyError("the user's own mistake")
        elif how == "hangs":
            signal.pause()  # until the test has ended
    try:
        if how == "hangs" and dist.get_world_size() == 2:
            print("alone", flush=True)
        model(part()).sum().backward()
    except ts.RankError as error:
        print("ranks", error.ranks, error, flush=True)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    return None


def ends():
    """The interpreter ends while torch's threads let go what they have sent."""
    ranks = find_ranks(None, 12)
    ranks.gather(torch.zeros(3), "connecting")
    sys.setswitchinterval(100)  # seconds: a thread that wants the GIL is not given it
    ranks.gather(torch.zeros(3), "the end")
    sys.exit()


def late():
    """A rank that comes when the others are just looking whether it has: that is no failure."""
    ranks, over = find_ranks(None, 12), threading.Event()

    def busy():
        while not over.is_set():
            sum(range(20_000))

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        for step in range(12):
            if dist.get_rank() == 1:
                time.sleep(0.09 + 0.0025 * step)
            for size in (3, 100_000):
                table = ranks.gather(torch.full((size,), float(dist.get_rank())), "late")
                assert table[:, -1].tolist() == [0.0, 1.0]
    finally:
        over.set()
        thread.join()
    print("in time", flush=True)


def main() -> None:
    how, timeout = sys.argv[1:]
    warnings.simplefilter("ignore", FutureWarning)
    limit = timedelta(seconds=float(timeout))
    # (gloo of releases before 2.11 keeps the limit that it was made with.)
    can_change = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)
    longer = max(limit, timedelta(seconds=60)) if how in LOSSES and can_change else limit
    dist.init_process_group("gloo", timeout=longer)
    if how == "ends":
        ends()
    with ts.KissingSpheres(concurrency=2) as spheres:
        if how == "mistakes":
            mistakes(spheres)
        elif how.startswith("apart"):
            parts_company(how, spheres)
        else:
            loses_a_rank(how, spheres, limit)
    if how == "mistakes":
        dist.destroy_process_group()
    sys.stdout.flush()
    if how.startswith("apart"):
        sys.exit(3)  # as a program that has caught the error: that is what it ends with
    os._exit(0)


if __name__ == "__main__":
    main()
