"""What the calling thread has set, for the threads that work on its behalf."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
import torch.utils.checkpoint
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

__all__ = ["CallerContext", "caller_context", "unset"]

CallerContext = Callable[[], AbstractContextManager[None]]
_AUTOCAST_DEVICES = ("cpu", "cuda", "xpu", "mps")


def caller_context() -> CallerContext:
    """Captures the thread's settings; what it returns sets them on another thread, for a block.

    Grad and inference mode, autocast, torch-function modes (the default device is one), dispatch
    modes, the saved-tensor hooks on top, anomaly detection is global anyway. A profiler is not
    among them: torch keeps it out of Python's reach; see ``profile_all_threads`` in the README.

    Raises:
        NotImplementedError: inside `torch.func` transforms (vmap, grad, jvp), whose levels live in
            the caller's thread, or inside a checkpoint that is not reentrant.
    """
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise NotImplementedError(
            "SphereParallel cannot run inside torch.func transforms (vmap, grad, jvp, ...), which "
            "live in the calling thread; apply them to the bare model.module"
        )
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    autocast = {
        device: torch.get_autocast_dtype(device)
        for device in _AUTOCAST_DEVICES
        if torch.is_autocast_enabled(device)
    }
    function_modes = _get_current_function_mode_stack()
    dispatch_modes = _get_current_dispatch_mode_stack()
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)  # noqa: FBT003
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
                # The cache of cast weights is one per process: threads would clear each other's.
                stack.enter_context(torch.autocast(device, dtype, cache_enabled=False))
            if hooks is not None:
                stack.enter_context(torch.autograd.graph.saved_tensors_hooks(*hooks))
            for mode in dispatch_modes:
                stack.enter_context(_pushed_dispatch(mode))
            for mode in function_modes:
                stack.enter_context(_pushed_function(mode))
            yield

    return context


@contextlib.contextmanager
def unset() -> Iterator[None]:
    """A block in which the calling thread has set nothing of what `caller_context` captures.

    For a thread of the spheres that does somebody else's work in the middle of its own. (But for
    saved-tensor hooks, which torch lets nobody take off.)
    """
    with contextlib.ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.enable_grad())
        for device in _AUTOCAST_DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        for dispatch in reversed(_get_current_dispatch_mode_stack()):
            stack.enter_context(_popped_dispatch(dispatch))
        for function in reversed(_get_current_function_mode_stack()):
            stack.enter_context(_popped_function(function))
        yield


# Not `with mode:`, which writes to the mode itself, and so from several threads at once.


@contextlib.contextmanager
def _pushed_function(mode: torch.overrides.TorchFunctionMode) -> Iterator[None]:
    torch._C._push_on_torch_function_stack(mode)
    try:
        yield
    finally:
        torch._C._pop_torch_function_stack()


@contextlib.contextmanager
def _pushed_dispatch(mode: torch.utils._python_dispatch.TorchDispatchMode) -> Iterator[None]:
    torch.utils._python_dispatch._push_mode(mode)
    try:
        yield
    finally:
        torch.utils._python_dispatch._pop_mode()


@contextlib.contextmanager
def _popped_function(mode: torch.overrides.TorchFunctionMode) -> Iterator[None]:
    torch._C._pop_torch_function_stack()
    try:
        yield
    finally:
        torch._C._push_on_torch_function_stack(mode)


@contextlib.contextmanager
def _popped_dispatch(mode: torch.utils._python_dispatch.TorchDispatchMode) -> Iterator[None]:
    torch.utils._python_dispatch._pop_mode()
    try:
        yield
    finally:
        torch.utils._python_dispatch._push_mode(mode)
