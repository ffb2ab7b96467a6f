"""`shards=`: fewer, larger shards than there are leaves, with the bits of the reference."""

from __future__ import annotations

import copy
import functools
import pickle
import random
import time
from pathlib import Path

import fork_server
import numpy as np
import pytest
import ranks_shards
import reference
import torch
import zoo
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import torch_spheres as ts
from torch_spheres.reduction.partition import divide, shard_leaves, tree_leaves, tree_order
from torch_spheres.training.shard_timing import ShardTimes

PROGRAM = Path(ranks_shards.__file__)
DIVISORS = [1, 2, 3, 4, 6, 12]


@functools.cache
def expected(name: str, shards: int, rows: int) -> str:
    model = zoo.make(name)
    optimizers = zoo.optimizer_of(model, "sgd")
    losses = []
    for x, y in zoo.batches(rows):
        optimizers.zero_grad()
        losses.append(reference.train_step(model, x, y, F.cross_entropy, shards))
        optimizers.step()
    return zoo.fingerprint(model, optimizers, losses)


def trained(name: str, shards: int, rows: int, spheres: ts.KissingSpheres) -> str:
    model = zoo.make(name)
    parallel = ts.SphereParallel(model, spheres, shards=shards)
    optimizers = zoo.optimizer_of(model, "sgd")
    losses = []
    for x, y in zoo.batches(rows):
        optimizers.zero_grad()
        loss = F.cross_entropy(parallel(x), y)
        loss.backward()
        optimizers.step()
        losses.append(loss.detach())
    return zoo.fingerprint(model, optimizers, losses)


@pytest.mark.parametrize("shards", DIVISORS)
@pytest.mark.parametrize("name", zoo.ZOO)
def test_bits_equal_the_reference(name: str, shards: int) -> None:
    for concurrency, rows in ((2, 50), (12, 50), (3, 8)):
        with ts.KissingSpheres(concurrency=concurrency) as spheres:
            assert trained(name, shards, rows, spheres) == expected(name, shards, rows)


@pytest.mark.parametrize("shards", [1, 6, 8, 12, 16, 24, 48, 72, 144])
def test_bits_with_three_levels(shards: int) -> None:
    for concurrency, rows in ((1, 20), (3, 150)):
        with ts.KissingSpheres(3, concurrency=concurrency) as spheres:
            assert trained("mlp with dropout", shards, rows, spheres) == expected(
                "mlp with dropout", shards, rows
            )


@pytest.mark.parametrize("shards", DIVISORS)
def test_a_deeper_hierarchy_has_the_same_bits(shards: int) -> None:
    with ts.KissingSpheres(3, concurrency=2) as deep:
        if shards < 12:
            assert trained("cnn with batch norm", shards, 30, deep) == expected(
                "cnn with batch norm", shards, 30
            )


@pytest.mark.parametrize("shards", DIVISORS)
def test_losses_by_shard(shards: int) -> None:
    torch.manual_seed(1)
    x, y = torch.randn(50, 1, 12, 12), torch.randint(10, (50,))
    for loss_fn in (F.cross_entropy, lambda o, t: (F.cross_entropy(o, t, reduction="sum"), len(t))):
        model = zoo.make("mlp with dropout")
        plain = copy.deepcopy(model)
        torch.manual_seed(2)
        loss = reference.train_step_by_shard(plain, x, y, loss_fn, shards)
        with ts.KissingSpheres(concurrency=3) as spheres:
            torch.manual_seed(2)
            mine = ts.SphereParallel(model, spheres, shards=shards)
            assert torch.equal(mine.forward_backward(loss_fn, x, y), loss)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None)
            assert p.grad is None or torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("shards", DIVISORS)
def test_batch_norm_over_the_whole_batch(shards: int) -> None:
    x = torch.randn(24, 3, generator=torch.Generator().manual_seed(1))
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    plain = copy.deepcopy(model)
    plain(x).square().mean().backward()
    with ts.KissingSpheres(concurrency=3) as spheres:
        parallel = ts.SphereParallel(ts.convert_sync_batchnorm(model), spheres, shards=shards)
        parallel(x).square().mean().backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_the_number_is_kept_by_copies_and_pickles() -> None:
    with ts.KissingSpheres(concurrency=2) as spheres:
        parallel = ts.SphereParallel(zoo.make("mlp with dropout"), spheres, shards=3)
        assert parallel.shards == copy.deepcopy(parallel).shards == 3
        again = pickle.loads(pickle.dumps(parallel))
        assert again.shards == 3
        again.spheres.stop()
        model = ts.parallelize_(zoo.make("mlp with dropout"), spheres, shards=4)
        assert model.forward.engine.shards == 4
        assert ts.SphereParallel(zoo.make("mlp with dropout"), spheres).shards == 12


@pytest.mark.parametrize(
    ("shards", "error", "match"),
    [
        (5, ValueError, r"divide the 12 leaves.*got 5: use one of \[1, 2, 3, 4, 6, 12\]; there"),
        (24, ValueError, "divide the 12 leaves of the spheres, got 24"),
        (0, ValueError, "got 0"),
        (-1, ValueError, "got -1"),
        (2.0, TypeError, "shards must be an integer, got 2.0"),
        (True, TypeError, "shards must be an integer, got True"),
        ("4", TypeError, "shards must be an integer"),
    ],
)
def test_other_numbers_are_refused(shards, error, match) -> None:
    with ts.KissingSpheres() as spheres:
        for make in (ts.SphereParallel, ts.parallelize_):
            with pytest.raises(error, match=match):
                make(zoo.make("mlp with dropout"), spheres, shards=shards)


# ---- who has which shards ----


@pytest.mark.parametrize("shards", [n for n in range(1, 1729) if 1728 % n == 0])
def test_ranks_have_blocks_of_the_tree(shards: int) -> None:
    leaves = tree_leaves(shards)
    order = tree_order(leaves)
    assert leaves % shards == 0 and len({*shard_leaves(shards)}) == shards
    for world in (n for n in (1, 2, 3, 4, 6, 8, 12, 24, 36) if shards % n == 0):
        division = divide(world, shards)
        owned = [division.owned(r) for r in range(world)]
        assert sorted(k for own in owned for k in own) == sorted(shard_leaves(shards))
        for r, own in enumerate(owned):
            block = {*order[r * leaves // world : (r + 1) * leaves // world]}
            assert block.issuperset(own)
        for rows in (0, 5, shards, 3 * shards + 7):
            ranges = [division.ranges(r, rows) for r in range(world)]
            cut = [row for mine in ranges for piece in mine for row in piece]
            assert sorted(cut) == [*range(rows)]
            counts = division.counts(rows)
            assert counts == [sum(map(len, mine)) for mine in ranges]
            for r, mine in enumerate(ranges):
                assert division.sizes(r, counts[r]) == [*map(len, mine)]


@pytest.mark.parametrize(
    ("way", "name", "levels", "shards", "worlds"),
    [
        ("wrap", "mlp with dropout", 2, 4, (2, 4)),
        ("wrap", "cnn with batch norm", 2, 6, (3,)),
        ("prepare", "mlp with dropout", 2, 2, (2,)),
        ("prepare", "mlp with dropout", 3, 16, (4,)),
        ("sampler", "mlp with dropout", 2, 3, (3,)),
        ("sampler", "mlp with dropout", 3, 24, (2,)),
    ],
)
def test_the_bits_of_one_process_on_several(tmp_path, way, name, levels, shards, worlds) -> None:
    alone = ranks_shards.trained(way, name, levels, shards)
    for world in worlds:
        fork_server.run_ranks(world, PROGRAM, way, name, levels, shards, tmp_path, quick_end=True)
        assert {p.read_text() for p in tmp_path.iterdir()} == {alone}


MISTAKES = """
import pytest, torch, torch.distributed as dist, torch_spheres as ts
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
dist.init_process_group("gloo")
rank, _ = dist.get_rank(), torch.manual_seed(0)
data = DataLoader(TensorDataset(torch.randn(48, 3), torch.randn(48, 1)), 24)
with ts.KissingSpheres() as spheres:
    with pytest.raises(ValueError, match=r"2 processes cannot share the shards \\(3\\).*another"):
        ts.SphereParallel(nn.Linear(3, 1), spheres, shards=3)
    with pytest.raises(ValueError, match="shards is 4 on rank 0 and 6 on rank 1"):
        ts.SphereParallel(nn.Linear(3, 1), spheres, shards=(4, 6)[rank])
    model = ts.SphereParallel(nn.Linear(3, 1), spheres, shards=4)
    with pytest.raises(ValueError, match=r"12 shards, and the model has 4.*spheres, shards=4\\)"):
        for x, y in ts.wrap(data, spheres):
            model(x).sum().backward()
    for x, y in ts.wrap(data, spheres, shards=4):
        model(x).sum().backward()
        sums = ts.gather_metrics(model, value=y)
        assert sums["rows"] == 24
        assert model.gather(x).shape == (24, 3)
dist.destroy_process_group()
"""


def test_mistakes_of_ranks() -> None:
    fork_server.run_ranks(2, MISTAKES)


# ---- the batch sampler ----


@pytest.mark.parametrize("shards", [1, 2, 3, 4, 6, 12, None])
def test_the_sampler_cuts_into_so_many(shards) -> None:
    with ts.KissingSpheres(concurrency=2) as spheres:
        batches = ts.SphereBatchSampler(range(50), 50, spheres=spheres, shards=shards)
        (batch,) = batches
        count = 12 if shards is None else shards
        cut = [part.tolist() for part in torch.tensor_split(torch.arange(50), count)]
        assert batches.shards(batch) == batches.groups(batch) == cut
        assert batches.own_shards(batch) == dict(zip(shard_leaves(count), cut, strict=True))
        assert batches.own_groups(batch) == cut
        assert batches.map(sum, batch) == [*map(sum, cut)]
    for world in (n for n in (2, 3, 4, 6, 12) if count % n == 0):
        found: dict[int, list[int]] = {}
        for rank in range(world):
            mine = ts.SphereBatchSampler(range(50), 50, rank=rank, world_size=world, shards=shards)
            (own,) = mine
            assert [row for rows in mine.own_groups(own) for row in rows] == own
            found |= mine.own_shards(own)
        assert found == dict(zip(shard_leaves(count), cut, strict=True))


def test_the_sampler_refuses_other_numbers() -> None:
    with pytest.raises(ValueError, match="got 5: use one of"):
        ts.SphereBatchSampler(range(9), 3, shards=5)
    with pytest.raises(ValueError, match=r"world_size=4 does not divide the shards \(6\)"):
        ts.SphereBatchSampler(range(9), 3, rank=0, world_size=4, shards=6)
    with pytest.raises(ValueError, match="got 7: use one of"):
        ts.wrap(DataLoader([1, 2]), shards=7)


@pytest.mark.parametrize("shards", [2, 3, 4, 6])
def test_a_loop_by_hand_has_the_bits_of_the_model(shards) -> None:
    x, y = torch.randn(50, 3), torch.randn(50, 1)
    models = [nn.Linear(3, 1) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    with ts.KissingSpheres(concurrency=3) as spheres:
        ts.SphereParallel(models[0], spheres, shards=shards).forward_backward(F.mse_loss, x, y)
        hook = ts.GradientHook(torch.optim.SGD(models[1].parameters(), 0.1), spheres)
        batches = ts.SphereBatchSampler(range(50), 50, spheres=spheres, shards=shards)
        (batch,) = batches
        for leaf, rows in batches.own_shards(batch).items():
            with reference.one_thread():
                part = models[1](reference.aligned(x[rows]))
                loss = F.mse_loss(part, reference.aligned(y[rows])) * (len(rows) / 50)
                hook.add(leaf, torch.autograd.grad(loss, [*models[1].parameters()]))
        hook.reduce()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


# ---- which number to take ----


class Sleepy(nn.Module):
    """Sleeps for each call, and has all that a measurement could leave a trace in."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(3), nn.Dropout(0.5)

    def forward(self, x):
        time.sleep(0.02)
        random.random(), np.random.rand()
        return self.drop(self.norm(x))


def generators():
    return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())


def test_a_number_is_suggested_and_nothing_is_changed() -> None:
    with ts.KissingSpheres(concurrency=2) as spheres:
        module = Sleepy()
        heard = []
        module.register_forward_hook(lambda *_: heard.append(1))
        model = ts.SphereParallel(module, spheres)
        x = torch.randn(24, 3, requires_grad=True)
        before = copy.deepcopy(module.state_dict()), generators()
        found = model.suggest_shards(x, repeats=2)
        assert model.shards == 12 and not heard and x.grad is None
        assert all(p.grad is None for p in module.parameters())
        for name, value in module.state_dict().items():
            assert torch.equal(value, before[0][name])
        assert generators() == before[1]
    # Two spheres sleep at once: two shards as long as the whole, twelve six times as long.
    assert sorted(found.ratios) == DIVISORS and found.ratios[12] > 2 * found.ratios[2]
    assert found.best in (1, 2) and found.rows == 24
    assert "2 of 12 rows" in str(found) and f"shards={found.best} is the best" in str(found)


def test_the_largest_number_of_those_that_are_as_fast() -> None:
    times = ShardTimes(96, {1: 1.0, 2: 0.98, 3: 0.97, 4: 1.0, 6: 1.2, 12: 1.6})
    assert times.best == 4


def test_a_suggestion_needs_a_number_of_repeats() -> None:
    with ts.KissingSpheres(concurrency=2) as spheres:
        model = ts.SphereParallel(nn.Linear(3, 1), spheres)
        with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
            model.suggest_shards(torch.randn(24, 3), repeats=0)


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, mask: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * mask.mean()


@pytest.mark.parametrize(
    ("module", "options", "inputs", "rows", "numbers"),
    [
        (Masked(), {"whole": ["mask"]}, (torch.ones(1, 7), torch.randn(48, 4)), 48, DIVISORS),
        (Masked(), {"batch_dim": {"x": 1}, "whole": ["mask"]},
         (torch.ones(2), torch.randn(3, 48, 4)), 48, DIVISORS),
        (nn.Linear(3, 1), {}, (torch.randn(5, 3),), 5, [1, 2, 3, 4]),
        (nn.BatchNorm1d(3), {}, (torch.randn(6, 3),), 6, [1, 2, 3]),
    ],
)  # fmt: skip
def test_numbers_are_those_that_the_batch_has_rows_for(
    module, options, inputs, rows, numbers
) -> None:
    with ts.KissingSpheres(concurrency=2) as spheres:
        found = ts.SphereParallel(module, spheres, **options).suggest_shards(*inputs, repeats=1)
    assert (found.rows, sorted(found.ratios)) == (rows, numbers)


def test_modules_without_shapes_have_no_suggestion() -> None:
    with ts.KissingSpheres(concurrency=2) as spheres:
        lazy = ts.SphereParallel(nn.LazyLinear(1), spheres)
        with pytest.raises(RuntimeError, match="run a batch through the model first"):
            lazy.suggest_shards(torch.randn(24, 3))


# ---- checkpoints ----


@pytest.mark.parametrize("make", [ts.SphereParallel, ts.parallelize_])
def test_a_checkpoint_knows_the_number(tmp_path, make) -> None:
    with ts.KissingSpheres(concurrency=2) as spheres:
        model = make(nn.Linear(3, 1), spheres, shards=4)
        ts.save_checkpoint(tmp_path / "c", step=3, model=model)
        again = make(nn.Linear(3, 1), spheres, shards=4)
        assert ts.load_checkpoint(tmp_path / "c", model=again) == 3
        other = make(nn.Linear(3, 1), spheres)
        with pytest.warns(
            UserWarning, match=r"with shards=4, and now has 12.*saved number"
        ) as told:
            ts.load_checkpoint(tmp_path / "c", model=other)
        assert told[0].filename == __file__
        assert torch.equal(other.weight, model.weight)
        ts.load_checkpoint(tmp_path / "c", model=nn.Linear(3, 1))  # the bare module has none
        for outer in (torch.compile(other, backend="eager"), nn.Sequential(nn.Identity(), other)):
            assert ts.checkpoint_state(model=outer)["shards"] == {"model": 12}


def test_an_attribute_of_the_users_is_not_the_number() -> None:
    module = nn.Linear(3, 1)
    module.shards = 7
    assert ts.checkpoint_state(model=module)["shards"] == {}

    class Write(nn.Linear):
        shards = property(None, lambda *_: None)

    assert ts.checkpoint_state(model=Write(3, 1))["shards"] == {}
    with ts.KissingSpheres(concurrency=2) as spheres:
        assert ts.checkpoint_state(model=ts.SphereParallel(module, spheres))["shards"] == {
            "model": 12
        }


def test_a_checkpoint_of_two_parallel_models_in_one_knows_the_shards_of_both(spheres):
    def both(*numbers):
        return nn.ModuleList(ts.SphereParallel(nn.Linear(2, 2), spheres, shards=n) for n in numbers)

    state = ts.checkpoint_state(model=both(4, 2))
    ts.restore_checkpoint_state(state, model=both(4, 2))
    with pytest.warns(UserWarning, match=r"trained with shards=\[4, 2\], and now has \[4, 12\]"):
        ts.restore_checkpoint_state(state, model=both(4, 12))
