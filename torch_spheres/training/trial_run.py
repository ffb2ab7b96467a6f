"""Trial runs of a forward on some of a call's rows, which leave no trace; used by row_check.py.

They run on a replica, without hooks and gradients where that works; buffers and random states stay.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torch_spheres import _compat
from torch_spheres.runtime.rng import TrialRandom
from torch_spheres.training.module_copy import Buffer
from torch_spheres.training.pytree import Nesting, flatten_output
from torch_spheres.training.replica import Replica
from torch_spheres.training.sync_batch_norm import sees_all_rows

if TYPE_CHECKING:
    from torch_spheres.training.sharded_call import ShardedCall

__all__ = ["STRIDE", "RowRanges", "Run", "run_trials"]

STRIDE = 5  # shards between the two that are compared in one call and those of the next


@dataclass(frozen=True)
class RowRanges:
    """Two neighbouring ranges of rows, ``begin:middle`` and ``middle:end``."""

    begin: int
    middle: int
    end: int

    @classmethod
    def of(cls, call: ShardedCall, pair: int) -> RowRanges | None:
        """The rows of two shards, or the halves of a rank's only shard.

        None if there are no two, or if the bare module says nothing about the shards.
        """
        bounds = call.split.bounds
        if sees_all_rows(call.module):
            return None
        if len(bounds) > 1:
            k = pair % (len(bounds) - 1)
            return cls(*bounds[k], bounds[k + 1][1])
        if call.ranks is None or not bounds or bounds[0][1] - bounds[0][0] < 2:
            return None
        begin, end = bounds[0]
        return cls(begin, (begin + end) // 2, end)

    @property
    def spans(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """First and last row of both ranges together, of the first, and of the second."""
        return (self.begin, self.end), (self.begin, self.middle), (self.middle, self.end)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Numbers of rows of the three `spans`."""
        return self.end - self.begin, self.middle - self.begin, self.end - self.middle


@dataclass
class Run:
    """What a trial run returned, and what it left in buffers."""

    outputs: list[Any]
    nesting: Nesting
    changes: dict[tuple[str, str], tuple[Tensor, Tensor]]
    """By the module's type and the buffer's name: its new value, and the value before."""


def run_trials(
    call: ShardedCall,
    *,
    training: bool,
    spans: Sequence[tuple[int, int]],
    change: Mapping[str, Callable[[Any], Any]] | None = None,
) -> tuple[list[Run], bool]:
    """The forward of each of `spans`, no runs if it raises; and whether it drew random numbers.

    Args:
        call: whose module and arguments are used.
        training: whether modules that are in training mode stay in it.
        spans: first and last row of each run.
        change: functions of some keyword arguments, whose results take their place.
    """
    runs: list[Run] = []
    draws = TrialRandom()
    with draws.leaving_no_trace():
        # A forward may need autograd (forces are gradients of an energy), or its hooks.
        for grad, hooks in ((False, False), (True, False), (False, True), (True, True)):
            if runs or (grad and not torch.is_grad_enabled()):
                continue
            try:
                runs = [_run(call, training, grad, hooks, span, change or {}) for span in spans]
            except Exception:  # noqa: BLE001
                continue  # an error in the shards is raised there; others belong to this mode only
    return runs, draws.drew


def _run(
    call: ShardedCall,
    training: bool,
    grad: bool,
    hooks: bool,
    span: tuple[int, int],
    change: Mapping[str, Callable[[Any], Any]],
) -> Run:
    """Runs the forward of one range of rows on a new replica, since it may set attributes."""
    replicas = call.replicas
    replica = Replica(call.module, (), replicas.user_module(), replicas.scan.attributes)
    for part, source in zip(replica.module.modules(), call.module.modules(), strict=True):
        part.training = training and source.training
        for name in () if hooks else _compat.FORWARD_HOOKS:
            setattr(part, name, OrderedDict())
    # Compiling the module for other rows can take minutes.
    module: Any = _compat.uncompiled(replica.module)
    if replicas.calls_forward:
        module = module.forward
    values = call.split.cut(*span)
    own = [v.detach().clone() if isinstance(v, Tensor) else v for v in values]
    args, kwargs = call.split.arguments.build(own)
    kwargs.update((name, make(kwargs[name])) for name, make in change.items())
    buffers = replica.begin_shard()
    with torch.set_grad_enabled(grad):
        outputs, nesting = flatten_output(module(*args, **kwargs))
    if grad:
        outputs = [v.detach() if isinstance(v, Tensor) else v for v in outputs]
    return Run(outputs, nesting, _changes(buffers))


def _changes(buffers: Sequence[Buffer]) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    found = {}
    for buffer in buffers:
        value = buffer.changed_value()
        if value is not None and value.shape == buffer.given.shape:
            found[type(buffer.source).__name__, buffer.name] = value, buffer.given
    return found
