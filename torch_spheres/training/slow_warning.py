"""Says, once, when plain torch would be faster than a model's shards.

Twelve small shards cost twelve times what torch needs for each call. Whether that is more than the
spheres gain is measured, not guessed, once the way to run the shards has been chosen: the forward
of the whole batch is timed on a copy of the module with torch's own threads, and if it is faster,
so are other numbers of shards.
"""

from __future__ import annotations

import math
import threading
import time
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from torch_spheres import _compat, _compiled
from torch_spheres.reduction.partition import possible_world_sizes
from torch_spheres.runtime.rng import TrialRandom, current_source
from torch_spheres.runtime.stack_level import users_level
from torch_spheres.training.shard_timing import bare_copy, count_shards, time_shards
from torch_spheres.training.sync_batch_norm import waits_for_others

if TYPE_CHECKING:
    from torch_spheres.training.autotune import Plan
    from torch_spheres.training.call_arguments import CallArguments
    from torch_spheres.training.engine import Engine

__all__ = ["Adviser", "WatchedCall"]

_MANY = 12  # shards: no larger number is proposed


@dataclass(frozen=True)
class WatchedCall:
    """One call of a model.

    Attributes:
        engine: of the model.
        arguments: of the module.
        plan: how its shards run.
        what: ``"forward"`` or ``"forward_backward"``.
        collective: whether all ranks take part in it.
    """

    engine: Engine
    arguments: CallArguments
    plan: Plan
    what: str
    collective: bool

    @property
    def is_let_alone(self) -> bool:
        """Whether it is not compared with plain torch.

        That is so on accelerators, inside of another call, under a profiler, a counter of operators
        or hooks of all modules, which would see more than the call's, and in a rank's own
        evaluations, of which the shards are those of all ranks' rows.
        """
        is_own = self.engine.ranks is not None and not self.collective
        is_seen = _compat.dispatch_modes() or _compat.profiler_is_on() or _compiled.global_hooks()
        is_inside = current_source() is not None
        return bool(
            is_own or is_seen or is_inside or not self.engine.is_on_cpu(self.arguments.tensors())
        )

    @property
    def is_compiled(self) -> bool:
        """Whether a part of the module is."""
        return any(map(_compat.is_compiled, self.engine.module.modules()))

    @property
    def is_in_place(self) -> bool:
        """Whether the model is one that `parallelize_` was called on."""
        return self.engine.pool.calls_forward

    @property
    def suggest(self) -> str:
        """What measures all numbers of shards."""
        return "SphereParallel.suggest_shards" if self.is_in_place else "suggest_shards"

    @property
    def is_measured_apart(self) -> bool:
        """Whether the call's own time is not that of a forward."""
        return self.collective or self.what != "forward"

    @property
    def most_shards(self) -> int:
        """How many this process runs of a batch that has rows for all."""
        if not self.collective:
            return self.plan.shards
        assert self.engine.ranks is not None
        return self.plan.shards // self.engine.ranks.world


@dataclass
class _Watch:
    """What is known about calls of one kind."""

    calls: int = 0
    samples: list[tuple[float, float]] = field(default_factory=list)  # of one round
    is_over: bool = False


class Adviser:
    """Compares a model's calls, which it is told of, with a forward of the whole batch.

    Forwards that train, evaluations, and `forward_backward` are each compared in three rounds of
    three calls. In all calls of a round the shards have to be slower: one that others on the
    machine have slowed down says nothing, nor does one batch that is smaller than the others.
    """

    _SAMPLES = 3
    _ROUNDS = (4, 20, 80)  # calls before a round begins; the first ones are checked closely
    _MARGIN = 1.25  # the forward passes differ by less than this: no advice
    _LONG = 0.2  # seconds of a call from which on no other way to run it is tried
    _TOO_LONG = 2.0  # ... and a forward that waits for other ranks is not measured

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watches: dict[Hashable, _Watch] = {}
        self._has_warned = False

    def watch(self, run: Callable[[], Any], call: WatchedCall) -> Any:
        """Runs a call on the spheres; some calls of a kind are then compared."""
        if self._has_warned or call.is_let_alone:
            return run()
        kind = call.what, call.engine.module.training, torch.is_grad_enabled()
        with self._lock:
            watch = self._watches.setdefault(kind, _Watch())
            watch.calls += 1
            number = watch.calls - 1
        starts = [start for start in self._ROUNDS if start <= number < start + self._SAMPLES]
        if watch.is_over or not starts:
            return run()
        begin = time.perf_counter()
        result = run()
        seconds = time.perf_counter() - begin
        place = number - starts[0]
        if place == 0:
            watch.samples.clear()
        text = None
        try:
            text = self._compare(call, watch, place, seconds)
        except Exception:  # noqa: BLE001
            watch.is_over = True  # a batch that only works in shards is no case for advice
        if place == self._SAMPLES - 1 and starts[0] == self._ROUNDS[-1]:
            watch.is_over = True
        if text is not None:
            with self._lock:
                is_first, self._has_warned = not self._has_warned, True
            if is_first:
                warnings.warn(text, UserWarning, stacklevel=users_level())
        return result

    def _compare(self, call: WatchedCall, watch: _Watch, place: int, seconds: float) -> str | None:
        """Takes one sample; after the last one of a round, what there is to say."""
        if place == 0 and _compiled.has_compiled_functions(call.engine.module):
            watch.is_over = True  # to compile them for the whole batch can take minutes
            return None
        if len(watch.samples) == place and not call.is_measured_apart:
            whole = _seconds_of_whole_batch(call, 1.5 * seconds)
            if seconds >= self._MARGIN * whole:
                watch.samples.append((seconds, whole))
        elif call.is_measured_apart and place == self._SAMPLES - 1:
            found = self._measure_apart(call, seconds)
            if found[0] >= self._MARGIN * found[1]:
                watch.samples = [found] * self._SAMPLES
        if len(watch.samples) < self._SAMPLES:
            return None
        ours, whole = sorted(watch.samples, key=lambda s: s[0] / s[1])[self._SAMPLES // 2]
        watch.samples.clear()
        return self._advice(call, ours, whole)

    def _measure_apart(self, call: WatchedCall, seconds: float) -> tuple[float, float]:
        """Seconds of a forward in shards, and as a whole, without gradients.

        `seconds` is what the call took, which was more than a forward, or had to wait for ranks.
        """
        # forward_backward is for batches whose activations do not fit: long ones are let alone.
        longest = self._LONG if call.what == "forward_backward" else self._TOO_LONG
        waits = call.collective and waits_for_others(call.engine.module)
        if seconds > longest or call.is_compiled or waits:
            return seconds, math.inf
        repeats = 1 if seconds > self._LONG else 3
        found = _time(call, [call.most_shards], repeats, workers=call.plan.workers)
        return found[call.most_shards], found[0]

    def _advice(self, call: WatchedCall, ours: float, whole: float) -> str:
        count = count_shards(call.engine, call.arguments, call.most_shards)
        at_once = min(count, call.engine.spheres.concurrency)  # more than the plan, where one pays
        is_few = at_once < torch.get_num_threads()
        shards = "1 shard" if count == 1 else f"{count} shards"
        in_shards, as_a_whole = f"in {shards}", "as a whole"
        if call.is_compiled:
            in_shards, as_a_whole = f"in {shards}, compiled,", "as a whole, uncompiled"
        rows = " of this rank's rows" if call.collective else ""
        cure = "Larger batches make shards worth it"
        if is_few:
            cure = (
                f"{at_once} at a time run{'s' if at_once == 1 else ''} with one intra-op thread "
                f"each, where plain PyTorch has {torch.get_num_threads()}: more shards=, or a "
                "larger concurrency of the spheres, make use of more cores"
            )
        return (
            f"the shards of this model are so {'few' if is_few else 'small'} that plain PyTorch "
            f"would be faster: a forward{rows} takes {ours * 1e3:.3g} ms {in_shards} and "
            f"{whole * 1e3:.3g} ms {as_a_whole}, {ours / whole:.1f}x of it"
            f"{self._faster_shards(call, count, ours, is_few)}. {cure}; {_other_way(call)}; "
            "ignore this if it is the same bits that you are here for"
        )

    def _faster_shards(self, call: WatchedCall, count: int, ours: float, is_few: bool) -> str:
        """What other numbers of shards take, or those of a compiled model without that, if less."""
        ranks = call.engine.ranks.world if call.collective and call.engine.ranks else 1
        if call.is_compiled:
            numbers = [call.most_shards]
        elif is_few:
            possible = possible_world_sizes(call.engine.spheres.leaves // ranks)
            numbers = [n for n in possible if count < n <= _MANY]
        else:
            possible = possible_world_sizes(call.engine.shards // ranks)
            numbers = [n for n in possible if n < count]
        if not numbers or ours > self._LONG:
            return ""
        trains = call.engine.module.training and call.what == "forward" and not call.is_compiled
        try:
            found = _time(call, [*numbers, call.most_shards], 2, backward=trains)
        except Exception:  # noqa: BLE001
            return ""  # (as above)
        best = min(numbers, key=lambda n: found[n])
        if call.is_compiled:
            faster = found[best] * self._MARGIN <= ours
            return f"; uncompiled shards would take {found[best] / found[0]:.1f}x" * faster
        if found[best] * self._MARGIN > found[call.most_shards]:
            return ""
        what = "forward and backward" if trains else "forward"
        here = found[call.most_shards] / found[0]
        return (
            f"; shards={best * ranks} would take {found[best] / found[0]:.1f}x for a {what}, and "
            f"these take {here:.1f}x (see {call.suggest})"
        )


def _other_way(call: WatchedCall) -> str:
    if waits_for_others(call.engine.module):
        return "torch's own batch norm does not have shards wait for each other"
    if call.collective:
        return "DistributedDataParallel runs a rank's rows as a whole"
    made_by = "parallelize_" if call.is_in_place else "SphereParallel"
    if call.what == "forward_backward":
        return (
            "loss.backward() in place of forward_backward needs more memory, and "
            f"{made_by}(..., reproducible=False) chooses the faster way for it by itself"
        )
    if torch.is_grad_enabled() and call.engine.module.training:
        return f"{made_by}(..., reproducible=False) chooses the faster way by itself"
    if call.is_in_place:
        return "model.forward.remove() has it evaluate without shards"
    return "model.module, with the same weights, evaluates without shards"


def _time(
    call: WatchedCall,
    numbers: Sequence[int],
    repeats: int,
    *,
    backward: bool = False,
    workers: int | None = None,
) -> dict[int, float]:
    """See `time_shards`; uncompiled."""
    return time_shards(
        call.engine, call.arguments, numbers,
        repeats=repeats, backward=backward, compiled=False, workers=workers,
    )  # fmt: skip


def _seconds_of_whole_batch(call: WatchedCall, patience: float) -> float:
    """The fastest of at most two forward passes, which leave no trace: no hooks, buffers, draws.

    The module is copied, but for its parameters; no other pass is tried after `patience` seconds.
    It runs uncompiled: to compile it for other rows can take minutes.
    """
    bare = bare_copy(call.engine.module, compiled=False)
    seconds: list[float] = []
    with TrialRandom().leaving_no_trace(), torch.no_grad():
        while len(seconds) < 2 and sum(seconds) <= patience:
            own = call.arguments.copied()
            begin = time.perf_counter()
            try:
                bare(*own.args, **own.kwargs)
            except Exception:
                if seconds:
                    raise
                bare = bare_copy(call.engine.module, compiled=False, hooks=True)  # it needs them
                own = call.arguments.copied()
                begin = time.perf_counter()
                bare(*own.args, **own.kwargs)
            seconds.append(time.perf_counter() - begin)
    return min(seconds)
