"""`CallArguments`: the arguments of one call, flattened once; used by `Engine` and `Split`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from torch_spheres.errors import DeferredError
from torch_spheres.training.pytree import Nesting, flatten, unflatten

__all__ = ["Argument", "CallArguments"]


class Argument(NamedTuple):
    """One argument, with its leaves and structure."""

    key: int | str  # number of a positional argument, name of a keyword argument
    value: Any
    leaves: list[Any]
    nesting: Nesting


class CallArguments:
    """The positional arguments of a call, then its keyword arguments.

    Attributes:
        args: the positional arguments.
        kwargs: the keyword arguments.
        each: all of them, flattened.
        caught: the TypeError for an argument that cannot be flattened. `Split` raises it, where
            other processes are told of it.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.args, self.kwargs = args, kwargs
        self.each: list[Argument] = []
        named: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        with DeferredError() as self.caught:
            for key, value in named:
                self.each.append(Argument(key, value, *flatten(value)))

    def flattened_by(self, is_leaf: Mapping[int | str, Callable[[Any], bool]]) -> CallArguments:
        """The same arguments, where some, by key, have other containers as leaves."""
        made = CallArguments.__new__(CallArguments)
        made.args, made.kwargs, made.caught = self.args, self.kwargs, self.caught
        made.each = [
            Argument(a.key, a.value, *flatten(a.value, is_leaf[a.key])) if a.key in is_leaf else a
            for a in self.each
        ]
        return made

    def copied(self) -> CallArguments:
        """The same in tensors, containers and key-value caches of their own, for a trial run."""
        leaves = (
            v.detach().clone().requires_grad_(v.requires_grad) if isinstance(v, Tensor) else v
            for v in self.leaves()
        )
        return CallArguments(*self.build(leaves))

    @property
    def keys(self) -> list[int | str]:
        """Of each argument: its number or name."""
        return [argument.key for argument in self.each]

    def leaves(self) -> Iterator[Any]:
        """The leaves of all arguments."""
        for argument in self.each:
            yield from argument.leaves

    def tensors(self) -> list[Tensor]:
        """The leaves that are tensors."""
        return [leaf for leaf in self.leaves() if isinstance(leaf, Tensor)]

    def build(self, leaves: Iterable[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments with other leaves."""
        rest = iter(leaves)
        values = [unflatten([next(rest) for _ in a.leaves], a.nesting) for a in self.each]
        count = len(self.args)
        return tuple(values[:count]), dict(zip(self.kwargs, values[count:], strict=True))
