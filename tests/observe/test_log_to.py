"""`log_to`, as TensorBoard reads it, and when it writes."""

from __future__ import annotations

import gc
import math
import time
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torch_spheres as ts
from torch_spheres import KissingSpheres

NAMES = {
    "utilization", "imbalance", "steal_rate", "items_per_second", "cores_used", "queued",
    "queue_high_water", "messages_per_second", "item_time_p50_seconds", "item_time_p95_seconds",
}  # fmt: skip


class Fake:
    """A writer that remembers, or fails when asked to."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, float, int]] = []
        self.broken = False
        self.room: int | None = None  # for so many more figures

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        if self.broken or self.room == 0:
            raise OSError(f"disk full for {tag}")
        self.room = None if self.room is None else self.room - 1
        assert isinstance(value, float) and math.isfinite(value)
        self.seen.append((tag, value, step))

    def steps(self) -> list[int]:
        return [step for tag, _, step in self.seen if tag.endswith("/utilization")]


def test_tensorboard_shows_each_n_steps_what_came_between(tmp_path: Any) -> None:
    pytest.importorskip(
        "tensorboard"
    )  # of the test extra; its grpcio is not there for every Python
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    model = nn.Linear(5, 1)
    snapshots = []
    with KissingSpheres(levels=2) as spheres, SummaryWriter(str(tmp_path)) as writer:
        parallel = ts.SphereParallel(model, spheres)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        hook = ts.GradientHook(optimizer, parallel)
        spheres.log_to(writer, every=3)  # nobody keeps it
        for _ in range(7):
            snapshots.append(spheres.stats())
            optimizer.zero_grad()
            spheres.map(abs, range(12))  # the model may be faster without the spheres
            parallel(torch.randn(24, 5)).sum().backward()
            optimizer.step()
        hook.remove()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == {f"spheres/{name}" for name in NAMES}
    for name in NAMES:
        assert [event.step for event in events.Scalars(f"spheres/{name}")] == [3, 6]
    high = max(s.queue_high_water for s in snapshots[3])
    assert events.Scalars("spheres/queue_high_water")[0].value == high
    for name, least, most in (("utilization", 0, 1), ("imbalance", 1, 12), ("steal_rate", 0, 1)):
        assert all(least <= e.value <= most for e in events.Scalars(f"spheres/{name}"))
    for name in ("items_per_second", "item_time_p50_seconds"):
        assert all(event.value > 0 for event in events.Scalars(f"spheres/{name}"))
    pairs = zip(*(events.Scalars(f"spheres/item_time_p{p}_seconds") for p in (50, 95)), strict=True)
    assert all(half.value <= most.value for half, most in pairs)


def test_a_loop_without_an_optimizer_counts_its_steps_itself() -> None:
    writer = Fake()
    with KissingSpheres() as spheres, spheres.log_to(writer, 2, tag="pool", first_step=100) as log:
        for _ in range(5):
            spheres.map(abs, range(10))
            log.step()
        assert writer.steps() == [102, 104] and log.steps == 105
    assert writer.steps() == [102, 104, 105]  # closing writes the rest
    assert {tag for tag, _, _ in writer.seen} == {f"pool/{name}" for name in NAMES}
    log.close()
    assert writer.steps() == [102, 104, 105]
    with pytest.raises(RuntimeError, match="closed"):
        log.step()


def test_a_log_that_has_counted_no_steps_says_so() -> None:
    writer = Fake()
    spheres = KissingSpheres()
    with spheres:
        spheres.log_to(writer)  # nobody keeps it, and the model's optimizer has no hook
        spheres.map(abs, range(10))
        with pytest.warns(UserWarning, match=r"counted no steps: .*call log.step\(\)") as told:
            spheres.stop()
    spheres.stop()  # once is enough
    assert [Path(w.filename).name for w in told] == [Path(__file__).name]
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters())
    with spheres:
        with pytest.warns(UserWarning, match="no steps") as told, spheres.log_to(writer, 5):
            spheres.map(abs, range(10))
        log = spheres.log_to(writer, 5, optimizer=optimizer)
        spheres.map(abs, range(10))
        with pytest.warns(UserWarning, match="counted no steps") as told:
            log.close()
        assert [Path(w.filename).name for w in told] == [Path(__file__).name]
        spheres.log_to(writer).close()  # nothing has run
        with pytest.raises(LookupError), spheres.log_to(writer):
            spheres.map(abs, range(10))
            raise LookupError
    assert writer.seen == []


def test_a_log_without_steps_hides_no_error() -> None:
    def fail(item: int) -> None:
        raise LookupError(item)

    spheres = KissingSpheres().start()
    spheres.log_to(Fake())
    work = spheres.distribute_work([1], fail)
    while not work.done():
        time.sleep(0.001)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        spheres.stop()
    assert [w.category for w in told] == [RuntimeWarning, UserWarning]
    assert "LookupError(1)" in str(told[0].message)


def test_without_items_there_are_no_item_times() -> None:
    writer = Fake()
    with KissingSpheres() as spheres:
        log = spheres.log_to(writer, every=1)
        log.step()
    left_out = {"spheres/item_time_p50_seconds", "spheres/item_time_p95_seconds"}
    assert {tag for tag, _, _ in writer.seen} == {f"spheres/{name}" for name in NAMES} - left_out


def test_the_steps_of_a_given_optimizer_count_and_no_others() -> None:
    one, two = (torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1) for _ in range(2))
    given, hooked = Fake(), Fake()
    with KissingSpheres() as spheres:
        early = spheres.log_to(hooked, 1)  # before there is a hook
        ts.GradientHook(one, spheres), ts.GradientHook(two, spheres)
        log = spheres.log_to(given, 1, optimizer=one)
        for optimizer in (one, two, one, two):
            optimizer.step()
        assert given.steps() == [1, 2] and hooked.steps() == [1, 2, 3, 4]
        log.close()
        one.step()
        assert given.steps() == [1, 2] and hooked.steps() == [1, 2, 3, 4, 5]
        early.close()
        one.step()
        assert early.steps == 5
        with KissingSpheres() as others:
            three = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
            ts.GradientHook(three, others)
            quiet = spheres.log_to(hooked, 1)
            three.step()
            assert quiet.steps == 0


def test_an_error_of_the_writer_reaches_the_loop() -> None:
    parameter = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    writer = Fake()
    with KissingSpheres() as spheres:
        ts.GradientHook(optimizer, spheres)
        log = spheres.log_to(writer, 1)
        parameter.grad = torch.ones(1)
        writer.broken = True
        with pytest.raises(OSError, match="disk full"):
            optimizer.step()
        assert parameter.item() == 0.5  # the update has been made
        writer.broken = False
        optimizer.step()
        assert writer.steps() == [2]
        log.close()
        by_hand = spheres.log_to(writer, 5)
        by_hand.step()
        writer.broken = True
        with pytest.raises(OSError, match="disk full"):
            by_hand.write()
        by_hand.step()
        with pytest.raises(OSError, match="disk full"):
            by_hand.close()
        by_hand.close()
        # The loop's own error is the one that is seen.
        with pytest.raises(LookupError), spheres.log_to(writer, 5) as log:
            log.step()
            raise LookupError
        with pytest.raises(RuntimeError, match="closed"):
            log.step()


def test_figures_that_could_not_be_written_come_with_the_next_ones() -> None:
    writer = Fake()
    with KissingSpheres() as spheres:
        outer = spheres.stats()
        log = spheres.log_to(writer, 3)
        inner = spheres.stats()
        spheres.map(abs, range(500))
        log.step(), log.step()
        writer.room = 4  # of the figures; the rest of them fail
        with pytest.raises(OSError, match="disk full"):
            log.step()
        assert [step for _, _, step in writer.seen] == [3] * 4
        writer.seen.clear()
        writer.room = None
        log.step(), log.step()
        assert writer.seen == []  # not before the next n
        shortest = (spheres.stats() - inner).elapsed
        log.step()  # without any items since
        longest = (spheres.stats() - outer).elapsed
        first = {tag.removeprefix("spheres/"): value for tag, value, _ in writer.seen}
        assert set(first) == NAMES and {step for _, _, step in writer.seen} == {6}
        assert 500 / longest <= first["items_per_second"] <= 500 / shortest
        assert first["item_time_p50_seconds"] > 0
        # What has been written is not written again; what could not be is, on closing too.
        writer.seen.clear()
        for _ in range(3):
            log.step()
        assert {tag: value for tag, value, _ in writer.seen}["spheres/items_per_second"] == 0
        log.close()
        again = spheres.log_to(writer, 1)
        spheres.map(abs, range(70))
        writer.room = 0
        with pytest.raises(OSError, match="disk full"):
            again.step()
        writer.seen.clear()
        writer.room = None
        again.close()
        assert writer.steps() == [1]
        assert {tag: value for tag, value, _ in writer.seen}["spheres/items_per_second"] > 0


def test_a_step_counts_once_however_many_hooks_an_optimizer_has() -> None:
    model, head, other = (nn.Linear(3, 2) for _ in range(3))
    shared = torch.optim.SGD([*model.parameters(), *head.parameters()], lr=0.1)
    single = torch.optim.SGD(other.parameters(), lr=0.1)
    writer = Fake()
    with KissingSpheres() as spheres, KissingSpheres() as others:
        hooks = [ts.GradientHook(shared, ts.SphereParallel(m, spheres)) for m in (model, head)]
        ts.GradientHook(single, spheres), ts.GradientHook(shared, others)
        log, theirs = spheres.log_to(writer, 1), others.log_to(Fake(), 1)
        shared.step()
        assert (log.steps, theirs.steps) == (1, 1)
        single.step(), shared.step()
        assert (log.steps, theirs.steps) == (3, 2)

        def fails() -> float:
            raise LookupError

        with pytest.raises(LookupError):
            shared.step(fails)  # made no step
        assert (log.steps, theirs.steps) == (3, 2)
        shared.step()
        writer.room = 0
        with pytest.raises(OSError, match="disk full"):
            shared.step()
        writer.room = None
        assert log.steps == 5
        hooks[0].remove()
        shared.step()
        assert log.steps == 6


def test_arguments_of_log_to_are_checked() -> None:
    spheres, writer = KissingSpheres(), Fake()
    with pytest.raises(TypeError, match="add_scalar"):
        spheres.log_to(print)  # type: ignore[arg-type]
    for every in (0, -1):
        with pytest.raises(ValueError, match="every must be at least 1"):
            spheres.log_to(writer, every)
    with pytest.raises(ValueError, match=r"first_step.* must be at least 0, got -1"):
        spheres.log_to(writer, first_step=-1)
    with pytest.raises(TypeError, match="every must be an integer"):
        spheres.log_to(writer, 2.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="optimizer must be None or a"):
        spheres.log_to(writer, optimizer=nn.Linear(1, 1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="tag"):
        spheres.log_to(writer, tag="")
    assert spheres._steps.logs == []


@pytest.mark.parametrize("given", [False, True])
def test_a_step_that_calls_its_base_s_counts_once(spheres, given):
    torch.optim.SGD([torch.zeros(1)])  # from here on torch runs hooks in both of the two below

    class Derived(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    optimizer = Derived([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    hooks = [ts.GradientHook(optimizer, spheres) for _ in range(2)]
    with spheres.log_to(Fake(), 1, optimizer=optimizer if given else None) as log:
        for _ in range(3):
            optimizer.step()
        assert log.steps == 3
        for hook in hooks:
            hook.remove()
        optimizer.step()
        assert log.steps == (4 if given else 3)


def test_a_hook_that_is_removed_leaves_the_spheres_to_their_end():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    spheres = ts.KissingSpheres()
    there = weakref.ref(spheres)
    hook = ts.GradientHook(optimizer, spheres)
    hook.remove()
    del hook, spheres
    gc.collect()
    assert there() is None
