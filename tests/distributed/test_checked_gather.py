"""`CheckedGather` over a transport of threads: long payloads, errors, and ranks that diverge."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from torch_spheres.distributed.checked_gather import CheckedGather, gather_objects
from torch_spheres.distributed.transport import Transport
from torch_spheres.errors import DeferredError, RankError

WORLD = 3


class ThreadTransport(Transport):
    """A rank that is a thread; `mail` is shared by all."""

    def __init__(self, rank, mail, barrier):
        self.rank, self.world, self.device = rank, WORLD, torch.device("cpu")
        self._mail, self._barrier, self._divergence = mail, barrier, None

    def gather_async(self, out, given):
        self._mail[self.rank] = given
        self._barrier.wait(20)
        out.copy_(torch.cat(self._mail))
        self._barrier.wait(20)

    def wait(self, works, what):
        pass


def on_all(run):
    """What `run(transport)` returns, or the exception that it raises, by rank."""
    mail, barrier = [None] * WORLD, threading.Barrier(WORLD)

    def rank(number):
        try:
            return run(ThreadTransport(number, mail, barrier))
        except Exception as error:
            return error

    with ThreadPoolExecutor(WORLD) as threads:
        return [*threads.map(rank, range(WORLD))]


@pytest.mark.parametrize("length", [0, 1, 895, 896, 897, 5000])
def test_payloads_of_any_length(length):
    payloads = [torch.arange(n).to(torch.uint8) for n in (length, 3, 2 * length)]

    def run(transport):
        return CheckedGather(transport, "a test", payloads[transport.rank]).finish()

    for found in on_all(run):
        assert all(map(torch.equal, found, payloads))


def test_values_of_any_type():
    assert (
        on_all(lambda t: gather_objects(t, {t.rank: "x" * 2000 * t.rank}, "a test"))
        == [[{rank: "x" * 2000 * rank} for rank in range(WORLD)]] * WORLD
    )


def test_an_error_of_one_rank_is_raised_on_all():
    def run(transport):
        caught = DeferredError(KeyError("mine") if transport.rank == 1 else None)
        CheckedGather(transport, "a test", torch.zeros(2000, dtype=torch.uint8), caught).finish()

    first, own, last = on_all(run)
    assert isinstance(own, KeyError)
    for error in (first, last):
        assert isinstance(error, RankError) and error.ranks == (1,)
        assert str(error) == "a test failed on rank 1 of 3: KeyError: 'mine'"


def test_ranks_that_diverge_say_so_from_then_on():
    def run(transport):
        nothing = torch.zeros(0, dtype=torch.uint8)
        with pytest.raises(RankError, match="rank 0: one; rank 1: one; rank 2: another"):
            CheckedGather(transport, "another" if transport.rank == 2 else "one", nothing).finish()
        CheckedGather(transport, "one", nothing)

    for rank, error in enumerate(on_all(run)):
        assert isinstance(error, RankError) and "(said before)" in str(error)
        assert error.ranks == ((2,) if rank < 2 else (0, 1))
