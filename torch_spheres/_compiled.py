"""What `torch.compile`, `torch.jit` and hooks of all modules leave on modules and threads."""

from __future__ import annotations

import contextlib
import importlib
from typing import Any

import torch
from torch import nn

__all__ = [
    "compile_as",
    "global_hooks",
    "has_compiled_functions",
    "is_compiled",
    "is_tracing",
    "static_shapes",
    "uncompiled",
]


def is_tracing() -> bool:
    """Whether `torch.jit.trace` is recording the calling thread."""
    return bool(torch.jit.is_tracing())  # type: ignore[no-untyped-call,attr-defined]


def has_compiled_functions(module: nn.Module) -> bool:
    """Whether a part of the module has a method, function or layer that `uncompiled` leaves as is.

    Methods of its class, and what lies on attributes or in lists and tuples on them.
    """
    for part in module.modules():
        if "_orig_mod" in part._modules:
            continue
        values = [v for name, v in vars(part).items() if name != "_compiled_call_impl"]
        values += (v for kind in type(part).__mro__ for v in vars(kind).values())
        for value in values:
            for each in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(each, nn.Module):
                    if any(map(is_compiled, each.modules())):
                        return True
                elif getattr(each, "_torchdynamo_orig_callable", None) is not None:
                    return True
    return False


def global_hooks() -> bool:
    """Whether there are hooks for the forward of every module of the process."""
    names = ("_global_forward_hooks", "_global_forward_pre_hooks")
    return any(getattr(nn.modules.module, name, None) for name in names)


def static_shapes() -> contextlib.AbstractContextManager[None]:
    """Context in which `torch.compile` compiles each number of rows separately.

    Otherwise there is also code for any number of rows, and which of the two a shard runs depends
    on which ran last in any thread.
    """
    # Not imported at the top, which would take a second.
    config: Any = importlib.import_module("torch._dynamo.config")
    patched: contextlib.AbstractContextManager[None] = config.patch(automatic_dynamic_shapes=False)
    return patched


def is_compiled(module: nn.Module) -> bool:
    """Whether the module itself, not only a part of it, was compiled."""
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


def uncompiled(module: nn.Module) -> nn.Module:
    """Takes `torch.compile` off the module and its parts, in place; returns the bare module."""
    module = getattr(module, "_orig_mod", module)
    for part in module.modules():
        part._compiled_call_impl = None
        for name, child in part._modules.items():
            part._modules[name] = getattr(child, "_orig_mod", child)
    return module


def compile_as(source: nn.Module, copied: nn.Module) -> None:
    """Compiles the copy of a module that was compiled, as the source was."""
    compiled: Any = source._compiled_call_impl  # of compile()
    if compiled is not None and compiled.__closure__ is not None:
        cells = zip(compiled.__code__.co_freevars, compiled.__closure__, strict=True)
        context = {name: cell.cell_contents for name, cell in cells}["self"]
        copied._compiled_call_impl = context(copied._call_impl)
    # What torch.compile returns has a forward that holds the module which was compiled.
    initialize = getattr(type(source), "_initialize", None)
    if "_orig_mod" in source._modules and "dynamo_ctx" in vars(source) and initialize is not None:
        initialize(copied)
