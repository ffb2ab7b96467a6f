"""The bits of one process, whatever number of processes shares the batch."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import fork_server
import pytest
import reference
import torch
import torch.distributed as dist
import zoo
from rank_output import printed
from torch.nn import functional as F
from torch.utils.data import DataLoader

import torch_spheres as ts
from torch_spheres.data.empty_slice import without_rows

HERE = Path(__file__).parents[1]
WAYS = ("loop", "mean", "count")


@functools.cache
def expected(name: str, kind: str, way: str, levels: int, rows: int) -> str:
    """In plain torch: shard after shard, in one process."""
    model = zoo.make(name)
    optimizers = zoo.optimizer_of(model, kind)
    losses = []
    for x, y in zoo.batches(rows):
        optimizers.zero_grad()
        leaves = 12 ** (levels - 1)
        if way == "loop":
            losses.append(reference.train_step(model, x, y, F.cross_entropy, leaves))
        else:
            loss_fn = F.cross_entropy if way == "mean" else sum_and_count
            losses.append(reference.train_step_by_shard(model, x, y, loss_fn, leaves))
        optimizers.step()
    return zoo.fingerprint(model, optimizers, losses)


def sum_and_count(output, target):
    return F.cross_entropy(output, target, reduction="sum"), len(target)


# name, optimizer, way, levels, rows, concurrency. 50 rows are uneven shards, 5 leave ranks empty.
SUITE = [
    *([name, "sgd", "loop", 2, 50, 1] for name in zoo.ZOO),
    *([name, "adamw", "mean", 2, 50, 2] for name in zoo.ZOO),
    *([name, "adamw", "count", 2, 50, 3] for name in list(zoo.ZOO)[:2]),
    *(["mlp with dropout", "adamw", way, 2, 5, 1] for way in WAYS),
    *([name, "sgd", "loop", 2, 5, 1] for name in ("residual net", "sparse embedding")),
    *(["mlp with dropout", "sgd", way, 3, 150, 2] for way in ("loop", "mean")),
    *(["cnn with batch norm", "sgd", way, 3, 20, 1] for way in ("loop", "mean")),
]


def compared(suite, world, folder, *options):
    """Digests of all ranks, which are those of one process."""
    script = HERE / "ranks_suite.py"
    fork_server.run_ranks(
        world, script, json.dumps(suite), folder, *options, timeout=280, quick_end=True
    )
    found = [json.loads((folder / f"{r}.json").read_text()) for r in range(world)]
    for case in suite:
        name, kind, way, levels, rows, _ = case
        for rank, digests in enumerate(found):
            whole = expected(name, kind, way, levels, rows)
            assert digests[json.dumps(case)] == whole, (case, rank)
    return found


@pytest.mark.timeout(300)
@pytest.mark.parametrize("world", [1, 2, 3, 4, 6])
def test_the_bits_of_one_process(world, tmp_path):
    compared(SUITE, world, tmp_path)


@pytest.mark.timeout(300)
def test_the_bits_of_one_process_on_twelve_ranks(tmp_path):
    compared([case for case in SUITE if case[5] == 1][::3], 12, tmp_path)


# name, way, rows of cases with 144 shards: uneven, as many as half of the ranks, fewer than groups.
WIDE = [
    *([name, "loop", 150] for name in ("mlp with dropout", "cnn with batch norm")),
    *([name, "mean", 150] for name in ("sparse embedding", "tied, unused, frozen")),
    *([name, "mean", 20] for name in ("cnn with batch norm", "transformer with dropout")),
    ["mlp with dropout", "count", 5],
]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("world", [9, 24])
def test_the_bits_of_one_process_on_ranks_that_share_groups(world, tmp_path):
    """Nine have leaves of two or three groups, in three parts; 24 have half of a group each."""
    suite = [[name, "adamw", way, 3, rows, 1] for name, way, rows in WIDE]
    if world == 9:
        compared(suite, world, tmp_path, "small buckets")
    else:  # so many processes on few cores take their time
        compared(suite[::2], world, tmp_path)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("world", "concurrency"), [(2, 6), (3, 1), (3, 4), (6, 2)])
def test_bits_are_equal_in_many_buckets(world, concurrency, tmp_path):
    suite = [
        *([name, "adamw", way, 2, 50, concurrency] for name in zoo.ZOO for way in WAYS[:2]),
        *([name, "sgd", way, 2, 50, concurrency] for name in zoo.OTHERS for way in WAYS[:2]),
        ["mlp with dropout", "sgd", "loop", 2, 5, concurrency],
        ["transformer with dropout", "sgd", "loop", 3, 150, concurrency],
    ]
    found = compared(suite, world, tmp_path, "small buckets")
    assert all(rank["buckets"] > 10 * len(suite) for rank in found)


def in_order(parts, world, rows, levels):
    """Rows of all ranks, put where they are in the batch of one process."""
    leaves = 12 ** (levels - 1)
    bounds = ts.shard_bounds(rows, leaves)
    own = [[k for k in range(leaves) if k % 12 * world // 12 == r] for r in range(world)]
    whole = [None] * rows
    for r, part in enumerate(parts):
        order = sorted(own[r], key=lambda k: (k % 12, k))
        places = [i for k in order for i in range(*bounds[k])]
        assert len(part) == len(places)
        for place, row in zip(places, part, strict=True):
            whole[place] = row
    return whole


@pytest.mark.timeout(300)
def test_loaders_hooks_and_gather_on_any_number_of_ranks(tmp_path):
    """The rows of one process, each on one rank; states of four ranks resume on 3, 2 and 1."""
    fork_server.run_ranks(4, HERE / "ranks_loaders.py", tmp_path, timeout=280, quick_end=True)
    found = [json.loads((tmp_path / f"{r}.json").read_text()) for r in range(4)]
    alone = found[0]["1"]
    for world in (4, 3, 2):
        for rank in range(world):
            assert found[rank][str(world)]["by hand"] == alone["by hand"]
            for way, mine in found[rank][str(world)]["chains"].items():
                if way in ("whole", "by_shard", "few", "said"):
                    assert mine == alone["chains"][way], (world, way)
                for a, b in zip(mine, alone["chains"][way], strict=True):
                    torch.testing.assert_close(torch.tensor(a), torch.tensor(b), msg=way)
        for levels in ("2", "3"):
            for name, batches in alone["loaders"][levels].items():
                theirs = [found[r][str(world)]["loaders"][levels][name] for r in range(world)]
                assert [len(t) for t in theirs] == [len(batches)] * world
                for b, columns in enumerate(batches):
                    for c, column in enumerate(columns):
                        parts = [t[b][c] for t in theirs]
                        whole = in_order(parts, world, len(column), int(levels))
                        assert whole == column, (world, levels, name, b, c)
    resumed = alone["loaders"]["2"]["samples 2 resumed"]
    assert resumed == alone["loaders"]["2"]["samples 2"][3:8]


def test_a_batch_without_rows_has_no_texts_either():
    batch = [torch.ones(1, 2), ["a text"], {"deep": (torch.ones(1), ("b",)), "n": torch.ones(())}]
    column, texts, rest = without_rows(batch)
    assert column.shape == (0, 2) and texts == []
    assert rest["deep"][0].shape == (0,) and rest["deep"][1] == ()
    assert rest["n"].dim() == 0


@pytest.mark.parametrize("world", [5, 7, 8, 24])
def test_numbers_of_processes_that_do_not_fit_are_refused(monkeypatch, world):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda _: world)
    monkeypatch.setattr(dist, "get_rank", lambda _: 0)
    for make in (
        lambda: ts.SphereParallel(torch.nn.Linear(2, 2)),
        lambda: ts.wrap(DataLoader(range(10))),
        lambda: ts.SphereBatchSampler(range(10), 2),
        lambda: ts.GradientHook(
            torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]), ts.KissingSpheres()
        ),
    ):
        out = ", or levels=3" if 144 % world == 0 else ""
        with pytest.raises(ValueError, match=rf"\[1, 2, 3, 4, 6, 12\]{out}"):
            make()


def test_a_group_needs_torch_distributed():
    with pytest.raises(ValueError, match="init_process_group"):
        ts.SphereParallel(torch.nn.Linear(2, 2), process_group=True)


@pytest.mark.timeout(120)
def test_the_documented_script_prints_the_same_on_any_number_of_ranks(tmp_path):
    page = (HERE.parent / "docs" / "processes.md").read_text()
    (text,) = (
        s for s in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S) if "train.py" in s
    )
    script = tmp_path / "train.py"
    script.write_text(text)
    alone = fork_server.run(script)
    assert alone.returncode == 0, alone.stderr
    assert float(alone.stdout) != 0
    first, *others = fork_server.run_ranks(3, script)
    assert [printed(rank.stdout) for rank in (first, *others)] == [alone.stdout, "", ""]
    # And as the page says: it is the environment of torchrun itself that the script reads.
    command = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, "--nproc-per-node", "2", script],
        capture_output=True,
        text=True,
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert printed(done.stdout) == alone.stdout


LAZY = """
import torch, torch.distributed as dist, torch_spheres as ts
from torch import nn
dist.init_process_group("gloo")
torch.manual_seed(0)
model = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(3))
x, y = torch.randn(48, 5), torch.randint(0, 3, (48,))
with ts.KissingSpheres(concurrency=1) as spheres:
    parallel = ts.SphereParallel(model, spheres)
    mine = next(iter(ts.SphereBatchSampler(range(48), 48, spheres=spheres)))
    loss = parallel.forward_backward(nn.functional.cross_entropy, x[mine], y[mine])
print(loss.item().hex(), [p.grad.double().sum().item().hex() for p in model.parameters()])
dist.destroy_process_group()
"""


def test_lazy_modules_learn_their_shapes_on_any_number_of_ranks():
    seen = {printed(r.stdout) for world in (1, 3) for r in fork_server.run_ranks(world, LAZY)}
    assert len(seen) == 1 and "0x" in seen.pop()


GROUPS = """
import gc, weakref, torch, torch.distributed as dist, torch_spheres as ts
dist.init_process_group("gloo")
torch.manual_seed(0)
gone = []
for _ in range(3):
    group = dist.new_group([0, 1])
    gone.append(weakref.ref(group))
    with ts.KissingSpheres(concurrency=1) as spheres:
        model = ts.SphereParallel(torch.nn.Linear(2, 2), spheres, process_group=group)
        model(torch.ones(6, 2)).sum().backward()
    dist.destroy_process_group(group)
    del model, group
    gc.collect()
print([ref() is None for ref in gone])
dist.destroy_process_group()
"""


def test_groups_that_were_destroyed_are_let_go():
    """All but the last, which the next one's first use lets go."""
    for rank in fork_server.run_ranks(2, GROUPS):
        assert printed(rank.stdout) == "[True, True, False]\n"
