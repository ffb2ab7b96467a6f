"""`ReplicaPool`: the idle replicas of a module, and what earlier calls have shown about it.

Each model's engine has one; `ShardedCall` refreshes it before the shards run.
"""

from __future__ import annotations

import enum
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable
from typing import Any

from torch import Tensor, nn

from torch_spheres import _compat
from torch_spheres.runtime.rebinding import held_by
from torch_spheres.training.replica import Replica
from torch_spheres.training.step_checks import StepChecks

__all__ = ["SKIPPED_ATTRIBUTES", "ReplicaPool"]

SKIPPED_ATTRIBUTES = frozenset((
    *_compat.FORWARD_HOOKS, *_compat.OTHER_HOOKS, "_parameters", "_buffers", "_modules",
    "_compiled_call_impl",
))  # fmt: skip
"""Attributes that each replica has its own of, or that no forward reads."""
_CLOSE_CALLS = 3  # first calls of a kind that are checked closely; later ones if a power of two
_LARGE = 256  # elements of a container that is not searched at every call


class ReplicaPool:
    """The replicas that are not in use, at most one for each shard that runs at once.   Any thread.

    Attributes:
        user_module: returns the object that the user calls, where that is not the module.
        calls_forward: whether shards call ``forward()``, since hooks have run for the whole batch.
        layouts: of gradients, in the messages to other processes.
        checks: of what must be the same on all ranks.
        written: large buffers that a forward writes to: id of the module, name.
        reported: names that the user was warned of, see forward_effects.py.
        parts: the module's ``modules()``.
        parameters: the module's ``parameters()``.
        attributes: for each of `parts`, names of attributes that hold parts of the module, and are
            the replica's own.
        flags: strings, enumerations and booleans on attributes, which may choose what a forward
            computes.
        attribute_leaves: tensors on attributes that require a gradient and are no parameters.
        plain_tensors: tensors on attributes without a gradient: number of the module, name, tensor.
        watched: other tensors that a forward can reach, and how, see shared_writes.py.
        unregistered_modules: modules on attributes that are no parts of the module.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[Replica] = []
        self._structure: list[Any] = []
        self._version = 0
        self._calls: dict[Hashable, int] = {}
        self._callables: list[Any] = []  # on attributes; new ones may reach new tensors
        self._without_tensors: dict[tuple[int, str], tuple[Any, int]] = {}  # large containers
        self._unregistered_leaves: list[weakref.ref[Tensor]] = []
        self.user_module: Callable[[], nn.Module | None] = lambda: None
        self.calls_forward = False
        self.layouts: dict[str, Any] = {}
        self.checks: StepChecks | None = None
        self.written: set[tuple[int, str]] = set()
        self.reported: set[str] = set()
        self.parts: list[nn.Module] = []
        self.parameters: list[nn.Parameter] = []
        self.attributes: list[list[str]] = []
        self.flags: tuple[Any, ...] = ()
        self.attribute_leaves: list[Tensor] = []
        self.plain_tensors: list[tuple[int, str, Tensor]] = []
        self.watched: list[tuple[str, weakref.ref[Tensor]]] = []
        self.unregistered_modules: list[nn.Module] = []

    def refresh(self, module: nn.Module) -> None:
        """Inspects the module before shards run, and drops replicas that no longer fit it."""
        parts = [*module.modules()]
        with self._lock:
            self.parts, self.parameters = parts, [*module.parameters()]
            self._inspect_attributes(parts)
            structure = [_structure(part) for part in parts]
            structure.append([id(t) for t in self.attribute_leaves])
            if structure != self._structure:
                self._idle.clear()
                self._structure = structure
            self._idle = [replica for replica in self._idle if replica.sync()]
            self._version += 1

    def _inspect_attributes(self, parts: list[nn.Module]) -> None:
        known = {id(part) for part in (*parts, self.user_module())}
        parameters = {id(p) for p in self.parameters}
        self.attributes, self.plain_tensors = [[] for _ in parts], []
        outside: dict[int, Tensor] = {}
        unregistered_modules: dict[int, nn.Module] = {}
        callables: list[Any] = []
        flags: list[Any] = []
        for i, part in enumerate(parts):
            for name, value in vars(part).items():
                if type(value) in _PLAIN or name in SKIPPED_ATTRIBUTES:
                    if type(value) in _FLAGS and name != "training":
                        flags.append(value)
                    continue
                if isinstance(value, enum.Enum):
                    flags.append(value)
                    continue
                if callable(value):
                    callables.append(value)
                for held in self._tensors_and_modules(i, name, value):
                    if id(held) in known or id(held) in parameters:
                        self.attributes[i].append(name)
                    elif isinstance(held, nn.Module):
                        unregistered_modules[id(held)] = held
                    elif held.requires_grad:
                        self.attributes[i].append(name)
                        outside[id(held)] = held
                    else:
                        self.plain_tensors.append((i, name, held))
        self.flags = tuple(flags)
        self.attribute_leaves, self.unregistered_modules = (
            [*outside.values()],
            [*unregistered_modules.values()],
        )
        if [*map(id, callables)] != [*map(id, self._callables)]:
            self._callables = callables
            self._calls.clear()

    def _tensors_and_modules(self, i: int, name: str, value: Any) -> Iterable[Any]:
        """Tensors and modules in an attribute; a large container without any is searched once."""
        size = len(value) if type(value) in _SIZED else 0
        if size < _LARGE:
            simple = type(value) in (list, tuple) and _PLAIN.issuperset(map(type, value))
            return () if simple else held_by(value)
        seen, length = self._without_tensors.get((i, name), (None, -1))
        if seen is value and length == size:
            return ()
        found = [*held_by(value)]
        if not found:
            self._without_tensors[i, name] = value, size
        return found

    def modes(self) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
        """Which modules are in training mode, and which parameters require a gradient."""
        training = tuple(part.training for part in self.parts)
        return training, tuple(p.requires_grad for p in self.parameters)

    def call_number(self, kind: Hashable) -> tuple[int, bool]:
        """The number of a call among those of its kind, and whether it is checked closely."""
        with self._lock:
            number = self._calls.get(kind, 0) + 1
        return number, number <= _CLOSE_CALLS or number & (number - 1) == 0

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
        held = [p for module in self.unregistered_modules for p in module.parameters()]
        leaves = {id(t): t for t in (*found, *held) if t is not None and t.requires_grad}
        return [*leaves.values()]

    def borrow(self, module: nn.Module) -> Replica:
        """A replica with the current attributes, for the calling thread until `give_back`."""
        with self._lock:
            replica = self._idle.pop() if self._idle else None
            attributes, number = self.attributes, self._version
        if replica is None:
            replica = Replica(module, self.attribute_leaves, self.user_module(), attributes)
        elif replica.version != number:
            replica.rebind(attributes)
        replica.version = number
        return replica

    def give_back(self, replica: Replica) -> None:
        """Ends a `borrow`."""
        with self._lock:
            self._idle.append(replica)

    def __len__(self) -> int:
        return len(self._idle)


_PLAIN = frozenset((type(None), bool, int, float, str))
_FLAGS = frozenset((bool, str))
_SIZED = frozenset((list, tuple, dict, set))


def _structure(module: nn.Module) -> list[Any]:
    """What a replica is made from: it fits while this is the same.

    Ids are unique, since the replicas keep the objects alive.
    """
    parts, parameters = module._modules, module._parameters
    return [
        id(module), type(module), id(module._compiled_call_impl),
        *parts, *map(id, parts.values()), *parameters, *map(id, parameters.values()),
    ]  # fmt: skip
