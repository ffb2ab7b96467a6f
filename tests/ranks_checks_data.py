"""What ranks of test_rank_checks.py run: mistakes with batches, loaders, evaluations."""

from __future__ import annotations

import queue
import random
import threading
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
from rank_checks_support import (
    BATCH,
    DATA,
    ROWS,
    Shuffled,
    Stream,
    X,
    Y,
    model_on,
    part,
    rank,
    run,
    step,
    train,
)
from torch import nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, TensorDataset

import torch_spheres as ts


def index_lists(spheres):
    random.seed()  # as processes have it that nobody has seeded
    np.random.seed()
    for how in ("random", "numpy", "by rank", "later", "own rows", "given"):
        for workers in (0, 2):
            loaders = [
                ts.wrap(
                    DataLoader(DATA, BATCH, sampler=Shuffled(how), num_workers=workers), spheres
                ),
                ts.wrap(
                    DataLoader(
                        DATA,
                        batch_sampler=BatchSampler(Shuffled(how), BATCH, True),
                        num_workers=workers,
                    ),
                    spheres,
                ),
                DataLoader(
                    DATA, batch_sampler=ts.SphereBatchSampler(Shuffled(how), BATCH, spheres=spheres)
                ),
            ]
            if how != "own rows":
                stream = DataLoader(Stream(how), BATCH, num_workers=min(workers, 1))
                loaders.append(ts.wrap(stream, spheres))
            for loader in loaders:
                if how == "given":
                    train(spheres, loader, 2)
                    continue
                with pytest.raises(
                    ValueError, match=r"index lists of batch .* differ between ranks"
                ):
                    train(spheres, loader)

    # A generator that is the loader's own is brought to rank 0's place.
    own = torch.Generator().manual_seed(rank())
    train(spheres, ts.wrap(DataLoader(DATA, BATCH, shuffle=True, generator=own), spheres), 2)
    other = TensorDataset(X[: ROWS - rank()], Y[: ROWS - rank()])
    for data, size in ((other, BATCH), (DATA, BATCH + 12 * rank())):
        with pytest.raises(ValueError, match=r"begin different epochs: .* on rank 0, .* on rank 1"):
            train(spheres, ts.wrap(DataLoader(data, size), spheres))

    # Resumed from different states.
    def saved(count):
        loader = ts.wrap(DataLoader(DATA, BATCH), spheres)
        iterator = iter(loader)
        states = []
        for _ in range(count):
            next(iterator)
            states.append(loader.state_dict())
        return states

    states = saved(3)
    loader = ts.wrap(DataLoader(DATA, BATCH), spheres)
    loader.load_state_dict(states[1 + (rank() == 1)])
    with pytest.raises(ValueError, match="the state that it is resumed from"):
        iter(loader)
    loader.load_state_dict(states[1])
    train(spheres, loader, 2)


def right_loops(spheres):
    """What looks like the mistakes, and is none."""
    loader = ts.wrap(DataLoader(DATA, BATCH, shuffle=True, num_workers=2), spheres)
    other = ts.wrap(DataLoader(DATA, BATCH, shuffle=True), spheres)
    model, optimizer = model_on(spheres)
    for (x, y), (x2, y2) in zip(loader, other, strict=True):
        step(model, optimizer, torch.cat([x, x2]), torch.cat([y, y2]))
    for n, (x, y) in enumerate(loader):
        step(model, optimizer, x, y)
        if n == 3:
            break
    kept = [*loader]  # all of an epoch before the first step
    for x, y in kept:
        step(model, optimizer, x, y)

    # Batches that a thread of the user's own fetches ahead, on each rank as it likes.
    batches: queue.Queue = queue.Queue(4)

    def fetch():
        for batch in loader:
            batches.put(batch)
        batches.put(None)

    thread = threading.Thread(target=fetch)
    thread.start()
    while (batch := batches.get()) is not None:
        if rank() == 1:
            threading.Event().wait(0.01)
        step(model, optimizer, *batch)
    thread.join()

    # A thread for each epoch, and one rank leaves an evaluation before the others.
    for _ in range(3):
        got: queue.Queue = queue.Queue()
        iterator = iter(loader)
        thread = threading.Thread(target=lambda i=iterator, q=got: [q.put(b) for b in i])
        thread.start()
        for _ in range(2 + rank()):
            got.get()
        thread.join()
    test = ts.wrap(DataLoader(DATA, BATCH), spheres)
    for n, _ in enumerate(test):
        if rank() == 0 and n == 1:
            break
    for x, y in loader:
        step(model, optimizer, x, y)

    # A GAN whose noise all ranks draw alike: told of.
    images, noise = model_on(spheres)[0], model_on(spheres)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for x, _ in loader:
            images(x).mean().backward()
            fake = noise(torch.randn(len(x), 6))
            images(torch.cat([fake, fake[:, :1]], 1)).mean().backward()

    # A buffer that only an evaluation of rank 0 writes to.
    counted, steps = model_on(spheres, lambda: nn.Sequential(nn.Linear(6, 5), nn.Identity()))
    counted.module[1].register_buffer("seen", torch.zeros(()))
    for n, (x, y) in enumerate(loader):
        counted.module[1].seen += rank() == 0 and n == 2
        step(counted, steps, x, y)

    # Optimizers with others inside of them, not as many on all ranks.
    inner = torch.optim.SGD(model.parameters(), lr=0.0)
    for x, y in loader:
        step(model, optimizer, x, y)
        for _ in range(rank()):
            inner.step()

    # The same rows on all ranks, as they come from a dataset that has them twice.
    twice = TensorDataset(X[:12].repeat(12, 1), Y[:12].repeat(12))
    train(spheres, ts.wrap(DataLoader(twice, BATCH), spheres), 2)
    constant, target = torch.ones(12, 6), torch.zeros(12, dtype=torch.long)
    for _ in range(3):
        step(model, optimizer, constant, target)


class Files(torch.utils.data.Dataset):
    """With a list of files, as a folder gives them."""

    def __init__(self, files):
        self.files = files

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        return X[int(self.files[index].split("/")[-1])], Y[index]


def contents(spheres):
    """Datasets of one length that are not the same."""
    second = rank() == 1
    order = np.random.default_rng(rank()).permutation(ROWS)
    for data in (
        torch.utils.data.Subset(DATA, order[:96].tolist()),
        TensorDataset(X[order], Y[order]),
        torch.utils.data.ConcatDataset([DATA, torch.utils.data.Subset(DATA, [second] * 12)]),
        [*order],
    ):
        with pytest.raises(ValueError, match="the checksum of the dataset is"):
            iter(ts.wrap(DataLoader(data, BATCH), spheres))
    names = [f"/node{rank()}/data/{k}" for k in range(ROWS)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "the shards of this model are so")
        train(spheres, ts.wrap(DataLoader(Files(names), BATCH), spheres))
    with pytest.warns(UserWarning, match="lists on the ranks' Files are not the same"):
        iter(ts.wrap(DataLoader(Files(names[::-1] if second else names), BATCH), spheres))
    # Which of two loaders a batch is from; another batch is left out on each rank; a list of them.
    model, optimizer = model_on(spheres)
    first = iter(ts.wrap(DataLoader(DATA, BATCH), spheres))
    other = iter(ts.wrap(DataLoader(DATA, BATCH), spheres))
    with pytest.raises(ValueError, match="of different epochs, or loaders"):
        step(model, optimizer, *next(first if second else other))
    kept = [*ts.wrap(DataLoader(DATA, BATCH, sampler=Shuffled("by rank")), spheres)]
    with pytest.raises(ValueError, match=r"index lists of batch"):
        step(model, optimizer, *kept[0])
    with pytest.raises(ValueError, match="in_order=False"):
        ts.wrap(DataLoader(DATA, BATCH, num_workers=2, in_order=False), spheres)
    with ts.KissingSpheres(3, concurrency=1) as more:
        loader = ts.wrap(DataLoader(DATA, BATCH), more)
        with pytest.raises(ValueError, match="hands out rows for 144 shards, and the model has 12"):
            step(model, optimizer, *next(iter(loader)))
        step(model, optimizer, part(X[:24]), part(Y[:24]))  # of no loader


def evaluations(spheres):
    model, optimizer = model_on(spheres)
    loader = ts.wrap(DataLoader(DATA, BATCH), spheres)

    def figures():
        model.eval()
        with torch.no_grad():
            for x, y in loader:
                ts.gather_metrics(model, hits=model(x).argmax(1) == y)
        model.train()

    for x, y in loader:
        step(model, optimizer, x, y)
    figures()
    for x, y in loader:
        step(model, optimizer, x, y)
    with torch.no_grad():
        model.module.bias += rank() == 1
    with pytest.raises(ValueError, match="'bias' is not the same"):
        figures()
    loader = ts.wrap(DataLoader(DATA, BATCH, sampler=Shuffled("by rank")), spheres)
    with pytest.raises(ValueError, match="index lists of batch 0"):
        figures()


# ---- loaders that were not wrapped ----


def not_wrapped(spheres):
    model, optimizer = model_on(spheres)
    torch.manual_seed(4)
    loader = DataLoader(DATA, BATCH, shuffle=True)
    batches = iter(loader)
    with pytest.warns(UserWarning, match="the same rows, where each should have its part"):
        step(model, optimizer, *next(batches))
    with pytest.raises(ValueError, match=r"the same rows, .*ts\.wrap\(loader"):
        step(model, optimizer, *next(batches))
    # One batch, again and again: told of, and not refused.
    model, optimizer = model_on(spheres)
    with pytest.warns(UserWarning, match="the same rows, where each should have its part"):
        step(model, optimizer, X[:12], Y[:12])
    for _ in range(3):
        step(model, optimizer, X[:12], Y[:12])


def other_models(spheres):
    """A loader that shares its batches, for a model that does not: compared with each epoch."""
    loader = ts.wrap(DataLoader(DATA, BATCH, sampler=Shuffled("by rank")), spheres)
    for _ in loader:
        pass
    with pytest.raises(ValueError, match="the checksum of the batches before it"):
        iter(loader)


def skipped(spheres):
    second = rank() == 1
    for how in ("batch", "step", "one batch more"):
        model, optimizer = model_on(spheres)
        loader = ts.wrap(DataLoader(DATA, BATCH, shuffle=True), spheres)
        steps = 0
        with pytest.raises(
            ValueError, match=r"different batches of an epoch|different numbers of steps"
        ):
            iterator = iter(loader)
            for n in range(ROWS // BATCH):
                x, y = next(iterator)
                if second and n == 2 and how == "batch":
                    continue
                if second and n == 2 and how == "one batch more":
                    x, y = next(iterator)
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                if not (second and n == 2 and how == "step"):
                    optimizer.step()
                steps += 1
        assert steps == 2 + (how == "step")  # at the very next exchange


def metrics(spheres):
    """Figures of an evaluation, exactly; and mistakes in what is summed."""
    model, _ = model_on(spheres)
    model.eval()
    found = []
    for rows in (48, 50, 13, 5):
        loader = ts.wrap(DataLoader(DATA, rows), spheres)
        sums = {"loss": 0.0, "hits": 0, "rows": 0, "wide": 0.0}
        with torch.no_grad():
            for x, y in loader:
                out = model(x)
                batch = ts.gather_metrics(
                    model,
                    loss=F.cross_entropy(out, y, reduction="none"),
                    hits=out.argmax(1) == y,
                    wide=out,
                )
                sums = {name: sums[name] + batch[name] for name in sums}
        assert sums["rows"] == ROWS
        found.append(
            [value.hex() if isinstance(value, float) else value for value in sums.values()]
        )
    print("sums", found, flush=True)
    one = part(X[:48])[:, 0]
    again_ = ts.gather_metrics(spheres, value=one)
    assert again_["value"] == pytest.approx(X[:48, 0].double().sum().item())
    kind = ValueError if dist.get_world_size() > 1 else ()
    second = rank() == 1
    if kind:
        with pytest.raises(ValueError, match="not their parts of a batch"):
            ts.gather_metrics(model, value=one[: 1 + second])
        with pytest.raises(
            (ts.RankError, TypeError), match=r"with a row for each|failed on rank 1"
        ):
            ts.gather_metrics(model, value=one.sum() if second else one)
        with pytest.raises(ValueError, match="different names"):
            ts.gather_metrics(model, **{f"v{rank()}": one})


if __name__ == "__main__":
    run(globals())
