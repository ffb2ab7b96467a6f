"""`SharedWrites`: detects that a forward wrote to tensors which all shards share.

Shards run at once on shared weights. A forward that writes to a parameter, or to anything else that
replicas share, writes once for each shard, in no fixed order: that is an error. Versions of tensors
are compared in every call, since that costs next to nothing. Writes that leave the version alone
(through ``.data``, numpy, batch norm's kernel) show in the values, which are compared in the first
calls of each kind and in those whose number is a power of two. Used by forward_effects.py.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torch_spheres import _compat
from torch_spheres.runtime.object_graph import walk
from torch_spheres.training.change_detection import PLAIN, checksum, version_of
from torch_spheres.training.module_scan import SKIPPED_ATTRIBUTES
from torch_spheres.training.replica import Replica
from torch_spheres.training.replica_pool import ReplicaPool

__all__ = ["SharedWrites"]

Root = tuple[str, Any]
"""An object that a forward reaches, and how."""


class SharedWrites:
    """The shared tensors of a module as they are before the shards' forward.

    Args:
        module: the user's.
        pool: has inspected the module.
        closely: whether values are compared too, not only versions.

    Attributes:
        functions: functions, hooks and forwards that the module calls.
        known: ids of the module's parts and tensors.
    """

    def __init__(self, module: nn.Module, pool: ReplicaPool, closely: bool) -> None:
        self._module, self._pool = module, pool
        others = pool.scan.unregistered_modules
        unregistered = [p for m in others for p in m.parameters()]
        every = {id(p): p for p in (*pool.parameters, *pool.scan.leaves, *unregistered)}
        every.update((id(leaf), leaf) for leaf in pool.unregistered_leaves())
        parts = itertools.chain(pool.parts, *(m.modules() for m in others))
        self._buffers = [
            (part, name, value)
            for part in parts
            for name, value in part._buffers.items()
            if value is not None and not is_lazy(value)
        ]
        self._others: list[tuple[int | None, str, Tensor]] = [*pool.scan.plain_tensors]
        parameters = [p for p in every.values() if not is_lazy(p)]
        self._tensors = [parameters, [b for _, _, b in self._buffers]]
        self.functions: list[Root] = []
        self.known: set[int] = set()
        if closely:
            self._find_watched()
        self._others += [(None, way, t) for way, ref in pool.watched if (t := ref()) is not None]
        self._tensors.append([t for _, _, t in self._others])
        self._closely = closely
        self._marks = self._read_marks()

    def _find_watched(self) -> None:
        """Finds tensors in objects on attributes, and in what functions hold."""
        parts = {*map(id, self._pool.parts), id(self._pool.user_module())}
        tensors = itertools.chain(*self._tensors, (t for _, _, t in self._others))
        self.known = parts.union(map(id, tensors))
        found: dict[int, tuple[str, Tensor]] = {}
        attributes, self.functions = _roots(self._module)
        for path, value in walk([*self.functions, *attributes], self.known, by_name=True):
            if isinstance(value, Tensor) and not is_lazy(value):
                found.setdefault(id(value), (path, value))
        self._pool.watched = [(path, weakref.ref(t)) for path, t in found.values()]

    @torch.no_grad()
    def _read_marks(self) -> list[list[Any]]:
        """For each tensor what changes when it is written to: its version, and its checksum."""
        closely = self._closely
        return [
            [(version_of(t), checksum(t) if closely else None) for t in tensors]
            for tensors in self._tensors
        ]

    def path(self, i: int, name: str) -> str:
        """The dotted name of an attribute of module `i` in ``modules()``."""
        prefix = self._prefixes[i]
        return f"{prefix}.{name}" if prefix else name

    @functools.cached_property
    def _prefixes(self) -> list[str]:
        return [prefix for prefix, _ in self._module.named_modules()]

    def check(self, replicas: Iterable[Replica]) -> None:
        """Compares, after all shards' forward.

        Raises:
            RuntimeError: shared tensors were written to, or a replica's parameters replaced.
        """
        for replica in replicas:
            self._check_parameters(replica)
        written = [
            [a != b for a, b in zip(now, before, strict=True)]
            for now, before in zip(self._read_marks(), self._marks, strict=True)
        ]
        parameters, buffers, others = written
        if any(parameters):
            changed = [*itertools.compress(self._tensors[0], parameters)]
            raise RuntimeError(_wrote_to_parameters(self._module, self._pool, changed))
        if any(buffers):
            places = [*itertools.compress(self._buffers, buffers)]
            raise RuntimeError(_wrote_to_buffers(self._module, self._pool, places))
        if any(others):
            names = [
                name if i is None else self.path(i, name)
                for i, name, _ in itertools.compress(self._others, others)
            ]
            raise RuntimeError(
                f"the module's forward wrote in place to tensors that it reaches by {names}, which "
                "all shards share, at once; make them buffers of the module, whose new values "
                "SphereParallel averages over the shards, or return what has to be kept"
            )

    def _check_parameters(self, replica: Replica) -> None:
        """Raises a RuntimeError if a forward changed the replica's parameters themselves."""
        frozen = [p.requires_grad != mine.requires_grad for p, mine in replica.params]
        if any(frozen):
            raise RuntimeError(
                f"the module's forward changed requires_grad of its parameters "
                f"{self._names(frozen)}, which a shard's replica has; do it before the "
                "call, or detach() in the forward what is not to be trained"
            )
        moved = [p.data_ptr() != mine.data_ptr() for p, mine in replica.params]
        if any(moved):
            raise RuntimeError(
                f"the module's forward gave its parameters {self._names(moved)} new "
                "data, which a shard's replica has and the module has not; do it after "
                "optimizer.step()"
            )

    def _names(self, flags: Sequence[bool]) -> list[str]:
        names = [name for name, _ in self._module.named_parameters()]
        return [*itertools.compress(names, flags)]


def _roots(module: nn.Module) -> tuple[list[Root], list[Root]]:
    """Objects on attributes, and functions."""
    attributes: list[Root] = []
    functions: list[Root] = []
    for prefix, part in module.named_modules():
        path = f"{prefix}." if prefix else ""
        for name, value in vars(part).items():
            if name not in SKIPPED_ATTRIBUTES and type(value) not in PLAIN:
                (functions if callable(value) else attributes).append((path + name, value))
        for name in _compat.FORWARD_HOOKS:
            functions += [(path + name, hook) for hook in vars(part)[name].values()]
        forward: Any = type(part).forward
        if not getattr(forward, "__module__", "torch.").startswith("torch."):
            functions.append((f"{path}forward", forward))
    return attributes, functions


def _wrote_to_parameters(module: nn.Module, pool: ReplicaPool, tensors: Sequence[Tensor]) -> str:
    written = {id(p) for p in tensors}
    names = [name for name, p in module.named_parameters() if id(p) in written]
    own = {id(p) for p in pool.parameters}
    others = [tuple(p.shape) for p in tensors if id(p) in written - own]
    if others:
        names.append(f"and tensors that are registered nowhere, of shapes {others}")
    text = (
        f"the module's forward wrote to its parameters {names}, which has happened once for "
        "each shard, and in several threads, so that the weights are spoilt (or another thread "
        "has changed them meanwhile, as a training loop beside an evaluation does). "
    )
    normed = [
        type(m).__name__
        for m in module.modules()
        if getattr(m, "max_norm", None) is not None
        and any(id(p) in written for p in m.parameters(recurse=False))
    ]
    if normed:
        return text + (
            f"{normed[0]}(max_norm=...) normalises its weight in each forward: set "
            "max_norm=None, and after optimizer.step() do the same once, under "
            "torch.no_grad(): weight.copy_(torch.renorm(weight, 2, 0, max_norm))"
        )
    return text + (
        "Update them outside of the forward, after optimizer.step() (averages of weights, "
        "momentum encoders), on model.module; or make them buffers, whose new values "
        "SphereParallel averages over the shards"
    )


def _wrote_to_buffers(
    module: nn.Module, pool: ReplicaPool, written: Sequence[tuple[nn.Module, str, Tensor]]
) -> str:
    own = {id(part): name for name, part in module.named_modules()}
    for part, name, _ in written:
        pool.written.add((id(part), name))
    names = [
        f"{own[id(part)]}.{name}".lstrip(".") if id(part) in own else
        f"{name} of a {type(part).__name__} that is registered nowhere"
        for part, name, _ in written
    ]  # fmt: skip
    return (
        f"the module's forward wrote to buffers, {names}, past the copy that each shard has: "
        "by way of a layer that is no registered part of the module, of a function that holds "
        "the original, or for the first time after many calls. All shards did so at once. "
        "Register the layer (nn.ModuleList), and reach it by way of self"
    )
