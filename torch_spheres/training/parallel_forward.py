"""`ParallelForward`: the forward that callers of a parallel model see."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from torch_spheres import _compat

if TYPE_CHECKING:
    from torch_spheres.training.engine import Engine

__all__ = ["PARALLEL_FORWARD", "ParallelForward", "keeping_grad_mode"]

PARALLEL_FORWARD = "_parallel_forward"
"""The attribute of a parallel model that has its `ParallelForward`."""


class ParallelForward:
    """A forward that runs the engine, with signature and docstring of the module's own."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @property
    def shards(self) -> int:
        """Into how many shards a batch is cut."""
        return self.engine.shards

    @_compat.disable_compiler  # a graph break in code that is compiled around the call
    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102 - the module's own
        return self.run(args, kwargs)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs a call."""
        return keeping_grad_mode(lambda: self.engine.forward(self.engine.module, args, kwargs))

    def is_used_by(self, model: nn.Module) -> bool:
        """Whether calls of the model run this forward."""
        return vars(model).get(PARALLEL_FORWARD) is self

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The module's forward, as `functools.wraps` sets it; the module may change."""
        return self.engine.module.forward

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]
        return self.__wrapped__.__doc__

    @property
    def __func__(self) -> Callable[..., Any]:
        """As bound methods have it: accelerate wraps it in autocast and binds it to the model."""
        return _Unbound(self)

    def __getattr__(self, name: str) -> Any:
        # Python 3.14's functions have __annotate__ instead; torch.export reads the code.
        if name in (*functools.WRAPPER_ASSIGNMENTS, "__annotations__", "__code__"):
            return getattr(self.__wrapped__, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


def keeping_grad_mode(run: Callable[[], Any]) -> Any:
    """Runs a call; grad mode is afterwards what it was before.

    Ctrl-C may come between two lines of `torch.no_grad`, which are Python.
    """
    before = torch.is_grad_enabled()
    try:
        return run()
    finally:
        if torch.is_grad_enabled() != before:
            torch.set_grad_enabled(before)


class _Unbound:
    """The parallel forward of the model that it is called with, which may be a copy."""

    __slots__ = ("_bound",)

    def __init__(self, bound: ParallelForward) -> None:
        self._bound = bound

    def __call__(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return vars(model)[PARALLEL_FORWARD](*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        bound = inspect.signature(self._bound)
        first = inspect.Parameter("_self", inspect.Parameter.POSITIONAL_ONLY)
        return bound.replace(parameters=[first, *bound.parameters.values()])
