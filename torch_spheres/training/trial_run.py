"""Runs of a forward that leave no trace: to see what it makes of other rows.

On a copy of the module, without hooks; buffers and random numbers stay as they were.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torch_spheres import _compat
from torch_spheres.runtime.rng import TrialRandom, random_states, restore_random_states
from torch_spheres.training.pytree import Nesting, flatten_output
from torch_spheres.training.replica import Buffer, Replica

if TYPE_CHECKING:
    from torch_spheres.training.sharded_call import ShardedCall

__all__ = ["Run", "equal_states", "runs_without_trace"]


@dataclass
class Run:
    """A forward that was tried: what it returned, and what it left in buffers."""

    outputs: list[Any]
    nesting: Nesting
    changes: dict[tuple[str, str], tuple[Tensor, Tensor]]  # by type and name; and what was there


def runs_without_trace(
    call: ShardedCall,
    *,
    training: bool,
    spans: Sequence[tuple[int, int]],
    change: Mapping[str, Callable[[Any], Any]] | None = None,
) -> tuple[list[Run], bool]:
    """The forward of each range of rows; and whether it drew random numbers."""
    draws, before = TrialRandom(), random_states()
    try:
        # A forward may use autograd itself, as forces are computed from an energy; or need what its
        # hooks bring.
        runs: list[Run] = []
        for grad, hooks in ((False, False), (True, False), (False, True), (True, True)):
            if not runs and (torch.is_grad_enabled() or not grad):
                runs = _runs(call, draws, training, grad, hooks, spans, change or {})
    finally:
        drew = draws.drew or not equal_states(before, random_states())
        restore_random_states(before)
    return runs, drew


def _runs(
    call: ShardedCall,
    draws: TrialRandom,
    training: bool,
    grad: bool,
    hooks: bool,
    ranges: Sequence[tuple[int, int]],
    change: Mapping[str, Callable[[Any], Any]],
) -> list[Run]:
    """The forward of each range of rows, without a trace; nothing if it cannot run so.

    `change`: what to make of some keyword arguments.
    """
    found: list[Run] = []
    try:
        for first, last in ranges:
            # A new one: what the last one's forward set is gone.
            replica = Replica(call.module, (), call.replicas.known_as(), call.replicas.attributes)
            for part, source in zip(replica.module.modules(), call.module.modules(), strict=True):
                part.training = training and source.training
                for name in () if hooks else _compat.FORWARD_HOOKS:
                    setattr(part, name, OrderedDict())
            # (To compile it for other rows can take minutes.)
            module: Any = _compat.uncompiled(replica.module)
            if call.replicas.calls_forward:
                module = module.forward
            values = call.split.cut(first, last)
            own = [v.detach().clone() if isinstance(v, Tensor) else v for v in values]
            args, kwargs = call.arguments(own)
            kwargs.update((name, make(kwargs[name])) for name, make in change.items())
            buffers = replica.begin_shard()
            with torch.set_grad_enabled(grad), draws.active():
                outputs, nesting = flatten_output(module(*args, **kwargs))
            if grad:
                outputs = [v.detach() if isinstance(v, Tensor) else v for v in outputs]
            found.append(Run(outputs, nesting, _changes(buffers)))
    except Exception:  # noqa: BLE001
        return []  # whatever is wrong shows in the shards, or is wrong in this mode alone
    return found


def _changes(buffers: Sequence[Buffer]) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    found = {}
    for buffer in buffers:
        value = buffer.changed_value()
        if value is not None and value.shape == buffer.given.shape:
            found[type(buffer.source).__name__, buffer.name] = value, buffer.given
    return found


def equal_states(before: Any, after: Any) -> bool:
    """Whether two of `random_states` are the same."""
    return torch.equal(before["torch"], after["torch"]) and all(
        before[name] == after[name] for name in ("python", "numpy")
    )
