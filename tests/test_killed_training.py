"""Training that is killed and goes on, alone and on ranks, with the bits of one that was not."""

from __future__ import annotations

import json
import signal
from itertools import chain

import fork_server
import pytest
import torch
from checkpoint_support import names, run
from rank_output import printed

# ---- training that is killed ----

TRAINING = """
import hashlib, random, signal, sys, numpy, torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
import torch_spheres as ts
from torch_spheres.checkpoint import load_checkpoint, save_checkpoint
path, place, workers, seed, stop = *sys.argv[1:3], *map(int, sys.argv[3:])

class Noisy(Dataset):
    def __len__(self):
        return 72
    def __getitem__(self, index):
        return torch.full((6,), index / 72) + 0.1 * torch.rand(6), index % 3

torch.manual_seed(seed), random.seed(seed), numpy.random.seed(seed)
model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.4), nn.Linear(16, 3))
with ts.KissingSpheres(concurrency=2 + seed) as spheres:
    loader = DataLoader(Noisy(), 24, shuffle=True, num_workers=workers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    model, optimizer, loader = ts.prepare(model, optimizer, loader, spheres)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    parts = dict(model=model, optimizer=optimizer, scheduler=scheduler, loader=loader)
    step = load_checkpoint(path, **parts) or 0
    print("at", step, flush=True)

    def reached(here):
        if (step, here) == (stop, place):
            print("reached", flush=True)
            signal.pause()  # killed here

    while step < 11:
        for x, y in loader:
            x = x + random.random() + numpy.random.rand()
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            reached("in a step")
            optimizer.step()
            scheduler.step()
            reached("before saving")
            step += 1
            save_checkpoint(path, step=step, **parts)
            reached("between steps")
            if step == 11:
                break
    left = [b[0] for b in loader]
seen = [*model.state_dict().values(), *left, torch.rand(5), torch.tensor(random.random())]
seen += [torch.tensor(numpy.random.rand()), torch.tensor(scheduler.get_last_lr())]
seen += [v for state in optimizer.state.values() for v in state.values()]
raw = b"".join(v.detach().double().numpy().tobytes() for v in seen)
print(hashlib.sha256(raw).hexdigest())
"""
# By workers. Three batches an epoch: step 3 is the end of one.
KILLS = {
    0: [(1, "between steps"), (4, "in a step")],
    2: [(3, "between steps"), (7, "before saving")],
}


@pytest.mark.timeout(240)
@pytest.mark.parametrize("workers", KILLS)
def test_killed_and_resumed_training_has_the_bits_of_an_undisturbed_one(tmp_path, workers):
    straight = run(TRAINING, tmp_path / "straight.pt", "", workers, 0, 0).split()
    assert straight[:2] == ["at", "0"]
    path, begin = tmp_path / "last.pt", 0
    for seed, (stop, place) in enumerate(KILLS[workers]):  # a process that resumes has other seeds
        with fork_server.start(TRAINING, path, place, workers, seed, stop) as process:
            assert process.readline() == f"at {begin}\n"
            assert process.readline() == "reached\n"
            process.kill()
            assert process.wait() == -signal.SIGKILL
        begin = stop
    resumed = run(TRAINING, path, "", workers, 9, 0).split()
    assert resumed == ["at", str(begin), straight[2]]


# ---- several processes ----

RANK = """
import datetime, json, os, pathlib, random, signal, sys, warnings, torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import RandomSampler
import torch_spheres as ts
from torch_spheres import checkpoint
from torch_spheres.checkpoint import load_checkpoint, save_checkpoint
folder = sys.argv[1]
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
rank, world = dist.get_rank(), dist.get_world_size()
torch.manual_seed(world)
bare = nn.Linear(4, 2)
model = DDP(bare)
optimizer = torch.optim.AdamW(model.parameters())
sampler = ts.SphereBatchSampler(RandomSampler(range(96)), 24, rank=rank, world_size=world)
parts = dict(model=model, bare=bare, optimizer=optimizer, sampler=sampler)
two, path = f"{folder}/two.pt", f"{folder}/new/last.pt"

def expect(kind, text, work):
    try:
        work()
    except kind as error:
        assert type(error) is kind and text in str(error), repr(error)
    else:
        raise AssertionError(f"no {kind}")

def mine(first, others):
    return first if rank == 0 else others

def save(step):
    save_checkpoint(path, step=step, **parts)

if world == 3:
    assert load_checkpoint(two, **parts) is None
    batches = iter(sampler)
    for step in range(2):
        next(batches)
        model(torch.randn(4, 4)).sum().backward()
        optimizer.step()
    save_checkpoint(two, step=2, **parts)
    assert os.path.exists(two)  # on every rank, as soon as it is back
else:
    assert load_checkpoint(two, **parts) == 2
    batches = sampler
weights = [p.tolist() for p in model.parameters()]
moments = [state["exp_avg"].tolist() for state in optimizer.state.values()]
print(json.dumps([[weights, moments, torch.rand(3).tolist()], [*batches]]), flush=True)

# One cannot write; one cannot say its state; one is elsewhere.
torch.manual_seed(1)
save(2)
blocked = f"{path}/below.pt"
expect(mine(FileExistsError, ts.RankError), mine("File exists", "rank 0 of"),
       lambda: save_checkpoint(blocked, **parts))
if world == 3:
    expect(mine(ts.RankError, TypeError),
           mine("rank 1 of 3: TypeError: x, NoneType", "x, NoneType"),
           lambda: save_checkpoint(path, x=mine(optimizer, None)))
    expect(ts.RankError, "at different steps (by rank: 7, 8, 9)",
           lambda: save(7 + rank))
    expect(ts.RankError, "a folder that all share? (by rank: [2, ",
           lambda: load_checkpoint(mine(path, two + "none"), **parts))
    torch.manual_seed(2)
    other = f"{folder}/other{rank}.pt"
    save_checkpoint(other, step=2, process_group=False, **parts)  # each for itself
    assert load_checkpoint(other, **parts) == 2  # the same, wherever it is
    expect(ts.RankError, "see different files", lambda: load_checkpoint(
        mine(two, other), **parts))
    with open(other, "r+b") as file:
        file.truncate(100)
    expect(mine(ts.RankError, ValueError), "is no whole checkpoint",
           lambda: load_checkpoint(mine(path, other), **parts))
    assert load_checkpoint(path, **parts) == 2  # and nobody has hung or got out of step

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        random.seed(rank)  # of no importance: nobody seeds that
        save(3)
        torch.manual_seed(rank)
        save(3)
    told = [str(w.message) for w in caught]
    assert len(told) == (rank == 0), told
    assert rank or "random states differ" in told[0], told
    pair = dist.new_group([1, 2])
    if rank > 0:  # a smaller group: its rank 0 is 1 of the world
        save_checkpoint(f"{folder}/pair.pt", step=4, process_group=pair, **parts)
        assert load_checkpoint(f"{folder}/pair.pt", process_group=pair, **parts) == 4
    else:
        expect(ValueError, "not in its process_group",
               lambda: save_checkpoint(path, process_group=pair, **parts))
    dist.barrier()
    if rank == 0:
        pathlib.Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    expect(ts.RankError, "rank 0 of 3 did not come to it", lambda: save(5))
# Not by the interpreter's end: a thread of gloo's that wants the GIL then aborts the process.
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.timeout(240)
def test_ranks(tmp_path):
    """Three save, two and one go on; whatever goes wrong on one is known to all, and soon."""
    told = {}
    for world in (3, 2, 1):
        with fork_server.ranks(world, RANK, tmp_path) as ranks:
            codes = [rank.wait() for rank in ranks]
        ends = [rank.stderr for rank in ranks]
        assert codes == ([-signal.SIGKILL, 0, 0] if world == 3 else [0] * world), ends
        told[world] = [json.loads(printed(rank.stdout)) for rank in ranks]
        if world == 3:  # the file is that of the save before the one in which rank 0 was killed
            assert torch.load(tmp_path / "new" / "last.pt", weights_only=True)["step"] == 3
            assert len(names(tmp_path / "new")) == 2  # and what it had not finished
    ((state, batches),) = told[1]
    assert [len(batch) for batch in batches] == [24, 24]
    for ranks in told.values():
        assert all(other == state for other, _ in ranks)
        assert [[*chain(*own)] for own in zip(*(b for _, b in ranks), strict=True)] == batches
