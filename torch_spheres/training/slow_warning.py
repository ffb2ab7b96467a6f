"""Says, once, when the bare module would be faster than its shards.

Twelve small shards cost twelve times what torch needs for each call. Whether that is more than the
spheres gain is measured, not guessed: once, when the way to run the shards has been chosen, the
forward of the whole batch is timed on a copy of the module with torch's own threads, and if it is
faster, so is the forward in fewer shards.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from torch_spheres import _compat
from torch_spheres.reduction.partition import possible_world_sizes
from torch_spheres.runtime.rng import TrialRandom, random_states, undo_draws
from torch_spheres.runtime.stack_level import users_level
from torch_spheres.training.shard_timing import bare_copy, time_shards
from torch_spheres.training.sync_batch_norm import waits_for_others

if TYPE_CHECKING:
    from torch_spheres.training.call_arguments import CallArguments
    from torch_spheres.training.engine import Engine

__all__ = ["Adviser"]


class Adviser:
    """Compares forward passes of the shards, which it is told of, with one of the whole batch."""

    _SAMPLES = 3
    _MARGIN = 1.25  # the forward passes differ by less than this: no advice
    _LONG = 0.2  # seconds of a forward from which on other numbers of shards are not tried

    def __init__(self) -> None:
        self._seconds: list[float] = []

    def watch(self, run: Callable[[], Any], engine: Engine, arguments: CallArguments) -> Any:
        """Runs a forward on the spheres; after a few of them comes the comparison."""
        if len(self._seconds) >= self._SAMPLES:  # (several threads may have come at once)
            return run()
        begin = time.perf_counter()
        result = run()
        self._seconds.append(time.perf_counter() - begin)
        if len(self._seconds) == self._SAMPLES:
            self._compare(engine, arguments)
        return result

    def _compare(self, engine: Engine, arguments: CallArguments) -> None:
        module = engine.module
        if any(map(_compat.is_compiled, module.modules())):
            return  # it would be compiled for the whole batch, which can take minutes
        ours = min(self._seconds)
        try:
            whole = _seconds_of_whole_batch(module, arguments, 1.5 * ours)
        except Exception:  # noqa: BLE001
            return  # a batch that only works in shards (memory, for one) is no case for advice
        if whole * self._MARGIN > ours:
            return
        other_way = (
            "torch's own batch norm does not have shards wait for each other"
            if waits_for_others(module)
            else "SphereParallel(..., reproducible=False) chooses the faster way by itself"
        )
        warnings.warn(
            f"the shards of this model are so small that plain PyTorch would be faster: a forward "
            f"takes {ours * 1e3:.1f} ms in {engine.shards} shards and {whole * 1e3:.1f} ms as a "
            f"whole, {ours / whole:.1f}x of it{self._fewer(engine, arguments, ours)}. Larger "
            f"batches make shards worth it; {other_way}; ignore this if it is the same bits that "
            "you are here for",
            UserWarning,
            stacklevel=users_level(),
        )

    def _fewer(self, engine: Engine, arguments: CallArguments, ours: float) -> str:
        """What fewer shards would take, if that is less."""
        fewer = [n for n in possible_world_sizes(engine.shards) if 1 < n < engine.shards]
        if not fewer or ours > self._LONG:
            return ""
        try:
            found = time_shards(engine, arguments, fewer, repeats=2, backward=False)
        except Exception:  # noqa: BLE001
            return ""  # (as above)
        best = min(fewer, key=lambda n: found[n])
        if found[best] * self._MARGIN > ours:
            return ""
        return f"; shards={best} would take {found[best] / found[0]:.1f}x (see suggest_shards)"


def _seconds_of_whole_batch(module: nn.Module, arguments: CallArguments, patience: float) -> float:
    """The fastest of a few forward passes that leave no trace: no hooks, buffers, random numbers.

    The module is copied, but for its parameters; no other pass is tried after `patience` seconds.
    """
    bare = bare_copy(module)
    seconds: list[float] = []
    states, draws = random_states(), TrialRandom()
    try:
        with torch.no_grad():
            while len(seconds) < 3 and sum(seconds) <= patience:
                begin = time.perf_counter()
                with contextlib.nullcontext() if seconds else draws.active():
                    bare(*arguments.args, **arguments.kwargs)
                seconds.append(time.perf_counter() - begin)
    finally:
        undo_draws(states, of_torch=draws.drew)
    return min(seconds)
