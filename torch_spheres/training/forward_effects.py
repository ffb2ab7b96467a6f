"""What a forward changes beside its outputs: noticed, and merged, refused or reported.

Shards run at once on shared weights. So a forward that writes to a parameter, or to anything that
the replicas share, has written once for each shard, in no fixed order: that is an error. What it
sets on the module is set on a replica and lost: that is a warning, once for each name.

Versions of tensors are compared in every call, since it costs next to nothing. What is written past
them (through ``.data``, numpy, batch norm's kernel) shows in the values, which are compared in the
first calls of each kind and in those whose number is a power of two.
"""

from __future__ import annotations

import functools
import itertools
import operator
import warnings
import weakref
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torch_spheres import _compat
from torch_spheres.runtime.object_graph import walk
from torch_spheres.runtime.rebinding import MUTABLE
from torch_spheres.runtime.stack_level import users_level
from torch_spheres.training.change_detection import (
    FUNCTIONS,
    PLAIN,
    checksum,
    content_of,
    version_of,
)
from torch_spheres.training.replica import Replica
from torch_spheres.training.replica_pool import ELSEWHERE, ReplicaPool
from torch_spheres.training.shard_task import Shard
from torch_spheres.training.split_options import argument_name

__all__ = ["ForwardEffects"]

_CONTAINERS, _NEAR = 30, 30  # that functions hold, and objects in one of them, that are looked at


class ForwardEffects:
    """Compares a module before the shards' forward with what it is afterwards.

    Args:
        module: the user's.
        pool: has looked at its attributes.
        closely: values too, not only versions.
        again: there has been such a call: what a first one sets up, as caches, is no change.
    """

    def __init__(self, module: nn.Module, pool: ReplicaPool, closely: bool, *, again: bool) -> None:
        self._module, self._pool = module, pool
        self._closely, self._again = closely, again
        self._set: dict[str, None] = {}  # names of attributes, in order
        self._changed_arguments: dict[str, None] = {}
        strange = [p for m in pool.strangers for p in m.parameters()]
        every = {id(p): p for p in (*pool.parameters, *pool.outside, *strange)}
        every.update((id(leaf), leaf) for leaf in pool.strange_leaves())
        self._parameters = [p for p in every.values() if not is_lazy(p)]
        self._buffers = [
            (part, name, value)
            for part in itertools.chain(pool.parts, *(m.modules() for m in pool.strangers))
            for name, value in part._buffers.items()
            if value is not None and not is_lazy(value)
        ]
        self._loose: list[tuple[int | None, str, Tensor]] = [*pool.loose]
        # Containers that functions hold, and the tensors in them. (Functions also count calls.)
        self._containers: list[tuple[str, Any, list[Tensor]]] = []
        if closely:
            self._look_around()
        self._loose += [(None, path, t) for path, ref in pool.watched if (t := ref()) is not None]
        self._versions = self._read_versions()
        self._values = self._read_values() if closely else None
        self._contents = self._read_contents() if closely and again else {}
        self._attributes = [dict(vars(part)) for part in pool.parts] if closely else []

    def _look_around(self) -> None:
        """Finds tensors in objects on attributes, and what functions, hooks and forwards hold."""
        known = {*map(id, self._pool.parts), id(self._pool.known_as())}
        tensors = [*self._parameters, *(b for _, _, b in self._buffers)]
        tensors += [t for _, _, t in self._loose]
        known.update(map(id, tensors))
        found: dict[int, tuple[str, Tensor]] = {}
        attributes, functions = self._roots()
        for path, value in walk([*functions, *attributes], known, by_name=True):
            if isinstance(value, Tensor) and not is_lazy(value):
                found.setdefault(id(value), (path, value))
        self._pool.watched = [(path, weakref.ref(t)) for path, t in found.values()]
        if self._again:
            held = (
                (path, value)
                for path, value in walk(functions, known, by_name=True)
                if isinstance(value, MUTABLE) or _is_plain_object(value)
            )
            first = itertools.islice(held, _CONTAINERS)
            self._containers = [(path, value, _tensors_in(value)) for path, value in first]

    def _roots(self) -> tuple[list[tuple[str, Any]], list[tuple[str, Any]]]:
        """Objects on attributes, and functions."""
        attributes: list[tuple[str, Any]] = []
        functions: list[tuple[str, Any]] = []
        for prefix, part in self._module.named_modules():
            path = f"{prefix}." if prefix else ""
            for name, value in vars(part).items():
                if name not in ELSEWHERE and type(value) not in PLAIN:
                    (functions if callable(value) else attributes).append((path + name, value))
            for name in _compat.FORWARD_HOOKS:
                functions += [(path + name, hook) for hook in vars(part)[name].values()]
            forward: Any = type(part).forward
            if not getattr(forward, "__module__", "torch.").startswith("torch."):
                functions.append((f"{path}forward", forward))
        return attributes, functions

    def _read_versions(self) -> list[list[int]]:
        return [
            [version_of(p) for p in self._parameters],
            [version_of(b) for _, _, b in self._buffers],
            [version_of(t) for _, _, t in self._loose],
        ]

    def _read_values(self) -> list[list[Any]]:
        with torch.no_grad():
            return [
                [checksum(p) for p in self._parameters],
                [checksum(b) for _, _, b in self._buffers],
                [checksum(t) for _, _, t in self._loose],
            ]

    def _read_contents(self) -> dict[str, tuple[Any, Any]]:
        """Of objects on attributes that may change in place."""
        found: dict[str, tuple[Any, Any]] = {}
        seen: set[int] = set()
        for i, part in enumerate(self._pool.parts):
            for name, value in vars(part).items():
                if name not in ELSEWHERE and type(value) not in PLAIN and id(value) not in seen:
                    seen.add(id(value))
                    content = content_of(value)
                    if content is not None:
                        found[self._path(i, name)] = value, content
        return found

    # ---- shards ----

    def look_at(self, replica: Replica) -> None:
        """After a shard's forward: what it has set on its replica."""
        for i, name in replica.changes():
            self._set[self._path(i, name)] = None

    def look_at_arguments(self, before: Iterable[tuple[int | str, Any, Any]]) -> None:
        """After a shard's forward: which of its arguments, as `contents` saw them, it has changed.

        Raises nothing.
        """
        for key, value, content in before:
            if content_of(value) != content:
                self._changed_arguments[argument_name(self._module, key)] = None

    def _path(self, i: int, name: str) -> str:
        prefix = self._prefixes[i]
        return f"{prefix}.{name}" if prefix else name

    @functools.cached_property
    def _prefixes(self) -> list[str]:
        return [prefix for prefix, _ in self._module.named_modules()]

    # ---- afterwards ----

    def check(self, shards: Sequence[Shard]) -> None:
        """After all shards' forward.

        Raises:
            RuntimeError: they have written to what they share, or gave a parameter other memory.
        """
        replicas = {id(shard.replica): shard.replica for shard in shards}
        for replica in replicas.values():
            pairs = enumerate(replica.params)
            frozen = [i for i, (p, mine) in pairs if p.requires_grad != mine.requires_grad]
            if frozen:
                names = [name for name, _ in self._module.named_parameters()]
                raise RuntimeError(
                    f"the module's forward changed requires_grad of its parameters "
                    f"{[names[i] for i in frozen]}, which a shard's replica has; do it before the "
                    "call, or detach() in the forward what is not to be trained"
                )
            pairs = enumerate(replica.params)
            moved = [i for i, (p, mine) in pairs if p.data_ptr() != mine.data_ptr()]
            if moved:
                names = [name for name, _ in self._module.named_parameters()]
                raise RuntimeError(
                    f"the module's forward gave its parameters {[names[i] for i in moved]} new "
                    "data, which a shard's replica has and the module has not; do it after "
                    "optimizer.step()"
                )
        if self._closely and not self._again:
            self._contents = self._read_contents()  # the comparison may follow, and show changes
        parameters, buffers, loose = (
            [a != b for a, b in zip(now, before, strict=True)]
            for now, before in zip(self._read_versions(), self._versions, strict=True)
        )
        if self._values is not None:
            for flags, sums, earlier in zip(
                (parameters, buffers, loose), self._read_values(), self._values, strict=True
            ):
                for i, (a, b) in enumerate(zip(sums, earlier, strict=True)):
                    flags[i] |= a != b
        if any(parameters):
            written = [*itertools.compress(self._parameters, parameters)]
            raise RuntimeError(_wrote_to_parameters(self._module, self._pool, written))
        if any(buffers):
            changed = [*itertools.compress(self._buffers, buffers)]
            raise RuntimeError(_wrote_to_buffers(self._module, self._pool, changed))
        if any(loose):
            flagged = zip(self._loose, loose, strict=True)
            names = [
                name if i is None else self._path(i, name)
                for (i, name, _), written in flagged
                if written
            ]
            raise RuntimeError(
                f"the module's forward wrote in place to tensors that it reaches by {names}, which "
                "all shards share, at once; make them buffers of the module, whose new values "
                "SphereParallel averages over the shards, or return what has to be kept"
            )

    def warn(self) -> None:
        """Says what was changed, once for each name."""
        self._warn_of_arguments()
        # A function that holds the original sets on the original.
        for i, (part, before) in enumerate(zip(self._pool.parts, self._attributes, strict=False)):
            now = vars(part)
            for name in {**before, **now}:
                if name not in ELSEWHERE and now.get(name) is not before.get(name):
                    self._set[self._path(i, name)] = None
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
    """Of a class of the user's, as the owner of a hook is."""
    known = isinstance(value, (nn.Module, Tensor, type, ModuleType, *FUNCTIONS))
    return not known and hasattr(value, "__dict__") and not callable(value)


def _tensors_in(value: Any) -> list[Tensor]:
    return [v for _, v in walk([("", value)], most=_NEAR) if isinstance(v, Tensor)]


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
