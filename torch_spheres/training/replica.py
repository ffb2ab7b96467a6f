"""What a running shard has of its own: a shallow copy of the module tree.

As `nn.DataParallel` makes them: the copy's attributes are the user's own objects, never copies, but
for what has to be the shard's. Parameters are leaves of their own on the shared storage; buffers
that the forward writes are the shard's, to be merged; and wherever the module holds one of its own
parts once more (a list of layers, a bound method), the replica holds its own (rebinding.py).

Before each shard the replica gets the module's attributes anew, so that what a forward sets reaches
neither another shard nor a later step.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import is_
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from torch_spheres import _compat
from torch_spheres.runtime.rebinding import MUTABLE, Contents, rebound, values_of

__all__ = ["Buffer", "Replica"]

_CHANGING = ("_parameters", "_modules", "_non_persistent_buffers_set", *_compat.FORWARD_HOOKS)
"""Containers on a module of its own, into which a forward may put something."""


class Replica:
    """A copy of the module whose parameters are leaves of their own on the same storage.

    Args:
        module: the user's.
        outside: tensors that require a gradient and lie on attributes without being parameters:
            the replica has leaves of its own for them too.
        user_module: the object that the user has for the module, where that is another one.
        attributes: of each part, those that hold parts of the module; None: any may.
    """

    def __init__(
        self,
        module: nn.Module,
        outside: Iterable[Tensor] = (),
        user_module: nn.Module | None = None,
        attributes: Sequence[Iterable[str]] | None = None,
    ) -> None:
        self.grads = threading.Lock()  # held by who uses `.grad` of the replica's leaves
        self._replacements: dict[int, Any] = {}
        self._is_whole = False  # bound to all that there is, and to nothing that is the replica's
        self.params: list[tuple[Tensor, Tensor]] = []
        for p in module.parameters():
            self.params.append((p, self._leaf(p)))
        self.attribute_leaves = [(t, self._leaf(t)) for t in outside]
        self.leaves = frozenset(id(mine) for _, mine in (*self.params, *self.attribute_leaves))
        self.parts = [_ModuleCopy(part) for part in module.modules()]
        self._replacements.update((id(part.source), part.copied) for part in self.parts)
        self.module: nn.Module = self.parts[0].copied
        if user_module is not None:
            self._replacements[id(user_module)] = self.module
        for part in self.parts:
            part.connect(self._replacements)
        everything = attributes or [[*vars(part.source)] for part in self.parts]
        self.rebind(everything)
        for part in self.parts:
            part.compile()
        self._is_whole = False  # what was compiled is to be taken over
        self.rebind(everything)
        for part in self.parts:
            if is_parametrized(part.copied):
                _compute_at_each_use(part.copied)
        self.compiled_variants: set[Any] = set()  # what compiled code has seen, see ShardedCall
        self.bound = 0  # see ReplicaPool
        self._is_dirty = False

    def _leaf(self, tensor: Tensor) -> Tensor:
        with torch.inference_mode(tensor.is_inference()):
            if isinstance(tensor, nn.Parameter):
                mine: Tensor = nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad)
                if type(tensor) is not nn.Parameter and not is_lazy(tensor):
                    mine.__class__ = type(tensor)
                vars(mine).update(vars(tensor))  # what users put on it
            else:
                mine = tensor.detach().requires_grad_(tensor.requires_grad)
        if mine.requires_grad:
            self._guard(mine)
        self._replacements[id(tensor)] = mine
        return mine

    def _guard(self, mine: Tensor) -> None:
        """Has a backward that comes to the leaf from outside of the shard's own raise."""
        grads = self.grads

        def refuse(leaf: Tensor) -> None:
            if grads.locked():
                return  # a reentrant checkpoint's, see Shard.backward
            leaf.grad = None
            raise RuntimeError(
                "a loss was computed from a tensor that a shard of SphereParallel made inside the "
                "model (a hook or an attribute had kept it): it has that shard's rows only, and "
                "its gradient would be lost. Return the tensor from the model's forward"
            )

        mine.register_post_accumulate_grad_hook(refuse)

    def sync(self) -> bool:
        """Takes over what is cheap to; False if the parameters are no longer the same memory."""
        for p, mine in (*self.params, *self.attribute_leaves):
            if (
                p.data_ptr() != mine.data_ptr()
                or p.dtype != mine.dtype
                or p.shape != mine.shape
                or p.stride() != mine.stride()
            ):
                return False
            # (The old leaf may be in the graph of a call whose backward is still to come.)
            if mine.requires_grad != p.requires_grad:
                return False
            # What a forward has put there stays, as the hooks do that it may stand for.
            vars(mine).update(vars(p))
        return True

    def number_of(self, copied: nn.Module) -> int | None:
        """Of one of its parts, in the order of ``modules()``."""
        return next((i for i, part in enumerate(self.parts) if part.copied is copied), None)

    def rebind(self, names: Iterable[Iterable[str]], *, hooks: bool = True) -> None:
        """Takes over the module's attributes and hooks, for the shards of one call.

        Args:
            names: of each part, the attributes that hold parts of the module.
            hooks: False leaves the module's hooks out.
        """
        names = [*names]
        if hooks and not any(names) and self._is_bound():
            return
        for part, attributes in zip(self.parts, names, strict=True):
            part.rebind(attributes, self._replacements, hooks)
        self._note()
        self._bound_to = Contents([d for part in self.parts for d in part.read()])
        self._is_whole = hooks and not any(names) and not any(part.slots for part in self.parts)

    def _is_bound(self) -> bool:
        """Whether the module still has what it had at the last `rebind`."""
        return self._is_whole and self._bound_to.are(
            [d for part in self.parts for d in part.read()]
        )

    def _note(self) -> None:
        """Remembers what the parts have now, all in one: a look at it takes microseconds."""
        parts = self.parts
        self._buffered = [part for part in parts if part.source._buffers or part.buffers]
        self._sized = [held for part in parts for held in part.sized]
        self._sized += [part.buffers for part in parts if part not in self._buffered]
        self._sizes = [*map(len, self._sized)]
        self._held = [held for part in parts for held in part.held]
        self._values = [*itertools.chain.from_iterable(self._held)]
        self._mixed = [part for part in parts if part.mixed]

    def _is_changed(self) -> bool:
        """Whether a part has not what it was bound to."""
        if [*map(len, self._sized)] != self._sizes:
            return True
        if not all(map(is_, itertools.chain.from_iterable(self._held), self._values)):
            return True
        return any(part.changed_containers() for part in self._mixed)

    def begin_shard(
        self, is_own: Callable[[nn.Module, str, Tensor], bool] | None = None
    ) -> list[Buffer]:
        """Gives the replica the attributes that it was bound to, and the module's buffers.

        Args:
            is_own: says of a buffer whether the shard gets a copy, and not the module's; None: all.
        """
        if self._is_dirty and self._is_changed():
            for part in self.parts:
                part.restore()
            self._note()
        self._is_dirty = True  # until `changes` knows better: the forward may raise
        taken: list[Buffer] = []
        copies: dict[int, Tensor] = {}  # one tensor under two names is one in the replica too
        for part in self._buffered:
            part.take_buffers(taken, copies, is_own)
        return taken

    def changes(self) -> list[tuple[int, str]]:
        """What the forward has set: the module's number in ``modules()``, the attribute's name."""
        self._is_dirty = self._is_changed() or any(part.lost_buffers() for part in self._buffered)
        if not self._is_dirty:
            return []
        return [(i, name) for i, part in enumerate(self.parts) for name in part.changes()]


class _ModuleCopy:
    """One module of the tree, and its copy."""

    def __init__(self, source: nn.Module) -> None:
        self.source = source
        self.copied: nn.Module = object.__new__(type(source))
        self.buffers: dict[str, Tensor | None] = {}
        self.own: dict[str, Any] = {"_parameters": {}, "_buffers": self.buffers, "_modules": {}}
        self._held: dict[str, dict[str, Any]] = {}  # what belongs into the registries
        self._given: dict[str, Any] = {}
        self._replacements: dict[int, Any] = {}
        self.mixed: dict[str, Any] = {}
        """Containers of the copy's own, and what they held."""
        self.held: list[Any] = []
        """What the copy has: views of the values of its attributes and registries."""
        self.sized: list[Any] = []
        """Whatever may grow."""
        self._before: list[int] = []  # how large the last ones of those were
        self._has_hooks = True
        self.slots = [name for kind in type(source).__mro__ for name in _slots(kind)]

    def connect(self, replacements: dict[int, Any]) -> None:
        """Fills the registries with the replica's parameters and parts."""
        for registry in ("_parameters", "_modules"):
            held = vars(self.source)[registry].items()
            self._held[registry] = {n: replacements.get(id(v), v) for n, v in held}
            self.own[registry].update(self._held[registry])

    def rebind(self, names: Iterable[str], replacements: dict[int, Any], hooks: bool) -> None:
        source = vars(self.source)
        self._given = {**source, **self.own}
        self._replacements = replacements
        self.mixed = {}
        for name in names:
            if name not in self.own and name not in _CHANGING and name in source:
                new = self._given[name] = rebound(source[name], replacements)
                if new is not source[name] and isinstance(new, MUTABLE):
                    self.mixed[name] = [*new], [*values_of(new)]
        self._has_hooks = hooks
        self.restore()

    def read(self) -> list[dict[Any, Any]]:
        """The module's own dicts that the copy is made after."""
        source = vars(self.source)
        return [source, *(source[name] for name in _compat.FORWARD_HOOKS)]

    def _copy_containers(self) -> None:
        """Gives the copy its own: a hook that a forward installs is not the user's module's."""
        for name in _compat.FORWARD_HOOKS:
            mine: OrderedDict[int, Any] = OrderedDict()
            if self._has_hooks:
                for key, hook in vars(self.source)[name].items():
                    mine[key] = rebound(hook, self._replacements)
            self._given[name] = mine
        name = "_non_persistent_buffers_set"
        self._given[name] = vars(self.source)[name].copy()

    def changed_containers(self) -> list[str]:
        """Names of containers of the copy's own that the forward has changed in place."""
        found = []
        for name, (keys, values) in self.mixed.items():
            now = self._given[name]
            if not _same([*now], keys) or not _same([*values_of(now)], values):
                found.append(name)
        return found

    def lost_buffers(self) -> list[str]:
        """Names of buffers that are new, or are None now."""
        source = self.source._buffers
        return [n for n, v in self.buffers.items() if v is None and source.get(n) is not None] + (
            [] if len(self.buffers) == len(source) else [n for n in self.buffers if n not in source]
        )

    def restore(self) -> None:
        """Gives the copy what it was bound to."""
        for registry, held in self._held.items():
            self.own[registry].clear()
            self.own[registry].update(held)
        for name in self.changed_containers():
            new = self._given[name] = rebound(vars(self.source)[name], self._replacements)
            self.mixed[name] = [*new], [*values_of(new)]
        self._copy_containers()
        # In one step: a checkpoint may be computing with the replica in another thread.
        attributes = self._given.copy()
        object.__setattr__(self.copied, "__dict__", attributes)
        containers = [self._given[name] for name in _CHANGING]
        self._before = [*map(len, containers)]
        self.sized = [attributes, *containers]
        self.held = [d.values() for d in (attributes, *(self.own[name] for name in self._held))]
        for name in self.slots:
            if hasattr(self.source, name):
                object.__setattr__(self.copied, name, getattr(self.source, name))

    def take_buffers(
        self,
        taken: list[Buffer],
        copies: dict[int, Tensor],
        is_own: Callable[[nn.Module, str, Tensor], bool] | None,
    ) -> None:
        buffers, source = self.buffers, self.source._buffers
        if buffers.keys() != source.keys():
            buffers.clear()
        for name, value in source.items():
            if value is None:
                buffers[name] = None
                continue
            own = is_own is None or is_own(self.source, name, value)
            if own:
                # A new tensor for every shard: the last one's may be saved in a graph.
                mine = copies.get(id(value))
                if mine is None:
                    mine = copies[id(value)] = value.detach().clone()
            else:
                mine = value.detach() if value.requires_grad else value
            buffers[name] = mine
            taken.append(Buffer(self.source, self.copied, name, value.detach(), mine, own))

    def compile(self) -> None:
        """Has compiled code of the module's be compiled for the copy."""
        before = dict(vars(self.copied))
        _compat.compile_as(self.source, self.copied)
        for name, value in vars(self.copied).items():
            if before.get(name) is not value:
                self.own[name] = value

    def changes(self) -> list[str]:
        """Names of attributes, parts, parameters and hooks that the forward set on the copy."""
        now, given, missing = vars(self.copied), self._given, object()
        found = [n for n, v in now.items() if given.get(n, missing) is not v]
        found += [n for n in given if n not in now]
        found = [n for n in found if not self._is_harmless(n, now.get(n))]
        for registry, held in self._held.items():
            entries = self.own[registry]
            found += [n for n in {**held, **entries} if entries.get(n) is not held.get(n)]
        found += self.changed_containers()
        found += self.lost_buffers()
        lengths = zip(_CHANGING, self.sized[-len(_CHANGING) :], self._before, strict=True)
        found += [name for name, held, before in lengths if len(held) > before and "_hook" in name]
        return found

    def _is_harmless(self, name: str, value: Any) -> bool:
        """A method put back where it was, and what torch's own hooks compute at each call."""
        if type(value) is MethodType and value.__self__ is self.copied:
            return getattr(type(self.copied), name, None) is value.__func__
        hooks = self.source._forward_pre_hooks.values()
        return any(
            name in (getattr(hook, "name", None), getattr(hook, "_tensor_name", None))
            for hook in hooks
        )


def _same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(map(is_, a, b))


def _slots(kind: type) -> Iterable[str]:
    found = vars(kind).get("__slots__", ())
    names = (found,) if isinstance(found, str) else found
    return (n for n in names if n not in ("__dict__", "__weakref__"))


def _compute_at_each_use(part: nn.Module) -> None:
    """Parametrized tensors, also inside `parametrize.cached()`.

    Its cache is one for all threads and for all copies of a module: a shard would use a tensor out
    of another one's graph.
    """
    kind: Any = type(part)
    properties = {}
    for name in part.parametrizations:  # type: ignore[union-attr]

        def compute(self: Any, name: str = name) -> Any:
            return self.parametrizations[name]()

        properties[name] = property(compute, getattr(kind, name).fset)
    part.__class__ = type(kind.__name__, (kind,), properties)


@dataclass
class Buffer:
    """What one shard has for one of the module's buffers."""

    source: nn.Module
    copied: nn.Module
    name: str
    given: Tensor  # the original's own, which nobody writes while shards run
    mine: Tensor
    is_own: bool

    def changed_value(self) -> Tensor | None:
        """What the shard left in it, or None if it left it alone."""
        now = self.copied._buffers.get(self.name)
        if now is self.mine and not self.is_own:
            return None  # whether it was written to is seen on the module's, once for all shards
        if now is None or now.shape != self.given.shape:
            return now
        # By value: batch_norm writes its statistics without raising the tensor's version.
        return None if torch.equal(now, self.given) else now.detach()
