"""`save_checkpoint` and its kin: files that are whole, training that goes on with the same bits."""

from __future__ import annotations

import copy
import pickle
import random

import numpy as np
import pytest
import torch
from checkpoint_support import SMALL, Stateful, names
from loader_support import flat
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import torch_spheres as ts
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


class Refusing(Stateful):
    def load_state_dict(self, state):
        raise RuntimeError("of another kind")


def adam(model, kind=torch.optim.AdamW):
    return kind(model.parameters(), lr=0.1)


MISFITS = {
    "no extra": (
        {"model": nn.Linear(4, 2), "extra": Stateful()},
        "the checkpoint is of model, optimizer, but was given model, extra",
    ),
    "no optimizer": ({"model": nn.Linear(4, 2)}, "of model, optimizer, but was given model$"),
    "names": (
        {"model": nn.Sequential(nn.Linear(4, 2)), "optimizer": adam(SMALL)},
        r"the checkpoint's model is of another one: only one of them has 0.bias, 0.weight, bias",
    ),
    "a DDP's": (
        {"model": nn.ModuleDict({"module": nn.Linear(4, 2)}), "optimizer": adam(SMALL)},
        r"only one of them has bias, module\.bias",
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
    message = message or "optimizer, NoneType, has no state_dict and load_state_dict"
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
        with pytest.raises(TypeError, match=f"{name}, .*, has no state_dict"):
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
