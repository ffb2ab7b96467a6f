"""`SplitOptions`: which arguments the user wants cut by rows, and along which dimension.

They have the model's `CallFindings`, which row_check.py and row_dims.py fill.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from types import MethodType
from typing import TYPE_CHECKING, Any

from torch import nn

from torch_spheres.runtime.arguments import as_index

if TYPE_CHECKING:
    from torch_spheres.training.row_check import Comparison

__all__ = ["CallFindings", "SplitOptions", "argument_name"]

_SCALARS = ("mean", "sum")


class CallFindings:
    """What the calls of one model have shown so far.   Any thread.

    Attributes:
        lock: held while a call is compared: one comparison for each form of call is enough.
        comparisons: with the bare module, by the form of the call.
        unambiguous: places of arguments that were no square matrix, or no list as long as the
            batch, in some call, and so are not what they look like in a call where they are.
        equal_rows: number of comparisons in which all rows were equal, by the form of the call.
        states: of the module's flags, see row_check.py; None if they change too often to matter.
        has_trained: whether the model has been compared in training mode.
        warned: whether the user has been warned that the model is not row-wise.
        warned_of_loss: the same of a loss of `forward_backward`.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.comparisons: dict[Hashable, list[Comparison]] = {}
        self.unambiguous: set[Hashable] = set()
        self.equal_rows: Counter[Hashable] = Counter()
        self.states: set[Hashable] | None = set()
        self.has_trained = False
        self.warned = self.warned_of_loss = False

    def __reduce__(self) -> tuple[type[CallFindings], tuple[()]]:
        return CallFindings, ()  # a copy of the model finds out anew


@dataclass(frozen=True)
class SplitOptions:
    """How arguments are cut into shards, and outputs without dimensions merged.

    Args:
        batch_dim: dimension of the batch's rows in all arguments, or in those that are named; in
            others it is 0.
        whole: names of arguments that every shard gets as they are.
        scalars: ``"mean"``, weighted by the shards' rows, or ``"sum"``.

    Raises:
        TypeError: an option is of another type.
        ValueError: an option has another value, or an argument is named in two of them.
    """

    batch_dim: int | Mapping[str, int] = 0
    whole: tuple[str, ...] = ()
    scalars: str = "mean"
    findings: CallFindings = field(
        default_factory=CallFindings, init=False, compare=False, repr=False
    )

    def __post_init__(self) -> None:
        dims: Any = self.batch_dim
        if isinstance(dims, Mapping):
            for name, dim in dims.items():
                if not isinstance(name, str):
                    raise TypeError(f"batch_dim must have names of arguments, got {name!r}")
                as_index(f"batch_dim[{name!r}]", dim, 0)
            dims = {name: int(dim) for name, dim in dims.items()}
        else:
            dims = as_index("batch_dim", dims, 0)
        names: Any = self.whole
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise TypeError(
                f"whole must be names of arguments, such as whole=('mask',), got {names!r}"
            )
        whole = tuple(names)
        twice = [name for name in whole if isinstance(dims, dict) and name in dims]
        if twice:
            raise ValueError(f"arguments {twice} are in batch_dim and in whole")
        if self.scalars not in _SCALARS:
            raise ValueError(f"scalars must be 'mean' or 'sum', got {self.scalars!r}")
        object.__setattr__(self, "batch_dim", dims)
        object.__setattr__(self, "whole", whole)

    def check_names(self, module: nn.Module) -> None:
        """Raises a ValueError for names that are no arguments of the module's forward."""
        named = [*self.whole, *(self.batch_dim if isinstance(self.batch_dim, dict) else ())]
        known = _parameters(module)
        if not named or known is None or known.any_keyword:
            return
        for name in named:
            if name not in known.all:
                raise ValueError(
                    f"batch_dim= or whole= has {name!r}, which is no argument of "
                    f"{type(module).__name__}.forward; it has {[*known.all]}"
                )

    @property
    def names_arguments(self) -> bool:
        """Whether arguments are named."""
        return bool(self.whole) or isinstance(self.batch_dim, dict)

    @property
    def default_dim(self) -> int:
        """The batch dimension of arguments that are not named."""
        return self.batch_dim if isinstance(self.batch_dim, int) else 0

    def dim_of(self, name: str) -> tuple[int | None, bool]:
        """An argument's batch dimension, None if it is not cut; and whether it was named."""
        if name in self.whole:
            return None, True
        if isinstance(self.batch_dim, dict) and name in self.batch_dim:
            return self.batch_dim[name], True
        return self.default_dim, False


@dataclass(frozen=True)
class _Parameters:
    """The parameters of a forward."""

    positional: tuple[str, ...]
    rest: str | None  # the name of ``*args``
    any_keyword: bool
    all: tuple[str, ...]


_known: weakref.WeakKeyDictionary[Any, _Parameters] = weakref.WeakKeyDictionary()


def _parameters(module: nn.Module) -> _Parameters | None:
    """The parameters of the module's forward; None if it has no signature."""
    forward: Any = module.forward
    bound = isinstance(forward, MethodType)
    function = forward.__func__ if bound else forward
    try:
        found = _known.get(function)
    except TypeError:  # no weak reference to it
        found = None
    if found is None:
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError):
            return None
        found = _read(signature)
        if type(function).__weakrefoffset__:
            _known[function] = found
    if not bound:
        return found
    others = tuple(name for name in found.all if name not in found.positional[:1])  # without self
    return _Parameters(found.positional[1:], found.rest, found.any_keyword, others)


def _read(signature: inspect.Signature) -> _Parameters:
    kinds = {p.name: p.kind for p in signature.parameters.values()}
    first = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    rest = [name for name, kind in kinds.items() if kind is inspect.Parameter.VAR_POSITIONAL]
    others = [name for name, kind in kinds.items() if kind is inspect.Parameter.VAR_KEYWORD]
    return _Parameters(
        positional=tuple(name for name, kind in kinds.items() if kind in first),
        rest=rest[0] if rest else None,
        any_keyword=bool(others),
        all=tuple(name for name in kinds if name not in others),
    )


def argument_name(module: nn.Module | None, key: str | int) -> str:
    """The name of a positional argument, by its number, as the module's forward has it."""
    if isinstance(key, str):
        return key
    known = None if module is None else _parameters(module)
    if known is not None and key < len(known.positional):
        return known.positional[key]
    if known is not None and known.rest is not None:
        return known.rest
    return f"argument {key}"
