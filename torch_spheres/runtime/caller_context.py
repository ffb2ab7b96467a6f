"""Carries torch's thread-local settings from a calling thread to the threads that work for it.

Shards of a model and workers of a loader run in the context that `caller_context` captures.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
import torch.utils.checkpoint

from torch_spheres import _compat

__all__ = ["AUTOCAST_DEVICES", "CallerContext", "caller_context", "default_context"]

CallerContext = Callable[[], AbstractContextManager[None]]
AUTOCAST_DEVICES = ("cpu", "cuda", "xpu", "mps")


def caller_context() -> CallerContext:
    """Captures the calling thread's settings.

    The settings are grad and inference mode, autocast, torch-function modes (the default device is
    one), dispatch modes and the topmost saved-tensor hooks. A profiler is not captured, because
    torch gives Python no access to it; docs/training.md has ``profile_all_threads``. (Anomaly
    detection is not local to a thread.)

    Returns:
        A function whose result, a context manager, has the settings on any thread.

    Raises:
        NotImplementedError: called inside `torch.func` transforms (vmap, grad, jvp), whose levels
            belong to the calling thread, or inside an activation checkpoint that is not reentrant.
    """
    if _compat.functorch_level() is not None:
        raise NotImplementedError(
            "SphereParallel cannot run inside torch.func transforms (vmap, grad, jvp, ...), which "
            "live in the calling thread; apply them to the bare model.module"
        )
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    autocast = {
        device: torch.get_autocast_dtype(device)
        for device in AUTOCAST_DEVICES
        if torch.is_autocast_enabled(device)
    }
    function_modes = _compat.function_modes()
    dispatch_modes = _compat.dispatch_modes()
    hooks = _compat.saved_tensors_hooks()
    if hooks is not None and getattr(hooks[0], "__module__", "") == torch.utils.checkpoint.__name__:
        raise NotImplementedError(
            "SphereParallel cannot run inside torch.utils.checkpoint(..., use_reentrant=False), "
            "which expects what is saved in the order of one thread; checkpoint inside the module, "
            "or use use_reentrant=True around it"
        )

    if not any((inference, autocast, function_modes, dispatch_modes, hooks)):
        return lambda: torch.set_grad_enabled(grad)

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if inference:
                stack.enter_context(torch.inference_mode())
            stack.enter_context(torch.set_grad_enabled(grad))
            for device, dtype in autocast.items():
                # The cache of cast weights is process-wide: threads would clear each other's.
                stack.enter_context(torch.autocast(device, dtype, cache_enabled=False))
            if hooks is not None:
                stack.enter_context(torch.autograd.graph.saved_tensors_hooks(*hooks))
            # Not `with mode:`, which writes to the mode, and several threads have the same mode.
            for mode in dispatch_modes:
                _compat.push_dispatch_mode(mode)
                stack.callback(_compat.pop_dispatch_mode)
            for mode in function_modes:
                _compat.push_function_mode(mode)
                stack.callback(_compat.pop_function_mode)
            yield

    return context


@contextlib.contextmanager
def default_context() -> Iterator[None]:
    """Context with torch's defaults of all settings that `caller_context` captures.

    A sphere uses it for work of another caller in the middle of an item. Saved-tensor hooks stay,
    because torch has no way to take them off.
    """
    with contextlib.ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.enable_grad())
        for device in AUTOCAST_DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        for mode in reversed(_compat.dispatch_modes()):
            _compat.pop_dispatch_mode()
            stack.callback(_compat.push_dispatch_mode, mode)
        for mode in reversed(_compat.function_modes()):
            _compat.pop_function_mode()
            stack.callback(_compat.push_function_mode, mode)
        yield
