"""Writers of checkpoints that are killed, many at once, or on a full disk: the file is whole."""

from __future__ import annotations

import gc
import os
import threading
import time
import weakref

import pytest
import torch
from checkpoint_support import SMALL, Stateful, names, run

from torch_spheres.checkpoint import load_checkpoint, save_checkpoint

FULL = """
import resource, sys, torch
from torch_spheres.checkpoint import load_checkpoint, save_checkpoint
path, limit = sys.argv[1], int(sys.argv[2])
model = torch.nn.Linear(300, 300)
save_checkpoint(path, step=1, model=model)
kept = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, kept[1]))  # stands for a disk that is full
try:
    save_checkpoint(path, step=2, model=model)
except OSError as error:
    resource.setrlimit(resource.RLIMIT_FSIZE, kept)  # what is printed goes to a file, too
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
    # Of a writer that was killed: removed here, as its user may.
    found = [name for name in os.listdir(folder) if name != "last.pt"]
    for name in found:
        assert name.startswith(".last.pt.") and name.endswith(".tmp"), name
        os.remove(os.path.join(folder, name))
    return len(found)

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
    "made": (die_in(checkpoint.torch, "save"), 1, 1),
    "written in part": (die_in_the_middle, 1, 1),
    "written": (die_in(checkpoint.torch, "save", after=True), 1, 1),
    "synchronised": (die_in(checkpoint.os, "fsync", after=True), 1, 1),
    "to replace": (die_in(pathlib.Path, "replace"), 1, 1),
    "replaced": (die_in(pathlib.Path, "replace", after=True), 2, 0),
    "folder synchronised": (die_in(checkpoint.os, "fsync", True, count=1), 2, 0),
}
for name, (work, step, left) in places.items():
    save(1)
    ended(child(work))
    found = whole(), leftovers()
    assert found == (step, left), (name, found)

# At moments of chance, while it saves on and on.
last, k = 1, 0
save(last)
while k < rounds or last == 1 or cut == 0:  # longer and longer, where a save takes long
    def work():
        for step in range(last + 1, last + 1000):
            save(step)
    pid = child(work)
    time.sleep(choose.uniform(0.002, 0.05) * (1 + k // rounds))
    k += 1
    os.kill(pid, signal.SIGKILL)
    ended(pid)
    left = leftovers()
    assert left <= 1
    cut += left
    found = whole()
    assert last <= found
    last = found
print(last, cut)
"""


def test_a_writer_that_is_killed_leaves_a_whole_file(tmp_path):
    last, cut = map(int, run(KILLED, tmp_path / "last.pt", 60).split())
    assert last > 1
    assert cut > 0, "no kill came in the middle of a write: this has shown nothing"


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


def test_nothing_of_a_failed_call_is_kept(tmp_path):
    seen = []

    class Refuses(Stateful):
        def state_dict(self):
            value = torch.ones(3)
            seen.append(weakref.ref(value))
            return {"value": value}

        def load_state_dict(self, state):
            seen.append(weakref.ref(state["value"]))
            raise KeyError("not this one")

    path = tmp_path / "last.pt"
    save_checkpoint(path, thing=Refuses())
    gc.collect()
    gc.disable()  # an error in a variable of a frame that its traceback owns would be a cycle
    try:
        with pytest.raises(IsADirectoryError):
            save_checkpoint(tmp_path, thing=Refuses())
        with pytest.raises(KeyError, match="not this one"):
            load_checkpoint(path, thing=Refuses())
        assert len(seen) == 3
        assert [ref() for ref in seen] == [None] * 3
    finally:
        gc.enable()
