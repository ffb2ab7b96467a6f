"""`save_checkpoint` and its kin: files that are whole, training that goes on with the same bits."""

from __future__ import annotations

import copy
import fcntl
import json
import os
import pickle
import random
import signal
import stat
import subprocess
import sys
import threading
import time
from itertools import chain

import numpy as np
import pytest
import torch
from loader_support import flat
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import torch_spheres as ts
from torch_spheres import checkpoint as module
from torch_spheres.checkpoint import (
    checkpoint_state,
    load_checkpoint,
    restore_checkpoint_state,
    save_checkpoint,
)

DATA = TensorDataset(torch.randn(72, 4, generator=torch.Generator().manual_seed(0)))


@pytest.fixture(scope="module")
def spheres():
    with ts.KissingSpheres(levels=2, concurrency=2) as running:
        yield running


def names(folder):
    return sorted(path.name for path in folder.iterdir())


class Training:
    """A model in two parts with an optimizer each, and all else that has a state."""

    def __init__(self, spheres, seed, workers=0):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        bare = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
        self.model = ts.SphereParallel(bare, spheres)
        self.first = torch.optim.AdamW(bare[:2].parameters(), lr=0.1)
        self.second = torch.optim.SGD(bare[2:].parameters(), lr=0.1, momentum=0.9)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.first, 0.1, total_steps=100)
        self.scaler = torch.amp.GradScaler("cpu")
        plain = DataLoader(DATA, 24, shuffle=True, num_workers=workers)
        self.loader = ts.wrap(plain, spheres)
        self.sampler = ts.SphereBatchSampler(RandomSampler(DATA), 24, spheres=spheres)

    @property
    def parts(self):
        return dict(vars(self))

    def step(self, x):
        for optimizer in (self.first, self.second):
            optimizer.zero_grad()
        loss = self.model(x + random.random() + np.random.rand()).square().mean()
        self.scaler.scale(loss).backward()
        for optimizer in (self.first, self.second):
            self.scaler.step(optimizer)
        self.scaler.update()
        self.scheduler.step()
        return loss.item()

    def go_on(self, steps=5):
        """Losses, batches and states from here on."""
        seen, batches, lists = [], None, None
        for _ in range(steps):
            try:
                batches = batches or iter(self.loader)
                (x,) = next(batches)
            except StopIteration:
                batches = None
                continue
            lists = lists or iter(self.sampler)
            seen.append((self.step(x), flat(x), next(lists, None)))
        return seen, flat(checkpoint_state(**self.parts))


def test_all_of_it_comes_back(spheres, tmp_path):
    for workers in (0, 2):
        training = Training(spheres, 1, workers)
        training.go_on(3)
        path = tmp_path / f"{workers}.pt"
        save_checkpoint(path, step=3, **training.parts)
        whole = Training(spheres, 2, workers)
        assert load_checkpoint(path, **whole.parts) == 3
        expected = whole.go_on()
        again = Training(spheres, 3, workers)
        again.go_on(2)  # one that has run is loaded, too
        assert load_checkpoint(str(path), **again.parts) == 3
        assert again.go_on() == expected
        assert expected[0][0] != Training(spheres, 3, workers).go_on()[0][0]


def test_the_file_is_plain_and_nothing_else_is_left(spheres, tmp_path):
    training = Training(spheres, 1)
    training.go_on(2)
    path = tmp_path / "last.pt"
    save_checkpoint(path, step=2, **training.parts)
    state = torch.load(path, weights_only=True)
    assert state["step"] == 2
    assert {*state["objects"]} == {*training.parts}
    assert {*state["random"]} == {"torch", "python", "numpy"}
    assert flat(state) == flat(checkpoint_state(step=2, **training.parts))
    assert names(tmp_path) == ["last.pt"]


def test_models_in_and_out_of_wrappers_have_one_state(spheres, tmp_path):
    path = tmp_path / "last.pt"
    bare = nn.Linear(4, 2)
    save_checkpoint(path, model=ts.SphereParallel(bare, spheres))
    other = nn.Linear(4, 2)
    assert load_checkpoint(path, model=other) == 0
    assert flat(other.state_dict()) == flat(bare.state_dict())
    within = nn.Sequential(ts.SphereParallel(bare, spheres), nn.ReLU())
    save_checkpoint(path, model=within)
    other = nn.Sequential(nn.Linear(4, 2), nn.ReLU())
    load_checkpoint(path, model=other)
    assert flat(other.state_dict()) == flat(within.state_dict())


def test_lazy_modules_and_another_dtype(tmp_path):
    path = tmp_path / "last.pt"
    made = nn.Linear(4, 2)
    save_checkpoint(path, model=made)
    lazy = nn.LazyLinear(2)
    load_checkpoint(path, model=lazy)
    assert flat(lazy.state_dict()) == flat(made.state_dict())
    half = nn.Linear(4, 2).bfloat16()
    load_checkpoint(path, model=half)
    assert torch.equal(half.weight, made.weight.bfloat16())


def test_an_optimizers_state_goes_to_its_own_device(tmp_path, monkeypatch):
    """From a device that is not there, to the CPU, to where the parameters are."""
    model = nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda _: "cuda:99")
        save_checkpoint(tmp_path / "last.pt", optimizer=optimizer)
    there = nn.Linear(4, 2, device="meta")  # a device that every machine has
    elsewhere = torch.optim.AdamW(there.parameters())
    load_checkpoint(tmp_path / "last.pt", optimizer=elsewhere)
    assert {s["exp_avg"].device.type for s in elsewhere.state.values()} == {"meta"}


def test_a_state_can_be_used_again():
    """Optimizers do not train on its tensors; those of models are live until they are copied."""
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

    def steps():
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(3, 4)).square().sum().backward()
            optimizer.step()
        return flat([model.state_dict(), optimizer.state_dict()])

    steps()
    state = copy.deepcopy(checkpoint_state(step=3, model=model, optimizer=optimizer))
    results = []
    for _ in range(3):
        assert restore_checkpoint_state(state, model=model, optimizer=optimizer) == 3
        results.append(steps())
    assert results[0] == results[1] == results[2]


def test_keys_of_the_users_own(tmp_path):
    model = nn.Linear(4, 2)
    state = {**checkpoint_state(step=4, model=model), "best": 0.25, "notes": ["a"]}
    torch.save(state, tmp_path / "mine.pt")
    other = nn.Linear(4, 2)
    assert load_checkpoint(tmp_path / "mine.pt", model=other) == 4
    assert torch.equal(other.weight, model.weight)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", ["in place", "to a file"])
def test_distributed_checkpoint_keeps_it(spheres, tmp_path, way):
    """Also into an optimizer that has no state yet, and with empty dicts in the loader's state."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    training = Training(spheres, 1)
    training.go_on(2)
    folder = tmp_path / "sharded"
    dcp.save(checkpoint_state(step=2, **training.parts), checkpoint_id=folder, no_dist=True)
    save_checkpoint(tmp_path / "last.pt", step=2, **training.parts)
    whole = Training(spheres, 2)
    load_checkpoint(tmp_path / "last.pt", **whole.parts)
    expected = whole.go_on()
    again = Training(spheres, 3)
    if way == "in place":
        state = checkpoint_state(**again.parts)
        dcp.load(state, checkpoint_id=folder, no_dist=True)
        assert restore_checkpoint_state(state, **again.parts) == 2
    else:
        dcp_to_torch_save(folder, tmp_path / "one.pt")
        assert load_checkpoint(tmp_path / "one.pt", **again.parts) == 2
    assert again.go_on() == expected


# ---- mistakes ----


class Stateful:
    def __init__(self, **state):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


class Refusing(Stateful):
    def load_state_dict(self, state):
        raise RuntimeError("of another kind")


def adam(model, kind=torch.optim.AdamW):
    return kind(model.parameters(), lr=0.1)


SMALL = nn.Linear(4, 2)
MISFITS = {
    "no extra": ({"model": nn.Linear(4, 2), "extra": Stateful()}, "it has no extra"),
    "given for its optimizer": ({"model": nn.Linear(4, 2)}, "nothing was given for its optimizer"),
    "names": (
        {"model": nn.Sequential(nn.Linear(4, 2)), "optimizer": adam(SMALL)},
        r"the checkpoint's model is of another one: only one of them has 0.bias, 0.weight, bias",
    ),
    "a DDP's": (
        {"model": nn.ModuleDict({"module": nn.Linear(4, 2)}), "optimizer": adam(SMALL)},
        r"only one of them .*save and load the \.module",
    ),
    "shapes": (
        {"model": nn.Linear(5, 2), "optimizer": adam(SMALL)},
        r"weight is \(2, 4\) there, and \(2, 5\) here",
    ),
    "groups": (
        {"model": nn.Linear(4, 2), "optimizer": torch.optim.AdamW([SMALL.weight])},
        r"optimizer is of another one: it has groups of \[2\] parameters, and here they are of \[1",
    ),
    "kind": (
        {"model": nn.Linear(4, 2), "optimizer": adam(SMALL, torch.optim.SGD)},
        "it has no dampening, momentum, nesterov, as SGD has",
    ),
    "exchanged": ({"model": adam(SMALL), "optimizer": nn.Linear(4, 2)}, "model is of another one"),
    "stateless": ({"model": nn.Linear(4, 2), "optimizer": None}, None),
}


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_changes_nothing(tmp_path, name):
    objects, message = MISFITS[name]
    model = nn.Linear(4, 2)
    save_checkpoint(tmp_path / "last.pt", step=3, model=model, optimizer=adam(model))
    states = torch.load(tmp_path / "last.pt", weights_only=True)

    def everything():
        known = {k: v for k, v in objects.items() if v is not None}
        return flat(checkpoint_state(**known))

    before = everything()
    kind = ValueError if message else TypeError
    message = message or "optimizer is a NoneType, without state_dict and load_state_dict"
    with pytest.raises(kind, match=message):
        load_checkpoint(tmp_path / "last.pt", **objects)
    with pytest.raises(kind, match=message):
        restore_checkpoint_state(states, **objects)
    assert everything() == before


def test_loaders_and_the_like_refuse_before_models_are_changed(spheres, tmp_path):
    model, other = nn.Linear(4, 2), nn.Linear(4, 2)
    loader = ts.wrap(DataLoader(DATA, 8), spheres)
    save_checkpoint(tmp_path / "last.pt", model=model, loader=loader)
    before = flat([other.state_dict(), torch.get_rng_state()])
    with pytest.raises(ValueError, match="batch_size=8, not 9") as caught:
        loader = ts.wrap(DataLoader(DATA, 9), spheres)
        load_checkpoint(tmp_path / "last.pt", model=other, loader=loader)
    assert caught.value.__notes__ == ["when loader was loaded from the checkpoint"]
    assert flat([other.state_dict(), torch.get_rng_state()]) == before


def test_objects_without_a_state(spheres, tmp_path):
    for name, thing in {
        "loader": DataLoader(DATA),
        "optimizers": [adam(SMALL)],
        "scheduler": None,
        "best": 0.5,
        "spheres": spheres,
    }.items():
        with pytest.raises(TypeError, match=f"{name} is a .*, without state_dict"):
            save_checkpoint(tmp_path / "last.pt", **{name: thing})
    with pytest.raises(TypeError, match="integer"):
        save_checkpoint(tmp_path / "last.pt", step=0.5, model=SMALL)
    assert names(tmp_path) == []


@pytest.mark.parametrize("odd", [np.float64(1), frozenset([1]), random.Random(0), lambda: 1])
def test_what_could_not_be_read_again_is_not_written(tmp_path, odd):
    path = tmp_path / "last.pt"
    save_checkpoint(path, step=1, model=SMALL)
    with pytest.raises((TypeError, AttributeError, pickle.PicklingError)) as caught:
        save_checkpoint(path, step=2, model=SMALL, odd=Stateful(deep=[{"inside": odd}]))
    if isinstance(caught.value, TypeError):
        assert "weights_only=True) would refuse" in str(caught.value)
        assert "(look at odd)" in str(caught.value)
    assert load_checkpoint(path, model=SMALL) == 1
    assert names(tmp_path) == ["last.pt"]


def test_sharded_states_are_refused(tmp_path):
    """By a tensor that stands for those of `fully_shard`: it takes processes to make one."""
    from torch.distributed.tensor import DTensor

    made = torch.Tensor._make_wrapper_subclass(DTensor, (4,))
    with pytest.raises(TypeError, match="the state of optimizer is sharded over processes"):
        checkpoint_state(optimizer=Stateful(momentum=[made]))

    class Sharded(nn.Module):
        def state_dict(self, **_):
            return {"weight": made}

    assert checkpoint_state(model=Sharded())["objects"]["model"]["weight"] is made
    with pytest.raises(TypeError, match="the state of model is sharded over processes"):
        save_checkpoint(tmp_path / "last.pt", model=Sharded())
    assert names(tmp_path) == []


def test_paths(tmp_path):
    assert load_checkpoint(tmp_path / "none.pt", model=SMALL) is None
    assert load_checkpoint(tmp_path / "nowhere" / "none.pt", model=SMALL) is None
    save_checkpoint(tmp_path / "new" / "folder" / "last.pt", step=1, model=SMALL)
    assert load_checkpoint(tmp_path / "new" / "folder" / "last.pt", model=SMALL) == 1
    for folder in (tmp_path, f"{tmp_path}/other/", ""):
        with pytest.raises(IsADirectoryError, match="a checkpoint is a file, not a folder"):
            save_checkpoint(folder, model=SMALL)
    with pytest.raises(IsADirectoryError):
        load_checkpoint(tmp_path, model=SMALL)
    with pytest.raises(FileExistsError):
        save_checkpoint(tmp_path / "new" / "folder" / "last.pt" / "below.pt", model=SMALL)
    with pytest.raises(OSError, match="name too long"):
        save_checkpoint(tmp_path / ("n" * 300), model=SMALL)
    assert names(tmp_path) == ["new"]
    (tmp_path / "link.pt").symlink_to("new/folder/last.pt")
    save_checkpoint(tmp_path / "link.pt", step=2, model=SMALL)  # takes the place of the link
    assert load_checkpoint(tmp_path / "new" / "folder" / "last.pt", model=SMALL) == 1
    assert load_checkpoint(tmp_path / "link.pt", model=SMALL) == 2


def test_who_may_read_it(tmp_path):
    path, before = tmp_path / "last.pt", os.umask(0o027)
    try:
        save_checkpoint(path, model=SMALL)
        assert stat.S_IMODE(path.stat().st_mode) == 0o640  # as of any file that is made
        path.chmod(0o604)
        save_checkpoint(path, model=SMALL)
        assert stat.S_IMODE(path.stat().st_mode) == 0o604
    finally:
        os.umask(before)


def test_files_that_are_no_whole_checkpoint(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, step=1, model=SMALL)
    whole, before = path.read_bytes(), flat(SMALL.state_dict())
    sizes = [0, 1, 2, 100, *range(200, len(whole), 997), len(whole) - 1]
    noise = random.Random(0)
    parts = [whole[:size] for size in sizes] + [noise.randbytes(size) for size in (5, 500, 5000)]
    for part in parts:
        path.write_bytes(part)
        with pytest.raises(ValueError, match=r"last.pt is no whole checkpoint; was it copied in"):
            load_checkpoint(path, model=SMALL)
    torch.save(SMALL, path)
    with pytest.raises(ValueError, match=r"is no whole checkpoint.*\(UnpicklingError\)"):
        load_checkpoint(path, model=SMALL)
    for value, message in (({"epoch": 1}, r"\['epoch'\]"), ([1], "list")):
        torch.save(value, path)
        with pytest.raises(ValueError, match=rf"not what checkpoint_state.* made: {message}"):
            load_checkpoint(path, model=SMALL)
    assert flat(SMALL.state_dict()) == before


# ---- writers that are killed, or many ----


def run(script, *arguments, timeout=100):
    command = [sys.executable, "-P", "-c", script, *map(str, arguments)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


FULL = """
import resource, sys, torch
from torch_spheres.checkpoint import load_checkpoint, save_checkpoint
path, limit = sys.argv[1], int(sys.argv[2])
model = torch.nn.Linear(300, 300)
save_checkpoint(path, step=1, model=model)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # stands for a disk that is full
try:
    save_checkpoint(path, step=2, model=model)
except OSError as error:
    print(error.strerror)
print(load_checkpoint(path, model=model))
"""


@pytest.mark.parametrize("limit", [0, 100, 50_000, 300_000])
def test_a_full_disk(tmp_path, limit):
    assert run(FULL, tmp_path / "last.pt", limit).split("\n") == ["File too large", "1", ""]
    assert names(tmp_path) == ["last.pt"]


# Forks, as importing torch takes seconds; without threads of torch's, which would be missed.
KILLED = """
import os, pathlib, random, signal, sys, time, torch
from torch_spheres import checkpoint
path, rounds = sys.argv[1], int(sys.argv[2])
folder, choose = os.path.dirname(path), random.Random(1)
torch.set_num_threads(1)
model = torch.nn.Linear(700, 700)
last, cut = 0, 0

def whole():
    state = torch.load(path, weights_only=True)
    numbers = {float(v) for t in state["objects"]["model"].values() for v in t.unique()}
    assert numbers == {float(state["step"])}, numbers
    return state["step"]

def save(step):
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(step)
    checkpoint.save_checkpoint(path, step=step, model=model)

def child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(1)
    return pid

def ended(pid):
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL

def leftovers():
    return len(os.listdir(folder)) - os.path.exists(path)

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

# At each place between two calls of the system that matter, once.
def half_way(state, file):
    file.write(b"PK" * 10_000)
    file.flush()
    die()

def die_in_the_middle():
    checkpoint.torch.save = half_way
    save(2)

def die_in(owner, name, after=False, count=0):
    kept, left = getattr(owner, name), [count]
    def dying(*args, **kwargs):
        left[0] -= 1
        if after: kept(*args, **kwargs)
        if left[0] < 0: die()
        return None if after else kept(*args, **kwargs)
    def work():
        setattr(owner, name, dying)
        save(2)
    return work

places = {
    "made": (die_in(checkpoint.fcntl, "flock"), 1, 1),
    "locked": (die_in(checkpoint.torch, "save"), 1, 1),
    "written in part": (die_in_the_middle, 1, 1),
    "written": (die_in(checkpoint.torch, "save", after=True), 1, 1),
    "synchronised": (die_in(checkpoint.os, "fsync", after=True), 1, 1),
    "to replace": (die_in(pathlib.Path, "replace"), 1, 1),
    "replaced": (die_in(pathlib.Path, "replace", after=True), 2, 0),
    "folder synchronised": (die_in(checkpoint.os, "fsync", True, count=1), 2, 0),
}
for name, (work, step, left) in places.items():
    save(1)
    assert leftovers() == 0, name
    ended(child(work))
    assert (whole(), leftovers()) == (step, left), (name, whole(), leftovers())

# At moments of chance, while it saves on and on.
last = 1
save(last)
for k in range(rounds):
    def work():
        for step in range(last + 1, last + 1000):
            save(step)
    pid = child(work)
    time.sleep(choose.uniform(0.002, 0.05))
    os.kill(pid, signal.SIGKILL)
    ended(pid)
    cut += leftovers()
    assert leftovers() <= 1
    found = whole()
    assert last <= found
    last = found
print(last, cut)
save(last + 1)
assert leftovers() == 0
"""


def test_a_writer_that_is_killed_leaves_a_whole_file(tmp_path):
    last, cut = map(int, run(KILLED, tmp_path / "last.pt", 60).split())
    assert last > 1
    assert cut > 0, "no kill came in the middle of a write: this has shown nothing"


def test_leftovers_of_the_dead_only(tmp_path):
    path = tmp_path / "last.pt"
    dead, live = (tmp_path / f".last.pt.{digit * 16}.tmp" for digit in "ab")
    others = [tmp_path / n for n in (".last.pt.tmp", ".last.pt.mine.tmp", f".x.pt.{'a' * 16}.tmp")]
    for made in (dead, live, *others):
        made.write_bytes(b"half")
    (tmp_path / f".last.pt.{'c' * 16}.tmp").mkdir()
    with live.open("r+b") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        save_checkpoint(path, model=SMALL)
        assert not dead.exists()
        assert live.exists()
    save_checkpoint(path, model=SMALL)
    assert not live.exists()
    assert all(other.exists() for other in others)


def test_a_file_that_is_taken_for_a_leftover_before_it_is_locked(tmp_path, monkeypatch):
    path, kept, taken = tmp_path / "last.pt", fcntl.flock, []

    def flock(file, how):
        if how == fcntl.LOCK_EX and len(taken) < 3:
            taken.append(file.name)
            module._remove_leftovers(path)
            assert names(tmp_path) == []
        kept(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    save_checkpoint(path, step=5, model=SMALL)
    assert len({*taken}) == 3
    assert load_checkpoint(path, model=SMALL) == 5
    assert names(tmp_path) == ["last.pt"]


def test_without_locks_others_are_left_alone(tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError("not on this file system")

    monkeypatch.setattr(fcntl, "flock", flock)
    (tmp_path / f".last.pt.{'a' * 16}.tmp").write_bytes(b"perhaps alive")
    save_checkpoint(tmp_path / "last.pt", step=5, model=SMALL)
    assert load_checkpoint(tmp_path / "last.pt", model=SMALL) == 5
    assert len(names(tmp_path)) == 2


def test_an_interrupted_save_leaves_nothing(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "last.pt", step=5, model=SMALL)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path / "last.pt", step=6, model=SMALL)
    assert names(tmp_path) == ["last.pt"]
    assert load_checkpoint(tmp_path / "last.pt", model=SMALL) == 5


def test_many_writers_and_a_reader(tmp_path):
    path, errors, stop = tmp_path / "last.pt", [], threading.Event()
    state = {"a": torch.zeros(30_000), "b": torch.zeros(30_000)}

    def write(number):
        try:
            while not stop.is_set():
                mine = Stateful(**{k: torch.full_like(v, number) for k, v in state.items()})
                save_checkpoint(path, step=number, part=mine)
        except BaseException as error:
            errors.append(error)

    save_checkpoint(path, part=Stateful(**state))
    writers = [threading.Thread(target=write, args=(number,)) for number in (1, 2, 3)]
    for writer in writers:
        writer.start()
    seen, end = set(), time.monotonic() + 60
    while len(seen & {1, 2, 3}) < 3 and time.monotonic() < end and not errors:
        read = Stateful()
        step = load_checkpoint(path, part=read)
        assert all(torch.equal(v, torch.full_like(v, step)) for v in read.state.values())
        seen.add(step)
    stop.set()
    for writer in writers:
        writer.join()
    assert errors == []
    assert seen >= {1, 2, 3}
    assert names(tmp_path) == ["last.pt"]


# ---- training that is killed ----

TRAINING = """
import hashlib, random, sys, numpy, torch
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
            sys.stdin.readline()  # killed here

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
        command = [sys.executable, "-P", "-c", TRAINING, path, place, workers, seed, stop]
        with subprocess.Popen(
            [*map(str, command)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout.readline() == f"at {begin}\n"
            assert process.stdout.readline() == "reached\n"
            process.kill()
            process.communicate(timeout=100)
        assert process.returncode == -signal.SIGKILL
        begin = stop
    resumed = run(TRAINING, path, "", workers, 9, 0).split()
    assert resumed == ["at", str(begin), straight[2]]


# ---- several processes ----

RANK = """
import datetime, json, os, pathlib, random, signal, sys, time, warnings, torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import RandomSampler
import torch_spheres as ts
from torch_spheres import checkpoint
from torch_spheres.checkpoint import load_checkpoint, save_checkpoint
rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet{world}", rank=rank,
                        world_size=world, timeout=datetime.timedelta(seconds=60))
torch.manual_seed(world)
bare = nn.Linear(4, 2)
model = DDP(bare)
optimizer = torch.optim.AdamW(model.parameters())
sampler = ts.SphereBatchSampler(RandomSampler(range(96)), 24, rank=rank, world_size=world)
parts = dict(model=model, bare=bare, optimizer=optimizer, sampler=sampler)
two, path = f"{folder}/two.pt", f"{folder}/new/last.pt"

def expect(kind, text, work):
    began = time.monotonic()
    try:
        work()
    except kind as error:
        assert type(error) is kind and text in str(error), repr(error)
        assert time.monotonic() - began < 20
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
print(json.dumps([[weights, moments, torch.rand(3).tolist()], [*batches]]))

# One cannot write; one cannot say its state; one is elsewhere.
torch.manual_seed(1)
save(2)
blocked = f"{path}/below.pt"
expect(mine(FileExistsError, ts.errors.RankError), mine("File exists", "rank 0 of"),
       lambda: save_checkpoint(blocked, **parts))
if world == 3:
    expect(mine(ts.errors.RankError, TypeError), mine("rank 1 of 3: TypeError: x is a", "x is a"),
           lambda: save_checkpoint(path, x=mine(optimizer, None)))
    expect(ts.errors.RankError, "at different steps (rank 0: step 7; rank 1: step 8; rank 2:",
           lambda: save(7 + rank))
    expect(ts.errors.RankError, "different files; is it in a folder that all share? (rank 0: step",
           lambda: load_checkpoint(mine(path, two + "none"), **parts))
    torch.manual_seed(2)
    other = f"{folder}/other{rank}.pt"
    save_checkpoint(other, step=2, process_group=False, **parts)  # each for itself
    assert load_checkpoint(other, **parts) == 2  # the same, wherever it is
    expect(ts.errors.RankError, "see different files", lambda: load_checkpoint(
        mine(two, other), **parts))
    with open(other, "r+b") as file:
        file.truncate(100)
    expect(mine(ts.errors.RankError, ValueError), "is no whole checkpoint",
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
    expect(ts.errors.RankError, "rank 0 of 3 did not come to it", lambda: save(5))
# Not by the interpreter's end: a thread of gloo's that wants the GIL then aborts the process.
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.timeout(240)
def test_ranks(tmp_path):
    """Three save, two and one go on; whatever goes wrong on one is known to all, and soon."""
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    environment["PYTHONPATH"] = ":".join(p for p in sys.path if p)
    told = {}
    for world in (3, 2, 1):
        command = [sys.executable, "-P", "-c", RANK]
        ranks = [
            subprocess.Popen(
                [*command, str(rank), str(world), str(tmp_path)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(world)
        ]
        try:
            ends = [rank.communicate(timeout=100) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        codes = [rank.returncode for rank in ranks]
        assert codes == ([-signal.SIGKILL, 0, 0] if world == 3 else [0] * world), ends
        told[world] = [json.loads(out) for out, _ in ends]
        if world == 3:  # the file is that of the save before the one in which rank 0 was killed
            assert torch.load(tmp_path / "new" / "last.pt", weights_only=True)["step"] == 3
            assert len(names(tmp_path / "new")) == 2
    assert names(tmp_path / "new") == ["last.pt"]
    ((state, batches),) = told[1]
    assert [len(batch) for batch in batches] == [24, 24]
    for ranks in told.values():
        assert all(other == state for other, _ in ranks)
        assert [[*chain(*own)] for own in zip(*(b for _, b in ranks), strict=True)] == batches
