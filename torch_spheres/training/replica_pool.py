"""The replicas of a module that are not in use, and what has been found out about the module."""

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
"""Attributes that replicas have their own of, or that no forward looks at."""
_FIRST = 3  # calls of a kind that are watched closely; later ones only if their number is 2^k
_MANY = 256  # elements of a container that is not looked through at every call


class ReplicaPool:
    """The replicas that are not in use, at most one for each shard that runs at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[Replica] = []
        self._form: list[Any] = []
        self._refreshes = 0
        self._calls: dict[Hashable, int] = {}
        self._callables: list[Any] = []  # on attributes: new ones may reach new tensors
        self._large: dict[tuple[int, str], tuple[Any, int]] = {}  # containers without parts
        self._found: list[weakref.ref[Tensor]] = []
        self.user_module: Callable[[], nn.Module | None] = lambda: None
        """The object that the user has for the module, where that is another one."""
        self.calls_forward = False
        """Whether shards call forward() itself: what is around it has run once by then."""
        self.layouts: dict[str, Any] = {}  # of gradients on their way to other processes
        self.checks: StepChecks | None = None  # of what must be the same in other processes
        self.written: set[tuple[int, str]] = set()  # large buffers: id of the module, name
        self.reported: set[str] = set()  # attributes that a forward sets, see forward_effects.py
        self.parts: list[nn.Module] = []
        """The module's, as ``modules()`` lists them."""
        self.parameters: list[nn.Parameter] = []
        self.attributes: list[list[str]] = []
        """Of each module: those that hold parts of it, and are the replica's own."""
        self.flags: tuple[Any, ...] = ()
        """Texts, enumerations and what is true or false on attributes: they may be ways to run."""
        self.attribute_leaves: list[Tensor] = []
        """On attributes, with a gradient, and no parameters: replicas have leaves for them."""
        self.plain_tensors: list[tuple[int, str, Tensor]] = []
        """Tensors on attributes without a gradient: number of the module, name, tensor."""
        self.watched: list[tuple[str, weakref.ref[Tensor]]] = []
        """Other tensors that a forward can reach: how, and which; see forward_effects.py."""
        self.unregistered_modules: list[nn.Module] = []
        """Modules on attributes that are registered nowhere."""

    def refresh(self, module: nn.Module) -> None:
        """To be called before shards are run: drops replicas that the module has outgrown."""
        parts = [*module.modules()]
        with self._lock:
            self.parts, self.parameters = parts, [*module.parameters()]
            self._look_at_attributes(parts)
            form = [_form(part) for part in parts]
            form.append([id(t) for t in self.attribute_leaves])
            if form != self._form:
                self._idle.clear()
                self._form = form
            self._idle = [replica for replica in self._idle if replica.sync()]
            self._refreshes += 1

    def _look_at_attributes(self, parts: list[nn.Module]) -> None:
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
                for held in self._held(i, name, value):
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

    def _held(self, i: int, name: str, value: Any) -> Iterable[Any]:
        """What an attribute holds; a large container without anything is not looked at again."""
        size = len(value) if type(value) in _SIZED else 0
        if size < _MANY:
            simple = type(value) in (list, tuple) and _PLAIN.issuperset(map(type, value))
            return () if simple else held_by(value)
        seen, length = self._large.get((i, name), (None, -1))
        if seen is value and length == size:
            return ()
        found = [*held_by(value)]
        if not found:
            self._large[i, name] = value, size
        return found

    def modes(self) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
        """Which modules are in training mode, and which parameters require a gradient."""
        training = tuple(part.training for part in self.parts)
        return training, tuple(p.requires_grad for p in self.parameters)

    def call_number(self, kind: Hashable) -> tuple[int, bool]:
        """The number of a call among those of its kind, and whether it is to be watched closely."""
        with self._lock:
            number = self._calls.get(kind, 0) + 1
        return number, number <= _FIRST or number & (number - 1) == 0

    def count(self, kind: Hashable) -> None:
        """A call of the kind has been made, and raised nothing."""
        with self._lock:
            self._calls[kind] = self._calls.get(kind, 0) + 1

    def add_unregistered(self, leaves: list[Tensor]) -> None:
        """Leaves that the forward reaches past the replicas."""
        with self._lock:
            known = {id(leaf()) for leaf in self._found}
            self._found += [weakref.ref(leaf) for leaf in leaves if id(leaf) not in known]

    def unregistered_leaves(self) -> list[Tensor]:
        """Leaves with a gradient that are no replica's: found in graphs, or in strange modules."""
        with self._lock:
            found = [leaf() for leaf in self._found]
            self._found = [
                r for r, leaf in zip(self._found, found, strict=True) if leaf is not None
            ]
        held = [p for module in self.unregistered_modules for p in module.parameters()]
        leaves = {id(t): t for t in (*found, *held) if t is not None and t.requires_grad}
        return [*leaves.values()]

    def borrow(self, module: nn.Module) -> Replica:
        """One for the calling thread alone, until `give_back`."""
        with self._lock:
            replica = self._idle.pop() if self._idle else None
            attributes, number = self.attributes, self._refreshes
        if replica is None:
            replica = Replica(module, self.attribute_leaves, self.user_module(), attributes)
        elif replica.bound != number:
            replica.rebind(attributes)
        replica.bound = number
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


def _form(module: nn.Module) -> list[Any]:
    """What a replica is made after: while it is the same, the replica holds.

    By id: replicas keep the objects alive.
    """
    parts, parameters = module._modules, module._parameters
    return [
        id(module), type(module), id(module._compiled_call_impl),
        *parts, *map(id, parts.values()), *parameters, *map(id, parameters.values()),
    ]  # fmt: skip
