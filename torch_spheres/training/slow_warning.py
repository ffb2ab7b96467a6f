"""Says, once, when plain torch would be faster than a model's shards.

Twelve small shards cost twelve times what torch needs for each call. Whether that is more than the
spheres gain is measured, not guessed, once the way to run the shards has been chosen: the forward
of the whole batch is timed on a copy of the module with torch's own threads, and if it is faster,
so is the forward in fewer shards.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from torch_spheres import _compat
from torch_spheres.reduction.partition import possible_world_sizes
from torch_spheres.runtime.rng import TrialRandom, random_states, undo_draws
from torch_spheres.runtime.stack_level import users_level
from torch_spheres.training.shard_timing import bare_copy, count_shards, time_shards
from torch_spheres.training.sync_batch_norm import waits_for_others

if TYPE_CHECKING:
    from torch_spheres.training.autotune import Plan
    from torch_spheres.training.call_arguments import CallArguments
    from torch_spheres.training.engine import Engine

__all__ = ["Adviser", "WatchedCall"]


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
    def is_compiled(self) -> bool:
        """Whether a part of the module is."""
        return any(map(_compat.is_compiled, self.engine.module.modules()))

    @property
    def most_shards(self) -> int:
        """How many this process runs of a batch that has rows for all."""
        if not self.collective:
            return self.plan.shards
        assert self.engine.ranks is not None
        return self.plan.shards // self.engine.ranks.world


class Adviser:
    """Compares a model's calls, which it is told of, with a forward of the whole batch.

    Each kind of call is compared once: forwards that train, evaluations, `forward_backward`.
    """

    _SAMPLES = 3
    _MARGIN = 1.25  # the forward passes differ by less than this: no advice
    _LONG = 0.2  # seconds of a call from which on no other way to run it is tried
    _TOO_LONG = 2.0  # ... and a forward that waits for other ranks is not measured

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds: dict[Hashable, list[float]] = {}
        self._has_warned = False

    def watch(self, run: Callable[[], Any], call: WatchedCall) -> Any:
        """Runs a call on the spheres; after a few of a kind comes the comparison."""
        kind = call.what, call.engine.module.training, torch.is_grad_enabled()
        seconds = self._seconds.setdefault(kind, [])
        if self._has_warned or len(seconds) >= self._SAMPLES:
            return run()  # (several threads may have come at once)
        begin = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - begin)
        if len(seconds) == self._SAMPLES:
            self._compare(call, min(seconds))
        return result

    def _compare(self, call: WatchedCall, seconds: float) -> None:
        try:
            ours, whole = self._measure(call, seconds)
        except Exception:  # noqa: BLE001
            return  # a batch that only works in shards (memory, for one) is no case for advice
        if whole * self._MARGIN > ours:
            return
        with self._lock:
            if self._has_warned:
                return
            self._has_warned = True
        count = count_shards(call.engine, call.arguments, call.most_shards)
        shards = "1 shard" if count == 1 else f"{count} shards"
        in_shards, as_a_whole = f"in {shards}", "as a whole"
        if call.is_compiled:
            in_shards, as_a_whole = f"in {shards}, compiled,", "as a whole, uncompiled"
        rows = " of this rank's rows" if call.collective else ""
        warnings.warn(
            f"the shards of this model are so small that plain PyTorch would be faster: a forward"
            f"{rows} takes {ours * 1e3:.1f} ms {in_shards} and {whole * 1e3:.1f} ms {as_a_whole}, "
            f"{ours / whole:.1f}x of it{self._faster_shards(call, count, ours)}. Larger batches "
            f"make shards worth it; {_other_way(call)}; ignore this if it is the same bits that "
            "you are here for",
            UserWarning,
            stacklevel=users_level(),
        )

    def _measure(self, call: WatchedCall, seconds: float) -> tuple[float, float]:
        """Seconds of a forward in shards, and as a whole.

        The call itself took `seconds`. That is a forward's time if the call was no more, and had no
        other ranks to wait for. Else both are measured, without gradients.
        """
        module = call.engine.module
        if call.what == "forward" and not call.collective:
            return seconds, _seconds_of_whole_batch(module, call.arguments, 1.5 * seconds)
        # forward_backward is for batches whose activations do not fit: long ones are let alone.
        longest = self._LONG if call.what == "forward_backward" else self._TOO_LONG
        waits = call.collective and waits_for_others(module)
        if seconds > longest or call.is_compiled or waits:
            return seconds, math.inf
        repeats = 1 if seconds > self._LONG else 3
        found = _time(call, [call.most_shards], repeats, call.plan.workers)
        return found[call.most_shards], found[0]

    def _faster_shards(self, call: WatchedCall, count: int, ours: float) -> str:
        """What fewer shards take, or those of a compiled model without that, if it is less."""
        ranks = call.engine.ranks.world if call.collective and call.engine.ranks else 1
        fewer = possible_world_sizes(call.engine.shards // ranks)
        numbers = [n for n in fewer if n * ranks > 1 and n < count]
        if call.is_compiled:
            numbers = [call.most_shards]
        if not numbers or ours > self._LONG:
            return ""
        try:
            found = _time(call, numbers, 2)
        except Exception:  # noqa: BLE001
            return ""  # (as above)
        best = min(numbers, key=lambda n: found[n])
        if found[best] * self._MARGIN > ours:
            return ""
        ratio = f"would take {found[best] / found[0]:.1f}x"
        if call.is_compiled:
            return f"; uncompiled shards {ratio}"
        return f"; shards={best * ranks} {ratio} (see suggest_shards)"


def _other_way(call: WatchedCall) -> str:
    if waits_for_others(call.engine.module):
        return "torch's own batch norm does not have shards wait for each other"
    if call.collective:
        return "DistributedDataParallel runs a rank's rows as a whole"
    if call.what == "forward_backward":
        return (
            "loss.backward() in place of forward_backward needs more memory, and "
            "SphereParallel(..., reproducible=False) chooses the faster way for it by itself"
        )
    if torch.is_grad_enabled() and call.engine.module.training:
        return "SphereParallel(..., reproducible=False) chooses the faster way by itself"
    return "model.module, with the same weights, evaluates without shards"


def _time(
    call: WatchedCall, numbers: Sequence[int], repeats: int, workers: int | None = None
) -> dict[int, float]:
    """See `time_shards`, for a forward, uncompiled."""
    return time_shards(
        call.engine, call.arguments, numbers,
        repeats=repeats, backward=False, compiled=False, workers=workers,
    )  # fmt: skip


def _seconds_of_whole_batch(module: nn.Module, arguments: CallArguments, patience: float) -> float:
    """The fastest of a few forward passes that leave no trace: no hooks, buffers, random numbers.

    The module is copied, but for its parameters; no other pass is tried after `patience` seconds.
    It runs uncompiled: to compile it for other rows can take minutes.
    """
    bare = bare_copy(module, compiled=False)
    seconds: list[float] = []
    states, draws = random_states(), TrialRandom()
    try:
        with torch.no_grad():
            while len(seconds) < 3 and sum(seconds) <= patience:
                own = arguments.copied()
                begin = time.perf_counter()
                with contextlib.nullcontext() if seconds else draws.active():
                    bare(*own.args, **own.kwargs)
                seconds.append(time.perf_counter() - begin)
    finally:
        undo_draws(states, of_torch=draws.drew)
    return min(seconds)
