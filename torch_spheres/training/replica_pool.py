"""`ReplicaPool`: the idle replicas of a module, and what earlier calls have shown about it.

Each model's engine has one; `ShardedCall` refreshes it before the shards run.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor, nn

from torch_spheres.training.module_scan import ModuleScan
from torch_spheres.training.replica import Replica
from torch_spheres.training.step_checks import StepChecks

__all__ = ["ReplicaPool"]

_CLOSE_CALLS = 3  # first calls of a kind that are checked closely; later ones if a power of two


class ReplicaPool:
    """The replicas that are not in use, at most one for each shard that runs at once.   Any thread.

    Attributes:
        user_module: returns the object that the user calls, where that is not the module.
        calls_forward: whether shards call ``forward()``, since hooks have run for the whole batch.
        checks_closely: whether some calls are; not those that are only measured.
        layouts: of gradients, in the messages to other processes.
        checks: of what must be the same on all ranks.
        written: large buffers that a forward writes to: id of the module, name.
        reported: names that the user was warned of, see forward_effects.py.
        drawn_from: generators that are not torch's, from which shards are known to draw.
        parts: the module's ``modules()``.
        parameters: the module's ``parameters()``.
        scan: what the module's attributes hold.
        watched: other tensors that a forward can reach, and how, see shared_writes.py.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[Replica] = []
        self._structure: list[Any] = []
        self._version = 0
        self._calls: dict[Hashable, int] = {}
        self._unregistered_leaves: list[weakref.ref[Tensor]] = []
        self.user_module: Callable[[], nn.Module | None] = lambda: None
        self.calls_forward = False
        self.checks_closely = True
        self.layouts: dict[str, Any] = {}
        self.checks: StepChecks | None = None
        self.written: set[tuple[int, str]] = set()
        self.reported: set[str] = set()
        self.drawn_from: set[str] = set()
        self.parts: list[nn.Module] = []
        self.parameters: list[nn.Parameter] = []
        self.scan = ModuleScan([], [], None)
        self.watched: list[tuple[str, weakref.ref[Tensor]]] = []

    def refresh(self, module: nn.Module) -> None:
        """Inspects the module before shards run, and drops replicas that no longer fit it."""
        with self._lock:
            self.parts, self.parameters = [*module.modules()], [*module.parameters()]
            before = self.scan
            self.scan = ModuleScan(self.parts, self.parameters, self.user_module(), before)
            if [*map(id, self.scan.callables)] != [*map(id, before.callables)]:
                self._calls.clear()  # new functions may reach new tensors
            structure = [_structure(part) for part in self.parts]
            structure.append([id(t) for t in self.scan.leaves])
            if structure != self._structure:
                self._idle.clear()
                self._structure = structure
            self._idle = [replica for replica in self._idle if replica.sync()]
            self._version += 1

    def modes(self) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
        """Which modules are in training mode, and which parameters require a gradient."""
        training = tuple(part.training for part in self.parts)
        return training, tuple(p.requires_grad for p in self.parameters)

    def call_number(self, kind: Hashable) -> tuple[int, bool]:
        """The number of a call among those of its kind, and whether it is checked closely."""
        with self._lock:
            number = self._calls.get(kind, 0) + 1
        is_due = number <= _CLOSE_CALLS or number & (number - 1) == 0
        return number, is_due and self.checks_closely

    def count(self, kind: Hashable) -> None:
        """Counts a call of the kind that has raised nothing."""
        with self._lock:
            self._calls[kind] = self._calls.get(kind, 0) + 1

    def add_unregistered(self, leaves: list[Tensor]) -> None:
        """Remembers leaves that the forward reaches past the replicas."""
        with self._lock:
            known = {id(leaf()) for leaf in self._unregistered_leaves}
            self._unregistered_leaves += [
                weakref.ref(leaf) for leaf in leaves if id(leaf) not in known
            ]

    def unregistered_leaves(self) -> list[Tensor]:
        """Leaves with a gradient that are no replica's: found in graphs, or in other modules."""
        with self._lock:
            found = [leaf() for leaf in self._unregistered_leaves]
            self._unregistered_leaves = [
                r
                for r, leaf in zip(self._unregistered_leaves, found, strict=True)
                if leaf is not None
            ]
        held = [p for module in self.scan.unregistered_modules for p in module.parameters()]
        leaves = {id(t): t for t in (*found, *held) if t is not None and t.requires_grad}
        return [*leaves.values()]

    def borrow(self, module: nn.Module) -> Replica:
        """A replica with the current attributes, for the calling thread until `give_back`."""
        with self._lock:
            replica = self._idle.pop() if self._idle else None
            scan, version = self.scan, self._version
        if replica is None:
            replica = Replica(module, scan.leaves, self.user_module(), scan.attributes)
        elif replica.version != version:
            replica.rebind(scan.attributes)
        replica.version = version
        return replica

    def give_back(self, replica: Replica) -> None:
        """Ends a `borrow`."""
        with self._lock:
            self._idle.append(replica)

    def __len__(self) -> int:
        return len(self._idle)


def _structure(module: nn.Module) -> list[Any]:
    """What a replica is made from: it fits while this is the same.

    Ids are unique, since the replicas keep the objects alive.
    """
    parts, parameters = module._modules, module._parameters
    return [
        id(module), type(module), id(module._compiled_call_impl),
        *parts, *map(id, parts.values()), *parameters, *map(id, parameters.values()),
    ]  # fmt: skip
