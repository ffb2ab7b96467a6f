"""`ForwardEffects`: what a forward changes beside its outputs, as `ShardedCall` reports it.

Writes to tensors that the shards share are errors, see shared_writes.py. An attribute that a
forward sets is set on a replica and lost: that is a warning, once for each name.
"""

from __future__ import annotations

import itertools
import operator
import warnings
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from torch_spheres.runtime.object_graph import walk
from torch_spheres.runtime.random_states import random_states
from torch_spheres.runtime.rebinding import MUTABLE
from torch_spheres.runtime.stack_level import users_level
from torch_spheres.training.change_detection import FUNCTIONS, PLAIN, content_of
from torch_spheres.training.module_scan import SKIPPED_ATTRIBUTES
from torch_spheres.training.replica import Replica
from torch_spheres.training.replica_pool import ReplicaPool
from torch_spheres.training.shard import Shard
from torch_spheres.training.shared_writes import SharedWrites
from torch_spheres.training.split_options import argument_name

__all__ = ["ForwardEffects"]

_MAX_CONTAINERS = 30  # that functions hold and that are compared
_MAX_OBJECTS = 30  # in one of them


class ForwardEffects:
    """Compares a module before the shards' forward with what it is afterwards.

    Args:
        module: the user's.
        pool: has inspected the module's attributes.
        closely: whether values are compared too, not only versions.
        again: whether this is not the first such call, which may fill caches.
    """

    def __init__(self, module: nn.Module, pool: ReplicaPool, closely: bool, *, again: bool) -> None:
        self._module, self._pool = module, pool
        self._closely, self._again = closely, again
        self._set: dict[str, None] = {}  # names of attributes, in order
        self._changed_arguments: dict[str, None] = {}
        self._writes = SharedWrites(module, pool, closely)
        self._containers = self._find_containers() if closely and again else []
        self._contents = self._read_contents() if closely and again else {}
        self._attributes = [dict(vars(part)) for part in pool.parts] if closely else []
        self._random = random_states() if closely else {}

    def _find_containers(self) -> list[tuple[str, Any, list[Tensor]]]:
        """Containers that functions hold, and the tensors in them; numbers may be counters."""
        held = (
            (path, value)
            for path, value in walk(self._writes.functions, self._writes.known, by_name=True)
            if isinstance(value, MUTABLE) or _is_plain_object(value)
        )
        first = itertools.islice(held, _MAX_CONTAINERS)
        return [(path, value, _tensors_in(value)) for path, value in first]

    def _read_contents(self) -> dict[str, tuple[Any, Any]]:
        """By path, the objects on attributes that may change in place, and what is in them."""
        found: dict[str, tuple[Any, Any]] = {}
        seen: set[int] = set()
        for i, part in enumerate(self._pool.parts):
            for name, value in vars(part).items():
                is_skipped = name in SKIPPED_ATTRIBUTES or type(value) in PLAIN
                if not is_skipped and id(value) not in seen:
                    seen.add(id(value))
                    content = content_of(value)
                    if content is not None:
                        found[self._writes.path(i, name)] = value, content
        return found

    # ---- after a shard's forward ----

    def record_attributes(self, replica: Replica) -> None:
        """Records the attributes that the forward has set on its replica."""
        for i, name in replica.changes():
            self._set[self._writes.path(i, name)] = None

    def compare_arguments(self, before: Iterable[tuple[int | str, Any, Any]]) -> None:
        """Records which arguments differ from `before`, as `contents` returned it."""
        for key, value, content in before:
            if content_of(value) != content:
                self._changed_arguments[argument_name(self._module, key)] = None

    # ---- after all shards' forward ----

    def check(self, shards: Sequence[Shard]) -> None:
        """Checks what the shards share; see `SharedWrites.check` for what it raises."""
        if self._closely and not self._again:
            # The comparison with the bare module may follow, and would show as a change.
            self._contents = self._read_contents()
        self._writes.check({id(shard.replica): shard.replica for shard in shards}.values())

    def warn(self) -> None:
        """Warns of attributes and arguments that were changed, once for each name; and of draws."""
        self._warn_of_arguments()
        self._warn_of_draws()
        # A function that holds the original module sets attributes on the original.
        for i, (part, before) in enumerate(zip(self._pool.parts, self._attributes, strict=False)):
            now = vars(part)
            for name in {**before, **now}:
                if name not in SKIPPED_ATTRIBUTES and now.get(name) is not before.get(name):
                    self._set[self._writes.path(i, name)] = None
        new = [name for name in self._set if name not in self._pool.reported]
        for path, (value, before) in self._contents.items():
            reported = path in self._pool.reported or path in new
            if not reported and content_of(value) != before:
                new.append(path)
        for path, value, tensors in self._containers:
            found = _tensors_in(value)
            same = len(found) == len(tensors) and all(map(operator.is_, found, tensors))
            if not same and path not in self._pool.reported:
                new.append(path)
        if not new:
            return
        self._pool.reported.update(new)
        warnings.warn(
            "the module's forward changes attributes of the module, or objects that it shares with "
            f"others: {', '.join(new)}. Each shard begins with the module's own attributes, and "
            "what it sets on them is lost; objects that it changes in place are changed by all "
            "shards, in no fixed order. Return what the loop needs from forward, or make it a "
            "buffer, which is merged over the shards",
            UserWarning,
            stacklevel=users_level(),
        )

    def _warn_of_draws(self) -> None:
        if not self._random:
            return
        now = random_states()
        moved = [name for name in ("python", "numpy") if now[name] != self._random[name]]
        moved = [name for name in moved if name not in self._pool.drawn_from]
        if moved:
            self._pool.drawn_from.update(moved)
            source = {"python": "Python's random", "numpy": "numpy.random"}
            warnings.warn(
                f"{' and '.join(source[name] for name in moved)} drew, or was seeded, while the "
                "shards ran: each shard draws for itself, in the order in which threads come by, "
                "so that a run does not repeat, and plain PyTorch draws once for the whole batch. "
                "Draw with torch's operators, whose numbers belong to shards, or draw in the loop "
                "and pass what was drawn (if another thread drew, nothing is the matter)",
                UserWarning,
                stacklevel=users_level(),
            )

    def _warn_of_arguments(self) -> None:
        reported = self._pool.reported
        new = [n for n in self._changed_arguments if f"argument {n}" not in reported]
        if new:
            reported.update(f"argument {n}" for n in new)
            warnings.warn(
                f"the module's forward changes its arguments {new}: lists, dicts and dataclasses "
                "are each shard's own, and the caller's stay as they were; other objects are "
                "changed by all shards, in no fixed order. Return what the loop needs from forward",
                UserWarning,
                stacklevel=users_level(),
            )


def _is_plain_object(value: Any) -> bool:
    """Whether a value is of the user's own class, as the owner of a hook is."""
    known = isinstance(value, (nn.Module, Tensor, type, ModuleType, *FUNCTIONS))
    return not known and hasattr(value, "__dict__") and not callable(value)


def _tensors_in(value: Any) -> list[Tensor]:
    return [v for _, v in walk([("", value)], most=_MAX_OBJECTS) if isinstance(v, Tensor)]
