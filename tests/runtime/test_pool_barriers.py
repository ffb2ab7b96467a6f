"""KissingSpheres from Python: barriers and epochs wait for the work before them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from system_support import (  # noqa: F401
    LIMIT,
    eventually,
    fail,
    in_thread,
    no_thread_is_left,
)

from torch_spheres import KissingSpheres, State, StoppedError


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_a_barrier_waits_for_the_work_before_it(levels: int) -> None:
    with KissingSpheres(levels=levels, concurrency=5) as spheres:
        for epoch in range(1, 4):
            ran: list[int] = []
            for level in [*range(levels), levels - 1]:
                spheres.distribute_work(range(100), ran.append)
                spheres.barrier(level, LIMIT)
            assert len(ran) == 100 * (levels + 1)
            spheres.distribute_work(range(100), ran.append)
            assert spheres.epoch(LIMIT) == epoch and len(ran) == 100 * (levels + 2)


def blocked_barrier(
    spheres: KissingSpheres, after: Callable[[], None]
) -> tuple[threading.Event, Callable[[], Any]]:
    """A barrier that one item holds up; returns the item's gate, and the barrier's join."""
    begun, gate = threading.Event(), threading.Event()
    spheres.distribute_work([0], lambda _: (begun.set(), gate.wait(LIMIT), after()))
    assert begun.wait(LIMIT)
    join = in_thread(lambda: spheres.barrier(1))
    eventually(lambda: any(s.state is State.WAITING for s in spheres.stats().level(1)))
    return gate, join


def test_a_barrier_times_out_and_is_met_later() -> None:
    with KissingSpheres() as spheres:
        gate, join = blocked_barrier(spheres, lambda: None)
        for meet in (lambda: spheres.barrier(0, 0.05), lambda: spheres.epoch(0.05)):
            with pytest.raises(TimeoutError, match="another barrier"):
                meet()
        gate.set()
        join()
        assert spheres.epoch(LIMIT) == 1


def test_a_failing_item_opens_the_barrier_with_its_error() -> None:
    with KissingSpheres() as spheres:
        gate, join = blocked_barrier(spheres, lambda: fail("late"))
        gate.set()
        with pytest.raises(LookupError, match="late"):
            join()
        spheres.wait()  # told already
        spheres.barrier(1, LIMIT)


def test_stop_opens_the_barrier() -> None:
    spheres = KissingSpheres()
    gate, join = blocked_barrier(spheres, lambda: None)
    with pytest.raises(TimeoutError, match="still running"):
        spheres.stop(0)
    with pytest.raises(StoppedError, match="barrier"):
        join()
    gate.set()
    spheres.stop()
    assert not spheres.running and spheres.start().epoch(LIMIT) == 1
    spheres.stop()
