"""`Replica`: a shallow copy of the module tree, on which one shard at a time runs.

As in `nn.DataParallel`, the copy's attributes are the user's own objects, except for what has to be
the shard's. Parameters are leaves of the replica's own on the shared storage. Buffers that the
forward writes are copies, to be merged. Where the module holds one of its own parts once more (a
list of layers, a bound method), the replica holds its copy of that part (rebinding.py).

Each shard starts with the module's attributes, so that what a forward sets on the replica reaches
neither another shard nor a later step.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from torch_spheres.runtime.rebinding import DictSnapshot
from torch_spheres.training.module_copy import Buffer, ModuleCopy

__all__ = ["Replica"]


class Replica:
    """A copy of the module whose parameters are leaves of their own on the same storage.

    Args:
        module: the user's.
        outside: tensors that require a gradient and lie on attributes without being parameters:
            the replica has leaves of its own for them too.
        user_module: the object that the user calls, where that is another one.
        attributes: names, for each module, of attributes that hold parts of it; None if unknown.

    Attributes:
        params: the module's parameters and the replica's leaves for them.
        attribute_leaves: the same for `outside`.
        leaves: ids of the replica's leaves.
        grads: lock of the leaves' ``.grad``.
        compiled_variants: keys of compiled code that has run on the replica, see `in_shard`.
        version: of the module's attributes, see `ReplicaPool.borrow`.
    """

    def __init__(
        self,
        module: nn.Module,
        outside: Iterable[Tensor] = (),
        user_module: nn.Module | None = None,
        attributes: Sequence[Iterable[str]] | None = None,
    ) -> None:
        self.grads = threading.Lock()
        self._replacements: dict[int, Any] = {}
        # Whether it has all of the module's attributes and hooks, none of them replaced.
        self._is_unmodified = False
        self.params = [(p, self._leaf(p)) for p in module.parameters()]
        self.attribute_leaves = [(t, self._leaf(t)) for t in outside]
        self.leaves = frozenset(id(mine) for _, mine in (*self.params, *self.attribute_leaves))
        self.parts = [ModuleCopy(part) for part in module.modules()]
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
        self._is_unmodified = False  # `compile` has added attributes
        self.rebind(everything)
        for part in self.parts:
            # (What torch.compile returns has the attributes of what it was given, not its type.)
            if "parametrizations" in part.copied._modules and is_parametrized(part.copied):
                _compute_at_each_use(part.copied)
        self.compiled_variants: set[Any] = set()
        self.version = 0
        self._is_dirty = False

    def _leaf(self, tensor: Tensor) -> Tensor:
        with torch.inference_mode(tensor.is_inference()):
            if isinstance(tensor, nn.Parameter):
                mine: Tensor = nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad)
                if type(tensor) is not nn.Parameter and not is_lazy(tensor):
                    mine.__class__ = type(tensor)
                vars(mine).update(vars(tensor))  # attributes that the user has set
            else:
                mine = tensor.detach().requires_grad_(tensor.requires_grad)
        if mine.requires_grad:
            self._guard(mine)
        self._replacements[id(tensor)] = mine
        return mine

    def _guard(self, mine: Tensor) -> None:
        """Raises an error in a backward that reaches the leaf and is not the shard's own."""
        grads = self.grads

        def refuse(leaf: Tensor) -> None:
            if grads.locked():
                return  # in a reentrant checkpoint, see Shard.backward
            leaf.grad = None
            raise RuntimeError(
                "a loss was computed from a tensor that a shard of SphereParallel made inside the "
                "model (a hook or an attribute had kept it): it has that shard's rows only, and "
                "its gradient would be lost. Return the tensor from the model's forward"
            )

        mine.register_post_accumulate_grad_hook(refuse)

    def sync(self) -> bool:
        """Syncs attributes of parameters; False if a new replica is needed."""
        for p, mine in (*self.params, *self.attribute_leaves):
            if (
                p.data_ptr() != mine.data_ptr()
                or p.dtype != mine.dtype
                or p.shape != mine.shape
                or p.stride() != mine.stride()
                # A leaf's requires_grad stays, since a graph may have it whose backward follows.
                or p.requires_grad != mine.requires_grad
            ):
                return False
            # Attributes that a forward has set on the leaf stay: they may belong to its hooks.
            vars(mine).update(vars(p))
        return True

    def number_of(self, copied: nn.Module) -> int | None:
        """The number in ``modules()`` of a module of the replica; None if it is no part of it."""
        return next((i for i, part in enumerate(self.parts) if part.copied is copied), None)

    def rebind(self, names: Iterable[Iterable[str]], *, hooks: bool = True) -> None:
        """Gives the replica the module's attributes and hooks, for the shards of one call.

        Args:
            names: for each module, of the attributes that hold parts of it.
            hooks: whether the replica has the module's hooks.
        """
        names = [*names]
        if hooks and not any(names) and self._is_bound():
            return
        for part, attributes in zip(self.parts, names, strict=True):
            part.rebind(attributes, self._replacements, hooks)
        self._record_state()
        self._bound_to = DictSnapshot([d for part in self.parts for d in part.source_dicts()])
        self._is_unmodified = (
            hooks and not any(names) and not any(part.slots for part in self.parts)
        )

    def _is_bound(self) -> bool:
        """Whether the module still has what it had at the last `rebind`."""
        return self._is_unmodified and self._bound_to.matches(
            [d for part in self.parts for d in part.source_dicts()]
        )

    def _record_state(self) -> None:
        """Records what all copies hold, in flat lists, which are compared in microseconds."""
        parts = self.parts
        self._buffered = [part for part in parts if part.source._buffers or part.buffers]
        self._sized = [held for part in parts for held in part.sized]
        self._sized += [part.buffers for part in parts if part not in self._buffered]
        self._sizes = [*map(len, self._sized)]
        self._held = [held for part in parts for held in part.held]
        self._values = [*itertools.chain.from_iterable(self._held)]
        self._with_containers = [part for part in parts if part.containers]

    def _is_changed(self) -> bool:
        """Whether a forward has changed attributes since `_record_state`."""
        if [*map(len, self._sized)] != self._sizes:
            return True
        if not all(map(is_, itertools.chain.from_iterable(self._held), self._values)):
            return True
        return any(part.changed_containers() for part in self._with_containers)

    def begin_shard(
        self, is_own: Callable[[nn.Module, str, Tensor], bool] | None = None
    ) -> list[Buffer]:
        """Gives the replica the attributes that it was bound to, and the module's buffers.

        Args:
            is_own: whether the shard gets a copy of a buffer, and not the module's; None: always.
        """
        if self._is_dirty and self._is_changed():
            for part in self.parts:
                part.restore()
            self._record_state()
        self._is_dirty = True  # until `changes` is called: the forward may raise
        taken: list[Buffer] = []
        copies: dict[int, Tensor] = {}  # a tensor under two names is copied once
        for part in self._buffered:
            part.copy_buffers(taken, copies, is_own)
        return taken

    def changes(self) -> list[tuple[int, str]]:
        """Attributes that the forward has set: number of the module in ``modules()``, name."""
        self._is_dirty = self._is_changed() or any(part.lost_buffers() for part in self._buffered)
        if not self._is_dirty:
            return []
        return [(i, name) for i, part in enumerate(self.parts) for name in part.changes()]


def _compute_at_each_use(part: nn.Module) -> None:
    """Computes parametrized tensors anew, inside `parametrize.cached()` too.

    All threads and copies of a module share that cache, so that a shard would use a tensor of
    another shard's graph.
    """
    kind: Any = type(part)
    properties = {}
    for name in part.parametrizations:  # type: ignore[union-attr]

        def compute(self: Any, name: str = name) -> Any:
            return self.parametrizations[name]()

        properties[name] = property(compute, getattr(kind, name).fset)
    part.__class__ = type(kind.__name__, (kind,), properties)
