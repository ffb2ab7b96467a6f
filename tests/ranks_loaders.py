"""What each of four ranks of test_ranks.py runs: loaders, states, sums by hand, gather."""

from __future__ import annotations

import hashlib
import json
import pickle
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import torch_spheres as ts

ROWS, BATCH = 173, 24  # the last batch has five rows: some ranks have none of them


class Noisy(Dataset):
    """Rows with a number that depends on their place in the epoch."""

    def __len__(self):
        return ROWS

    def __getitem__(self, index):
        return index, ts.sample_seed() % 1000, torch.full((2,), float(index))


class Counting(IterableDataset):
    def __iter__(self):
        return iter(range(ROWS))


class Says(torch.nn.Module):
    """What is no tensor, and the same for all shards."""

    def forward(self, x):
        return x, 2.0 + x.shape[1]


DATA = {
    "samples": Noisy(),
    "tensors": TensorDataset(torch.arange(ROWS), torch.arange(ROWS * 2.0).view(ROWS, 2)),
    "stream": Counting(),
}


def loader_of(kind, workers, spheres, group):
    torch.manual_seed(6)
    plain = DataLoader(
        DATA[kind],
        BATCH,
        shuffle=kind != "stream",
        num_workers=workers,
        generator=None if kind == "tensors" else torch.Generator().manual_seed(5),
    )
    return ts.wrap(plain, spheres, process_group=group)


def columns(batch):
    """As plain lists, by column."""
    batch = batch if isinstance(batch, (list, tuple)) else [batch]
    return [column.flatten(1).tolist() if column.dim() > 1 else column.tolist() for column in batch]


def loaders(group, levels, out):
    """All batches of two epochs, as this rank has them; or the second half of a saved epoch."""
    found = {}
    with ts.KissingSpheres(levels, concurrency=2) as spheres:
        for kind in DATA:
            for workers in (0, 2):
                loader = loader_of(kind, workers, spheres, group)
                found[f"{kind} {workers}"] = [columns(b) for b in loader]
                if group is False or dist.get_rank(group) == 0:
                    torch.rand(1)  # as an evaluation that only one rank runs
                found[f"{kind} {workers}"] += [columns(b) for b in loader]
                state = out / f"{levels} {kind} {workers}.pt"
                if not state.exists():
                    continue
                loader = loader_of(kind, workers, spheres, group)
                loader.load_state_dict(torch.load(state))
                found[f"{kind} {workers} resumed"] = [columns(b) for b in loader]
    return found


def save_states(out):
    """In the middle of an epoch on four ranks."""
    for levels in (2, 3):
        with ts.KissingSpheres(levels, concurrency=2) as spheres:
            for kind in DATA:
                for workers in (0, 2):
                    loader = loader_of(kind, workers, spheres, None)
                    iterator = iter(loader)
                    for _ in range(3):
                        next(iterator)
                    if dist.get_rank() == 2:
                        torch.save(loader.state_dict(), out / f"{levels} {kind} {workers}.pt")
    dist.barrier()


def by_hand(group):
    """Gradients that a loop computes itself, in two steps; in the second, only of few shards."""
    with ts.KissingSpheres(concurrency=2) as spheres:
        big, small = torch.nn.Parameter(torch.ones(20000)), torch.nn.Parameter(torch.ones(3))
        unused = torch.nn.Parameter(torch.ones(5))
        half = torch.nn.Parameter(torch.ones(40, dtype=torch.bfloat16))
        turned = torch.nn.Parameter(torch.ones(7, dtype=torch.complex64))
        many = [torch.nn.Parameter(torch.ones(300)) for _ in range(1000)]
        optimizer = torch.optim.SGD([big, small, unused, half, turned, *many], lr=0.1)
        hook = ts.GradientHook(optimizer, spheres, process_group=group)
        world = 1 if group is False else dist.get_world_size(group)
        rank = 0 if group is False else dist.get_rank(group)
        own = range(rank * 12 // world, (rank + 1) * 12 // world)
        for step in range(2):
            optimizer.zero_grad()
            for shard in own:
                if step == 1 and shard % 5:
                    continue
                generator = torch.Generator().manual_seed(100 * step + shard)
                grads = [torch.randn(p.shape, generator=generator) for p in (big, small, half)]
                grads.append(torch.randn(7, dtype=torch.complex64, generator=generator))
                more = [
                    torch.randn(300, generator=generator) if k % 7 else None for k in range(1000)
                ]
                hook.add(shard, [grads[0], grads[1], None, grads[2].bfloat16(), grads[3], *more])
            optimizer.step()
        assert unused.grad is None
        if world > 1:
            other = (own[-1] + 1) % 12
            with pytest.raises(ValueError, match=f"shard {other} is another rank's"):
                hook.add(other, [None] * 1005)
        bits = [
            p.detach().view(torch.uint8)
            for p in (big, small, half, torch.view_as_real(turned), *many)
        ]
        assert many[0].grad is None and many[1].grad is not None
        return [hashlib.sha256(b.numpy().tobytes()).hexdigest()[:8] for b in bits]


def means(group):
    """A loop as it is, with a loss over the rank's own rows: right, but for rounding."""
    torch.manual_seed(1)
    module = torch.nn.Linear(5, 3)
    x, y = torch.randn(50, 5), torch.randint(3, (50,))
    F.cross_entropy(module(x), y).backward()
    wanted = module.weight.grad.clone()
    module.weight.grad = module.bias.grad = None
    with ts.KissingSpheres(concurrency=1) as spheres:
        model = ts.SphereParallel(module, spheres, process_group=group)
        batches = ts.SphereBatchSampler(range(50), 50, spheres=spheres, process_group=group)
        mine = next(iter(batches))
        F.cross_entropy(model(x[mine]), y[mine]).backward()
        torch.testing.assert_close(module.weight.grad, wanted)
        whole = model.gather(x[mine])
        assert torch.equal(whole, x)
        with torch.no_grad():  # each by itself: no rank waits for another
            model.eval()
            if dist.get_rank() == 0:
                torch.testing.assert_close(model(x), module(x))


def chains(group):
    """Gradients of two models in a row, and of losses of several kinds at once."""
    torch.manual_seed(1)
    x, y = torch.randn(50, 5), torch.randint(3, (50,))
    found = {}
    with ts.KissingSpheres(concurrency=1) as spheres:

        def models(dtype=torch.float32):
            torch.manual_seed(2)
            made = torch.nn.Linear(5, 4, dtype=dtype), torch.nn.Linear(4, 3, dtype=dtype)
            return [ts.SphereParallel(m, spheres, process_group=group) for m in made]

        def rows(count):
            batches = ts.SphereBatchSampler(
                range(count), count, spheres=spheres, process_group=group
            )
            return next(iter(batches))

        def local(first, second, z):
            F.cross_entropy(second(first(z)), y[mine]).backward()

        def whole(first, second, z):
            F.cross_entropy(second.gather(second(first(z))), second.gather(y[mine])).backward()

        def by_shard(first, second, z):
            second.forward_backward(F.cross_entropy, first(z), y[mine])

        def between(first, second, z):  # something is computed between the models
            F.cross_entropy(second(first(z).tanh()), y[mine]).backward()

        def mixed(first, second, z):  # as a conditional GAN has it
            h = first(z)
            (F.cross_entropy(second(h), y[mine]) + h.square().mean()).backward()

        def metric(first, second, z):
            out = second(first(z))
            with torch.no_grad():
                assert (second.gather(out).argmax(1) == second.gather(y[mine])).shape == (50,)
            F.cross_entropy(out, y[mine]).backward()

        mine = rows(50)
        for way in (local, whole, by_shard, between, mixed, metric):
            pair = models()
            way(*pair, x[mine])
            found[way.__name__] = [m.module.weight.grad.tolist() for m in pair]
        # A rank without rows, whose losses would have been float64.
        mine = rows(5)
        first, _ = models(torch.float64)
        loss = first.forward_backward(F.cross_entropy, x[mine].double(), y[mine])
        found["few"] = [first.module.weight.grad.tolist(), loss.item()]
        # What is no tensor is there on ranks without rows too.
        said = ts.SphereParallel(Says(), spheres, process_group=group)
        found["said"] = [[float(len(x)), float(said(x[rows(len(x))])[1])] for x in (x, x[:5])]
        # What is unpickled goes on with the default group, if that is what it had.
        if group is None:
            copy = pickle.loads(pickle.dumps(first))
            copy.zero_grad()
            copy.forward_backward(F.cross_entropy, x[mine].double(), y[mine])
            assert copy.module.weight.grad.tolist() == found["few"][0]
            copy.spheres.stop()
    return found


def main() -> None:
    out = Path(sys.argv[1])
    warnings.simplefilter("ignore", FutureWarning)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    save_states(out)
    groups = {"4": None, "3": dist.new_group([0, 1, 2]), "2": dist.new_group([0, 1]), "1": False}
    found = {}
    for name, group in groups.items():
        size = int(name)
        if rank < size:
            found[name] = {
                "loaders": {levels: loaders(group, levels, out) for levels in (2, 3)},
                "by hand": by_hand(group),
                "chains": chains(group),
            }
            means(group)
    (out / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
