"""What a running shard has of its own: everything of the module but the weights."""

from __future__ import annotations

import copy
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from torch_spheres import _compat

__all__ = ["Buffer", "Replica", "ReplicaPool"]

_FOLLOWED = {
    *_compat.FORWARD_HOOKS,
    *_compat.OTHER_HOOKS,
    "training",
    "_parameters",
    "_buffers",
    "_modules",
}


class Replica:
    """A copy of the module whose parameters are leaves of their own on the same storage."""

    def __init__(self, module: nn.Module) -> None:
        self.params: list[tuple[nn.Parameter, nn.Parameter]] = []
        memo: dict[int, Any] = {}
        for p in module.parameters():
            with torch.inference_mode(p.is_inference()):
                mine = nn.Parameter(p.detach(), requires_grad=p.requires_grad)
            memo[id(p)] = mine
            self.params.append((p, mine))
        for part in module.modules():
            # The original's own dicts of hooks, so that hooks are the objects that the user
            # registered, and later ones are found too.
            for name in _compat.FORWARD_HOOKS:
                memo[id(part.__dict__[name])] = part.__dict__[name]
            compiler = _compat.compiler_context(part)
            if compiler is not None:
                memo[id(compiler)] = compiler
            for value in part.__dict__.values():
                # What an earlier forward left there (weight_norm does) is not the user's to copy.
                if isinstance(value, Tensor) and not value.is_leaf:
                    memo[id(value)] = value.detach()
        try:
            self.module = copy.deepcopy(module, memo)
        except Exception as error:
            error.add_note(
                "SphereParallel copies everything of the module but its parameters for each shard "
                "that runs; give the attribute that cannot be copied (a lock, a file, a tensor "
                "with a graph) a __deepcopy__, or keep it outside the module"
            )
            raise
        self.modules = list(zip(module.modules(), self.module.modules(), strict=True))
        for source, copied in self.modules:
            _compat.compile_as(source, copied)
        for part in filter(is_parametrized, self.module.modules()):
            _compute_at_each_use(part)
        self.warm: set[Any] = set()  # what compiled code has seen, see Call
        self.grads = threading.Lock()  # held by who uses `.grad` of the copy's parameters

    def follow(self) -> bool:
        """Takes over what is cheap to; False if the parameters are no longer the same memory."""
        for p, mine in self.params:
            if (
                p.data_ptr() != mine.data_ptr()
                or p.dtype != mine.dtype
                or p.shape != mine.shape
                or p.stride() != mine.stride()
            ):
                return False
            if mine.requires_grad != p.requires_grad:
                with torch.inference_mode(p.is_inference()):
                    mine.requires_grad_(p.requires_grad)
        for source, copied in self.modules:
            copied.training = source.training
        return True

    def take_buffers(self) -> list[Buffer]:
        """Gives the copy buffers of its own with the values of the original's."""
        taken = []
        for source, copied in self.modules:
            for name, value in source._buffers.items():
                if value is None:
                    copied._buffers[name] = None
                    continue
                # A new tensor for every shard: the last one's may be saved in a graph.
                copied._buffers[name] = value.detach().clone()
                taken.append(Buffer(source, copied, name, value.detach()))
        return taken


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
    """One shard's own tensor for one of the module's buffers."""

    source: nn.Module
    copied: nn.Module
    name: str
    given: Tensor  # the original's own, which nobody writes while shards run

    def changed_value(self) -> Tensor | None:
        """What the shard left in it, or None if it left it alone."""
        # By value: batch_norm writes its statistics without raising the tensor's version.
        now = self.copied._buffers[self.name]
        if now is None or now.shape != self.given.shape:
            return now
        return None if torch.equal(now, self.given) else now.detach()


class ReplicaPool:
    """The replicas that are not in use, at most one for each shard that runs at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[Replica] = []
        self._form: list[Any] = []
        self.layouts: dict[str, Any] = {}  # of gradients on their way to other processes

    def follow(self, module: nn.Module) -> None:
        """To be called before shards are run: drops replicas that the module has outgrown."""
        form = [_form(part) for part in module.modules()]
        with self._lock:
            if form != self._form:
                self._idle.clear()
                self._form = form
            self._idle = [replica for replica in self._idle if replica.follow()]

    def borrow(self, module: nn.Module) -> Replica:
        """One for the calling thread alone, until `give_back`."""
        with self._lock:
            if self._idle:
                return self._idle.pop()
        return Replica(module)

    def give_back(self, replica: Replica) -> None:
        """Ends a `borrow`."""
        with self._lock:
            self._idle.append(replica)

    def __len__(self) -> int:
        return len(self._idle)


def _form(module: nn.Module) -> tuple[Any, ...]:
    """What a replica has copied of one module, to find out whether it still holds."""
    parts = {name: _Is(part) for name, part in module._modules.items()}
    parameters = {name: _Is(parameter) for name, parameter in module._parameters.items()}
    attributes = {k: _held(v) for k, v in module.__dict__.items() if k not in _FOLLOWED}
    return _Is(module), parts, parameters, {*module._buffers}, attributes


class _Is:
    """Equal to what has the very same value."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Is) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]


_PLAIN = frozenset((type(None), bool, int, float, str))


def _held(value: Any, depth: int = 3) -> Any:
    """Equal for as long as `value` is the same, and what it holds: a config may change in place."""
    if type(value) in _PLAIN:
        return value
    if isinstance(value, (list, tuple)) and depth > 0:
        return [v if type(v) in _PLAIN else _held(v, depth - 1) for v in value]
    if isinstance(value, Tensor):
        return _Is(value), 0 if value.is_inference() else value._version
    inside = value if isinstance(value, dict) else getattr(value, "__dict__", None)
    if not inside or depth == 0 or callable(value):  # modules, classes, functions
        return _Is(value)
    return _Is(value), {k: _held(v, depth - 1) for k, v in list(inside.items())}
