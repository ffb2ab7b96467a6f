"""What a dataset can change is seen; what stays the same is not taken for a change."""

from __future__ import annotations

import collections
import datetime
import enum
import functools
import io
import itertools
import logging
import pathlib
import random
import re
import sqlite3
import sys
import threading
import types

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Subset, TensorDataset

from torch_spheres.loading.fingerprint import fingerprint


def holding(**attributes):
    return types.SimpleNamespace(**attributes)


class Slots:
    __slots__ = ("__private", "count")

    def __init__(self):
        self.count = self.__private = 0

    def up(self):
        self.__private += 1


class Counts:
    hits = 0

    @property
    def more(self):
        return self.hits + 1


class Kept(list):
    """A container with attributes of its own."""


def closure():
    count = 0

    def up():
        nonlocal count
        count += 1

    return up


def default(seen=[]):  # noqa: B006
    seen.append(1)


CHANGES = {
    "attribute": (holding(n=0), lambda d: vars(d).update(n=1)),
    "deep": (holding(a=holding(b=[{"c": holding(n=0)}])), lambda d: vars(d.a.b[0]["c"]).clear()),
    "count": (holding(c=itertools.count()), lambda d: next(d.c)),
    "iterator": (holding(i=iter([1, 2, 3])), lambda d: next(d.i)),
    "cycle": (holding(i=itertools.cycle([1, 2])), lambda d: next(d.i)),
    "zip": (holding(i=zip([1, 2], [3, 4], strict=True)), lambda d: next(d.i)),
    "array": (holding(a=np.zeros(1)), lambda d: d.a.__iadd__(1)),
    "bytes": (holding(a=bytearray(3)), lambda d: d.a.__setitem__(0, 1)),
    "slot": (holding(s=Slots()), lambda d: setattr(d.s, "count", 1)),
    "private slot": (holding(s=Slots()), lambda d: d.s.up()),
    "deque": (holding(q=collections.deque([1])), lambda d: d.q.rotate() or d.q.append(2)),
    "closure": (holding(f=closure()), lambda d: d.f()),
    "partial": (holding(f=functools.partial(closure())), lambda d: d.f()),
    "method": (holding(f=[1].append), lambda d: None),
    "default": (holding(f=default), lambda d: d.f()),
    "class": (Counts(), lambda d: setattr(type(d), "hits", Counts.hits + 1)),
    "subclass": (holding(k=Kept()), lambda d: setattr(d.k, "n", 1)),
    "random": (holding(r=random.Random(1)), lambda d: d.r.random()),
    "numpy": (holding(r=np.random.default_rng(1)), lambda d: d.r.random()),
    "legacy": (holding(r=np.random.RandomState(1)), lambda d: d.r.rand()),
    "torch": (holding(r=torch.Generator()), lambda d: torch.rand(1, generator=d.r)),
    "tensor": (holding(t=torch.zeros(3)), lambda d: d.t.add_(1)),
    "file": (holding(f=io.BytesIO(b"abc")), lambda d: d.f.read(1)),
    "cache": (holding(c={}), lambda d: d.c.update(a=1)),
    "long cache": (holding(c=dict.fromkeys(range(1000))), lambda d: d.c.update(a=1)),
}


@pytest.mark.filterwarnings("ignore:Pickle, copy, and deepcopy support:DeprecationWarning")
@pytest.mark.parametrize("name", sorted(CHANGES.keys() - {"method"}))
def test_a_change_is_seen(name):
    dataset, change = CHANGES[name]
    if name in ("count", "cycle") and sys.version_info >= (3, 14):
        assert (
            fingerprint(dataset) is None
        )  # they are no longer pickled, and nobody can look inside
        return
    before, again = fingerprint(dataset), fingerprint(dataset)
    assert before is not None and before == again
    change(dataset)
    assert fingerprint(dataset) != before


class Colour(enum.Enum):
    RED = 1


class Cached:
    @functools.lru_cache  # noqa: B019
    def square(self, n):
        return n * n


STEADY = {
    "plain": holding(a=1, b="b", c=None, d=1.5, e=2j, f=b"f", g=...),
    "values": holding(
        a=pathlib.Path("/a"),
        b=re.compile("a"),
        c=datetime.datetime(2020, 1, 1),
        d=range(3),
        e=slice(1, 2),
        f=Colour.RED,
        g=frozenset([1]),
        h=np.float32(1),
        i=np.dtype("f4"),
        j=torch.float32,
        k=torch.device("cpu"),
        l=torch.Size([3]),
    ),
    "code": holding(a=len, b=lambda x: x, c=np, d=zip, e=Cached().square, f=closure, g=str.upper),
    "threads": holding(a=threading.Lock(), b=threading.RLock(), c=threading.local()),
    "logger": holding(a=logging.getLogger("a"), b=sys.stdout, c=sys.stderr),
    "module": holding(a=nn.Sequential(nn.Linear(3, 3), nn.ReLU())),
    "dataset": Subset(TensorDataset(torch.zeros(100, 3)), range(50)),
    "long": holding(a=[object()] * 1000),
    "properties": Counts(),
}


@pytest.mark.parametrize("name", STEADY)
def test_what_stays_is_no_change(name):
    before = fingerprint(STEADY[name])
    assert before is not None and fingerprint(STEADY[name]) == before


def test_what_nobody_can_look_into_has_none():
    connection = sqlite3.connect(":memory:")
    for inside in (connection, (n for n in range(3)), map(len, (n for n in range(3)))):
        assert fingerprint(holding(a=[inside])) is None
    connection.close()


def test_data_is_not_read():
    """Of what a dataset is made of, the size counts."""
    dataset = holding(a=np.zeros(10000), b=[0] * 1000, c=bytearray(10000))
    before = fingerprint(dataset)
    dataset.a[0] = dataset.b[0] = dataset.c[0] = 1
    assert fingerprint(dataset) == before


def test_what_holds_itself_ends():
    dataset = holding(n=0)
    dataset.me = dataset
    dataset.all = [dataset] * 10
    before = fingerprint(dataset)
    assert before == fingerprint(dataset)
    dataset.n = 1
    assert fingerprint(dataset) != before
