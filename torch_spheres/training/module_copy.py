"""`ModuleCopy`: the copy of one module in a `Replica`, with its own registries and buffers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import is_
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from torch_spheres import _compat
from torch_spheres.runtime.rebinding import MUTABLE, mapping_values, rebound

__all__ = ["Buffer", "ModuleCopy"]

_CONTAINERS = ("_parameters", "_modules", "_non_persistent_buffers_set", *_compat.FORWARD_HOOKS)
"""Dicts and sets of each module into which a forward may put something."""


@dataclass
class Buffer:
    """A shard's value of one of the module's buffers.

    Attributes:
        source: the module that has the buffer.
        copied: its copy.
        name: of the buffer.
        given: the original, which nobody writes to while shards run.
        mine: the shard's at the beginning of its forward.
        is_own: whether `mine` is a copy.
    """

    source: nn.Module
    copied: nn.Module
    name: str
    given: Tensor
    mine: Tensor
    is_own: bool

    def changed_value(self) -> Tensor | None:
        """The value that the shard has left in the buffer; None if it has not changed it."""
        now = self.copied._buffers.get(self.name)
        if now is self.mine and not self.is_own:
            return None  # SharedWrites detects writes to the module's own
        if now is None or now.shape != self.given.shape:
            return now
        # Values are compared, since batch_norm writes statistics without raising the version.
        return None if torch.equal(now, self.given) else now.detach()


class ModuleCopy:
    """One module of the tree, `source`, and its copy, `copied`.

    Attributes:
        buffers: the copy's.
        own: attributes that are the copy's own at all times.
        containers: by attribute, what a container of the copy's own held when it was made.
        held: views of the values of the copy's attributes and registries.
        sized: dicts of the copy that a forward may add to.
        slots: names of attributes in ``__slots__``.
    """

    def __init__(self, source: nn.Module) -> None:
        self.source = source
        self.copied: nn.Module = object.__new__(type(source))
        self.buffers: dict[str, Tensor | None] = {}
        self.own: dict[str, Any] = {"_parameters": {}, "_buffers": self.buffers, "_modules": {}}
        self._entries: dict[str, dict[str, Any]] = {}  # of the registries
        self._given: dict[str, Any] = {}  # the attributes that the copy was bound to
        self._replacements: dict[int, Any] = {}
        self.containers: dict[str, Any] = {}
        self.held: list[Any] = []
        self.sized: list[Any] = []
        self._sizes: list[int] = []  # of the last of those, when they were made
        self._has_hooks = True
        self.slots = [name for kind in type(source).__mro__ for name in _slots(kind)]

    def connect(self, replacements: dict[int, Any]) -> None:
        """Fills the registries with the replica's parameters and parts."""
        for registry in ("_parameters", "_modules"):
            held = vars(self.source)[registry].items()
            self._entries[registry] = {n: replacements.get(id(v), v) for n, v in held}
            self.own[registry].update(self._entries[registry])

    def rebind(self, names: Iterable[str], replacements: dict[int, Any], hooks: bool) -> None:
        """Gives the copy the source's attributes, with parts of the module replaced in `names`."""
        source = vars(self.source)
        self._given = {**source, **self.own}
        self._replacements = replacements
        self.containers = {}
        for name in names:
            if name not in self.own and name not in _CONTAINERS and name in source:
                new = self._given[name] = rebound(source[name], replacements)
                if new is not source[name] and isinstance(new, MUTABLE):
                    self.containers[name] = _content(new)
        self._has_hooks = hooks
        self.restore()

    def source_dicts(self) -> list[dict[Any, Any]]:
        """The dicts of the source from which the copy is made."""
        source = vars(self.source)
        return [source, *(source[name] for name in _compat.FORWARD_HOOKS)]

    def _renew_containers(self) -> None:
        """Gives the copy new hook dicts: a hook that a forward adds must not reach the source."""
        for name in _compat.FORWARD_HOOKS:
            mine: OrderedDict[int, Any] = OrderedDict()
            if self._has_hooks:
                for key, hook in vars(self.source)[name].items():
                    mine[key] = rebound(hook, self._replacements)
            self._given[name] = mine
        name = "_non_persistent_buffers_set"
        self._given[name] = vars(self.source)[name].copy()

    def changed_containers(self) -> list[str]:
        """Names of the `containers` that the forward has changed in place."""
        return [
            name
            for name, before in self.containers.items()
            if not all(map(_same, _content(self._given[name]), before))
        ]

    def lost_buffers(self) -> list[str]:
        """Names of buffers that the forward has added, or set to None."""
        source = self.source._buffers
        return [n for n, v in self.buffers.items() if v is None and source.get(n) is not None] + (
            [] if len(self.buffers) == len(source) else [n for n in self.buffers if n not in source]
        )

    def restore(self) -> None:
        """Gives the copy the attributes that it was bound to."""
        for registry, held in self._entries.items():
            self.own[registry].clear()
            self.own[registry].update(held)
        for name in self.changed_containers():
            new = self._given[name] = rebound(vars(self.source)[name], self._replacements)
            self.containers[name] = _content(new)
        self._renew_containers()
        # In one step, since a checkpoint may compute with the replica in another thread.
        attributes = self._given.copy()
        object.__setattr__(self.copied, "__dict__", attributes)
        mutable = [self._given[name] for name in _CONTAINERS]
        self._sizes = [*map(len, mutable)]
        self.sized = [attributes, *mutable]
        self.held = [d.values() for d in (attributes, *(self.own[name] for name in self._entries))]
        for name in self.slots:
            if hasattr(self.source, name):
                object.__setattr__(self.copied, name, getattr(self.source, name))

    def copy_buffers(
        self,
        taken: list[Buffer],
        copies: dict[int, Tensor],
        is_own: Callable[[nn.Module, str, Tensor], bool] | None,
    ) -> None:
        """Gives the copy the source's buffers and appends them to `taken`; see `Replica`."""
        buffers, source = self.buffers, self.source._buffers
        if buffers.keys() != source.keys():
            buffers.clear()
        for name, value in source.items():
            if value is None:
                buffers[name] = None
                continue
            given = value.detach()
            own = is_own is None or is_own(self.source, name, value)
            if own:
                # Each shard has a new tensor, since a graph may have saved the last shard's.
                mine = copies.get(id(value))
                if mine is None:
                    mine = copies[id(value)] = given.clone()
            else:
                mine = given if value.requires_grad else value
            buffers[name] = mine
            taken.append(Buffer(self.source, self.copied, name, given, mine, own))

    def compile(self) -> None:
        """Compiles the copy as the source is compiled."""
        before = dict(vars(self.copied))
        _compat.compile_as(self.source, self.copied)
        for name, value in vars(self.copied).items():
            if before.get(name) is not value:
                self.own[name] = value

    def changes(self) -> list[str]:
        """Names of attributes, parts, parameters and hooks that the forward has set on the copy."""
        now, given, missing = vars(self.copied), self._given, object()
        found = [n for n, v in now.items() if given.get(n, missing) is not v]
        found += [n for n in given if n not in now]
        found = [n for n in found if not self._is_harmless(n, now.get(n))]
        for registry, held in self._entries.items():
            entries = self.own[registry]
            found += [n for n in {**held, **entries} if entries.get(n) is not held.get(n)]
        found += self.changed_containers()
        found += self.lost_buffers()
        lengths = zip(_CONTAINERS, self.sized[-len(_CONTAINERS) :], self._sizes, strict=True)
        found += [name for name, held, before in lengths if len(held) > before and "_hook" in name]
        return found

    def _is_harmless(self, name: str, value: Any) -> bool:
        """Whether a method was put back, or a hook such as weight_norm's computes the attribute."""
        if type(value) is MethodType and value.__self__ is self.copied:
            return getattr(type(self.copied), name, None) is value.__func__
        hooks = self.source._forward_pre_hooks.values()
        return any(
            name in (getattr(hook, "name", None), getattr(hook, "_tensor_name", None))
            for hook in hooks
        )


def _content(container: Any) -> tuple[list[Any], list[Any]]:
    return [*container], [*mapping_values(container)]


def _same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(map(is_, a, b))


def _slots(kind: type) -> Iterable[str]:
    found = vars(kind).get("__slots__", ())
    names = (found,) if isinstance(found, str) else found
    return (n for n in names if n not in ("__dict__", "__weakref__"))
