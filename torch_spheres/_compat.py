"""Every use of a private PyTorch API, looked up once, on import, with what happens without it.

PyTorch may rename or drop what begins with an underscore in any release. So no other module of the
package touches such a name: functions and classes are looked up here, and the attributes of torch's
objects that others read are listed here. There are two kinds:

- with a public alternative, which is used where the private one is missing (``without=`` says what
  is different then);
- *needed* by a feature. Where it is missing, importing the package warns, and the feature refuses
  with the names that are missing (`require`); everything else works.

`tests/test_compat.py` lists them all and holds that nothing private is used elsewhere.
"""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
import random
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from torch_spheres import _core

__all__ = ["LOOKED_UP", "PrivateApi", "missing", "require"]

PARALLEL, LOADER = "SphereParallel", "wrap()"
RANKS, CHECKPOINT = "training in several processes", "a checkpoint"
_FEATURES = (PARALLEL, LOADER, RANKS, CHECKPOINT)
_NEWEST_TRIED = "2.15"


@dataclass(frozen=True)
class PrivateApi:
    """One name that is private to PyTorch."""

    path: str
    """From ``torch`` on."""
    needed_by: tuple[str, ...]
    """Features that refuse without it."""
    without: str
    """What is different without it, if no feature needs it."""
    found: bool


LOOKED_UP: list[PrivateApi] = []
"""In the order of this file."""


def _look_up(path: str, *needed_by: str, instead: Any = None, without: str = "") -> Any:
    """The object at a path; `instead` where there is none, which is recorded."""
    holder, _, name = path.rpartition(".")
    try:
        found, there = getattr(pkgutil.resolve_name(holder), name), True
    except (ImportError, AttributeError):
        found, there = instead, False
    LOOKED_UP.append(PrivateApi(path, needed_by, without, there))
    return found


def _look_at(of: str, example: Any, needed_by: tuple[str, ...], *names: str) -> None:
    """Records which attributes an object of torch's has, for other modules to use."""
    for name in names:
        found = hasattr(example, name)
        LOOKED_UP.append(PrivateApi(f"{of}.{name}", needed_by, "", found=found))


# ---- what the calling thread has set ----

function_modes: Callable[[], list[Any]] = _look_up(
    "torch.overrides._get_current_function_mode_stack", PARALLEL, LOADER, instead=list
)
push_function_mode = _look_up("torch._C._push_on_torch_function_stack", PARALLEL, LOADER)
pop_function_mode = _look_up("torch._C._pop_torch_function_stack", PARALLEL, LOADER)
dispatch_modes: Callable[[], list[Any]] = _look_up(
    "torch.utils._python_dispatch._get_current_dispatch_mode_stack", PARALLEL, LOADER, instead=list
)
push_dispatch_mode = _look_up("torch.utils._python_dispatch._push_mode", PARALLEL, LOADER)
pop_dispatch_mode = _look_up("torch.utils._python_dispatch._pop_mode", PARALLEL, LOADER)
functorch_level: Callable[[], Any] = _look_up(
    "torch._C._functorch.peek_interpreter_stack", PARALLEL, LOADER
)
is_functorch_wrapped: Callable[[Tensor], bool] = _look_up(
    "torch._C._functorch.is_functorch_wrapped_tensor",
    instead=lambda _: True,
    without="tensors in memory are loaded sample by sample",
)
_saved_tensors_hooks = _look_up(
    "torch._C._autograd._top_saved_tensors_default_hooks", PARALLEL, LOADER
)


def saved_tensors_hooks() -> tuple[Any, Any] | None:
    """The pair that `torch.autograd.graph.saved_tensors_hooks` has put on top, if any."""
    found: tuple[Any, Any] | None = _saved_tensors_hooks(False)  # noqa: FBT003
    return found


# ---- backward passes ----


_run_backward = _look_up(
    "torch.autograd.Variable._execution_engine.run_backward",
    without="torch.autograd.grad checks each shard's arguments, which takes as long as the "
    "engine itself for small ones",
)


def gradients(
    roots: Sequence[Tensor], grads: Sequence[Tensor], targets: Sequence[Tensor], keep: bool
) -> tuple[Tensor | None, ...]:
    """`torch.autograd.grad` of roots and gradients that fit each other: spared its checks."""
    if _run_backward is None:
        return torch.autograd.grad(roots, targets, grads, retain_graph=keep, allow_unused=True)
    found: tuple[Tensor | None, ...] = _run_backward(
        tuple(roots),
        tuple(grads),
        keep_graph=keep,
        create_graph=False,
        inputs=tuple(targets),
        allow_unreachable=True,
        accumulate_grad=False,
    )
    return found


after_backward: Callable[[Callable[[], None]], None] = _look_up(
    "torch.autograd.Variable._execution_engine.queue_callback", PARALLEL
)
keeps_graph: Callable[[], bool] = _look_up(
    "torch._C._autograd._get_current_graph_task_keep_graph",
    instead=lambda: True,
    without="the shards' graphs live as long as the outputs, as with retain_graph=True",
)
_look_up(
    "torch.autograd.profiler._is_profiler_enabled",
    without="shards are named for profilers even if none is there, which takes microseconds",
)


def profiler_is_on() -> bool:
    """Whether a profiler runs, in any thread."""
    # (The name holds a value, which torch replaces.)
    return bool(getattr(torch.autograd.profiler, "_is_profiler_enabled", True))


_look_up(
    "torch.autograd.forward_ad._current_level",
    without="forward-mode AD is not noticed, and the tangent is None",
)


def forward_ad_is_on() -> bool:
    """Whether there are dual tensors."""
    # (The name holds a value, which torch replaces.)
    return bool(getattr(torch.autograd.forward_ad, "_current_level", -1) >= 0)


def is_tracing() -> bool:
    """Whether `torch.jit.trace` records what the calling thread does."""
    return bool(torch.jit.is_tracing())  # type: ignore[no-untyped-call,attr-defined]


# ---- torch.compile ----

disable_compiler: Callable[[Any], Any] = _look_up(
    "torch._disable_dynamo",
    instead=lambda fn: torch.compiler.disable(fn),
    without="importing the package imports the compiler, which takes seconds",
)


_set_cuda_guard: Callable[[], None] = _look_up(
    "torch._C._ensureCUDADeviceGuardSet",
    instead=lambda: None,
    without="a build of torch for CUDA may crash where there is no device, see below",
)


def prepare_to_compile() -> None:
    """To be called on a thread that stays, before others compile.

    Where torch is built for CUDA and there is no device, the compiler puts something in CUDA's
    place; in torch 2.11 that is gone with the thread that did so first, and the next one crashes.
    """
    if not torch.cuda.is_available():
        _set_cuda_guard()


def static_shapes() -> contextlib.AbstractContextManager[None]:
    """Each number of rows gets compiled code of its own inside the block.

    With code for any number as well, which of the two a shard runs would depend on which was used
    last, by any thread.
    """
    # Not on import: it takes a second. Whoever runs compiled code has imported it.
    config: Any = importlib.import_module("torch._dynamo.config")
    patched: contextlib.AbstractContextManager[None] = config.patch(automatic_dynamic_shapes=False)
    return patched


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile was called on it, not on a part of it."""
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


def uncompiled(module: nn.Module) -> nn.Module:
    """The module without what `torch.compile` has made of it and its parts; it is changed."""
    module = getattr(module, "_orig_mod", module)
    for part in module.modules():
        part._compiled_call_impl = None
        for name, child in part._modules.items():
            part._modules[name] = getattr(child, "_orig_mod", child)
    return module


def compiler_context(module: nn.Module) -> Any:
    """What `torch.compile` keeps on the module that it returns, and nobody may copy; or None."""
    return vars(module).get("dynamo_ctx")


def compile_as(source: nn.Module, copied: nn.Module) -> None:
    """Where `nn.Module.compile` has compiled the source's own method, the copy compiles its own."""
    compiled: Any = source._compiled_call_impl
    if compiled is not None and compiled.__closure__ is not None:
        cells = zip(compiled.__code__.co_freevars, compiled.__closure__, strict=True)
        context = {name: cell.cell_contents for name, cell in cells}["self"]
        copied._compiled_call_impl = context(copied._call_impl)


# ---- random numbers ----

DispatchKeySet = _look_up("torch._C.DispatchKeySet", PARALLEL, LOADER, instead=repr)
_dispatch_key_parse = _look_up("torch._C._dispatch_key_parse", PARALLEL, LOADER)


def _dispatch_key(name: str) -> Any:
    """The key, which `torch._C.DispatchKey` does not list, or None."""
    key = None
    with contextlib.suppress(RuntimeError, TypeError):
        key = _dispatch_key_parse(name)
    there = key is not None
    LOOKED_UP.append(PrivateApi(f"dispatch key {name}", (PARALLEL, LOADER), "", there))
    return key


DRAW_KEY = "DeferredInit"
"""Declared by PyTorch, and used for nothing there; see runtime/rng.py."""
draw_key = _dispatch_key(DRAW_KEY)
IncludeDispatchKey = _look_up("torch._C._IncludeDispatchKeyGuard", PARALLEL, LOADER)
ExcludeDispatchKey = _look_up("torch._C._ExcludeDispatchKeyGuard", PARALLEL, LOADER)
operator_schemas: Callable[[], list[Any]] = _look_up(
    "torch._C._jit_get_all_schemas", PARALLEL, LOADER
)

# ---- tensors ----

pytree: Any = _look_up("torch.utils._pytree", *_FEATURES)
dlpack_exchange: Any = _look_up(
    "torch.Tensor.__dlpack_c_exchange_api__",
    without="C++ asks tensors for their memory by Python calls, half a microsecond for each",
)
_core.read_tensors_by(dlpack_exchange)

# ---- the loader ----

DatasetKind: Any = _look_up("torch.utils.data._DatasetKind", LOADER)
BaseIterator: Any = _look_up(
    "torch.utils.data.dataloader._BaseDataLoaderIter", LOADER, instead=object
)
collate_fns: dict[Any, Any] = _look_up(
    "torch.utils.data._utils.collate.default_collate_fn_map", LOADER, instead={}
)
collate_tensors: Any = _look_up("torch.utils.data._utils.collate.collate_tensor_fn", LOADER)
numpy_seed: Callable[[int, int], Any] = _look_up(
    "torch.utils.data._utils.worker._generate_state", LOADER
)
_WorkerInfo: Any = _look_up("torch.utils.data._utils.worker.WorkerInfo", LOADER)
_worker: Any = _look_up("torch.utils.data._utils.worker", LOADER)


def map_having(method: str, fn: Callable[[Any], Any], batch: Any) -> Any:
    """The batch with `fn` of what has the method: tensors, packed sequences, users' types."""

    def has(value: Any) -> bool:
        return hasattr(value, method)

    # (A PackedSequence is a named tuple that is taken as a whole.)
    return pytree.tree_map(lambda leaf: fn(leaf) if has(leaf) else leaf, batch, is_leaf=has)


def _pin_memory(data: Any, device: str | None = None) -> Any:
    """Pins what torch's own function pins; containers come back as pytree makes them."""
    del device  # torch has deprecated it: there is one accelerator
    return map_having("pin_memory", lambda value: value.pin_memory(), data)


pin_memory: Callable[..., Any] = _look_up(
    "torch.utils.data._utils.pin_memory.pin_memory",
    instead=_pin_memory,
    without="batches of mappings and sequences that pytree does not know are not pinned",
)


@dataclass
class _Rng:
    """As later releases of torch have it."""

    random_generator: random.Random
    torch_generator: torch.Generator
    numpy_generator: Any = None


_RNG: Any = _look_up(
    "torch.utils.data._utils.worker._RNG",
    instead=_Rng,
    without="the class of get_worker_info().rng is torch_spheres' own",
)


def worker_info(
    worker: int, workers: int, seed: int, dataset: Any, generators: tuple[Any, Any, Any]
) -> Any:
    """What `torch.utils.data.get_worker_info` returns in a worker.

    Args:
        worker: its number.
        workers: how many there are.
        seed: of the worker.
        dataset: its own.
        generators: of Python, torch and numpy.
    """
    return _WorkerInfo(
        id=worker,
        num_workers=workers,
        seed=seed,
        dataset=dataset,
        rng=_RNG(*generators),
        worker_method="thread",
    )


def answer_worker_info(here: Any) -> None:
    """Has `get_worker_info` return ``here.info`` in every thread, where that is not None.

    There, ``here.asked`` is True from then on.

    Users have imported the function by name, so it cannot be replaced; its code can. What it was
    answers for all other threads: those of worker processes, and of torch's own thread workers.
    """
    if hasattr(_worker, "_torch_spheres_here"):
        return
    function = _worker.get_worker_info
    assert isinstance(function, FunctionType)
    plain = FunctionType(
        function.__code__, function.__globals__, "get_worker_info", None, function.__closure__
    )
    _worker._torch_spheres_here, _worker._torch_spheres_plain = here, plain
    function.__code__ = _answer.__code__


def _answer() -> Any:
    # Runs as the code of get_worker_info: these are globals of torch.utils.data._utils.worker.
    here = _torch_spheres_here  # type: ignore[name-defined] # noqa: F821
    info = here.info
    if info is None:
        return _torch_spheres_plain()  # type: ignore[name-defined] # noqa: F821
    here.asked = True
    return info


# ---- losses ----


def backward_roots() -> tuple[Tensor, ...]:
    """What ``backward()`` was called on, inside of the backward of a node; empty if unknown."""
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code is not torch.autograd.backward.__code__:
        frame = frame.f_back
    roots = None if frame is None else frame.f_locals.get("tensors")
    roots = roots if isinstance(roots, (tuple, list)) else (roots,)
    return tuple(root for root in roots if isinstance(root, Tensor))


def reduction_of(node: Any) -> str | None:
    """``"mean"`` or ``"sum"``, where a node of autograd's is a loss that says so."""
    said: Any = getattr(node, "_saved_reduction", None)
    return {1: "mean", 2: "sum"}.get(said)


# ---- several processes ----

default_store: Callable[[], Any] = _look_up(
    "torch.distributed.distributed_c10d._get_default_store", RANKS
)

# ---- attributes ----

FORWARD_HOOKS = (
    "_backward_pre_hooks",
    "_backward_hooks",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)
"""Dicts of hooks of an `nn.Module` at which its forward looks."""
OTHER_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
    "_non_persistent_buffers_set",
)
"""What an `nn.Module` keeps, and its forward does not look at."""
SHARED_REGISTRIES = ("_parameters", "_buffers", "_modules", *OTHER_HOOKS)
"""What `SphereParallel` has in common with its module: all that is not about calls."""
COMPILED = ("_compiled_call_impl",)
"""What `nn.Module.compile` leaves on a module."""

_look_at(
    "nn.Module", nn.Module(), (PARALLEL,), "_parameters", "_buffers", "_modules",
    "_compiled_call_impl", "_call_impl", *FORWARD_HOOKS, *OTHER_HOOKS,
)  # fmt: skip
_look_at("Tensor", torch.empty(0, device="cpu"), (PARALLEL, LOADER), "_version")
_look_at("Tensor", torch.empty(0, device="cpu"), (PARALLEL,), "_backward_hooks")
_look_at(
    "Distribution", torch.distributions.Distribution(validate_args=False), (PARALLEL,),
    "_batch_shape",
)  # fmt: skip
_look_at(
    "Transform", torch.distributions.Transform(cache_size=1), (PARALLEL,), "_inv", "_cached_x_y"
)
_look_at("Generator", torch.default_generator, (PARALLEL, LOADER), "_cdata")


def _iterator(loader: Any) -> Any:
    """One to look at; None if this torch cannot make it, so that nothing is found."""
    try:
        with torch.device("cpu"):  # whatever the default device is
            return iter(loader)
    except Exception:  # noqa: BLE001 - then wrap() refuses, and the rest works
        return None


# (With a generator of its own: the seed that the iterator draws is nobody's.)
_loader: Any = DataLoader([0], generator=torch.Generator("cpu"))  # type: ignore[arg-type]
_look_at(
    "DataLoader", _loader, (LOADER,), "_get_iterator", "_iterator", "_dataset_kind",
    "_auto_collation", "_index_sampler", "check_worker_number_rationality",
)  # fmt: skip
_look_at(
    "DataLoader's iterator", _iterator(_loader), (LOADER,), "_auto_collation", "_base_seed",
    "_collate_fn", "_dataset", "_dataset_kind", "_drop_last", "_index_sampler", "_next_data",
    "_next_index", "_num_workers", "_num_yielded", "_persistent_workers", "_pin_memory",
    "_pin_memory_device", "_reset", "_sampler_iter", "_timeout",
)  # fmt: skip
del _loader


def missing(feature: str) -> list[str]:
    """What this torch lacks of what a feature needs."""
    return [api.path for api in LOOKED_UP if not api.found and feature in api.needed_by]


_MISSING = {feature: missing(feature) for feature in _FEATURES}


def require(feature: str) -> None:
    """To be called before a feature is used.

    Raises:
        RuntimeError: this torch lacks something that the feature needs.
    """
    if _MISSING[feature]:
        raise RuntimeError(_text(feature))


def _text(feature: str) -> str:
    return (
        f"torch {torch.__version__} does not have {', '.join(_MISSING[feature])}, which {feature} "
        f"needs; use another version (torch 2.8 to {_NEWEST_TRIED} have been tried), or a newer "
        "torch_spheres"
    )


for _feature in _MISSING:
    if _MISSING[_feature]:
        warnings.warn(f"torch_spheres: {_text(_feature)}", RuntimeWarning, stacklevel=2)
