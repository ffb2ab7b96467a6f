"""Every use of a private PyTorch API, looked up once on import, with its fallback.

PyTorch may rename or drop what begins with an underscore in any release, so no other module of the
package uses such a name: functions and classes are looked up here, and the private attributes of
torch's objects that other modules read are listed here. A name has either

- a public alternative, used where the name is missing (``without=`` says what differs then); or
- features that need it. Where the name is missing, importing the package warns, and these features
  refuse (`require`) with the names that are missing; everything else works.

`tests/test_compat.py` tries all names; `tests/test_private_names.py` holds that nothing private is
used elsewhere.
"""

from __future__ import annotations

import contextlib
import pkgutil
import random
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from torch_spheres._compiled import compile_as, is_compiled, is_tracing, static_shapes, uncompiled

__all__ = ["LOOKED_UP", "PrivateApi", "missing", "require"]
__all__ += ["compile_as", "is_compiled", "is_tracing", "static_shapes", "uncompiled"]

PARALLEL, LOADER = "SphereParallel", "wrap()"
RANKS, CHECKPOINT = "training in several processes", "a checkpoint"
_BOTH = (PARALLEL, LOADER)
_FEATURES = (*_BOTH, RANKS, CHECKPOINT)
_NEWEST_TRIED = "2.15"


@dataclass(frozen=True)
class PrivateApi:
    """One private name of PyTorch."""

    path: str
    needed_by: tuple[str, ...]
    """Features that refuse without the name."""
    without: str
    """What differs without the name, if no feature needs it."""
    found: bool


LOOKED_UP: list[PrivateApi] = []


def _look_up(path: str, *needed_by: str, instead: Any = None, without: str = "") -> Any:
    """Returns the object at a path, or `instead`; records whether it was found."""
    holder, _, name = path.rpartition(".")
    try:
        found, there = getattr(pkgutil.resolve_name(holder), name), True
    except (ImportError, AttributeError):
        found, there = instead, False
    LOOKED_UP.append(PrivateApi(path, needed_by, without, there))
    return found


def _look_at(of: str, example: Any, needed_by: tuple[str, ...], names: str) -> None:
    """Records which attributes an object of torch has; other modules use them."""
    for name in names.split():
        found = hasattr(example, name)
        LOOKED_UP.append(PrivateApi(f"{of}.{name}", needed_by, "", found=found))


# ---- settings of the calling thread ----

function_modes: Callable[[], list[Any]] = _look_up(
    "torch.overrides._get_current_function_mode_stack", *_BOTH, instead=list
)
push_function_mode = _look_up("torch._C._push_on_torch_function_stack", *_BOTH)
pop_function_mode = _look_up("torch._C._pop_torch_function_stack", *_BOTH)
dispatch_modes: Callable[[], list[Any]] = _look_up(
    "torch.utils._python_dispatch._get_current_dispatch_mode_stack", *_BOTH, instead=list
)
push_dispatch_mode = _look_up("torch.utils._python_dispatch._push_mode", *_BOTH)
pop_dispatch_mode = _look_up("torch.utils._python_dispatch._pop_mode", *_BOTH)
dispatch_mode_of = _look_up("torch._C._get_dispatch_mode", *_BOTH)
dispatch_mode_keys = _look_up("torch._C._TorchDispatchModeKey", *_BOTH)
functorch_level: Callable[[], Any] = _look_up("torch._C._functorch.peek_interpreter_stack", *_BOTH)
is_functorch_wrapped: Callable[[Tensor], bool] = _look_up(
    "torch._C._functorch.is_functorch_wrapped_tensor",
    instead=lambda _: True,
    without="tensors in memory are loaded sample by sample",
)
_saved_tensors_hooks = _look_up("torch._C._autograd._top_saved_tensors_default_hooks", *_BOTH)


def saved_tensors_hooks() -> tuple[Any, Any] | None:
    """The innermost pair of `torch.autograd.graph.saved_tensors_hooks`, if any."""
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
    """`torch.autograd.grad` without its checks; `roots` and `grads` must fit each other."""
    if _run_backward is None:
        return torch.autograd.grad(roots, targets, grads, retain_graph=keep, allow_unused=True)
    found: tuple[Tensor | None, ...] = _run_backward(
        tuple(roots), tuple(grads), keep_graph=keep, create_graph=False, inputs=tuple(targets),
        allow_unreachable=True, accumulate_grad=False,
    )  # fmt: skip
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
    # Not looked up once: torch assigns another value to the name.
    return bool(getattr(torch.autograd.profiler, "_is_profiler_enabled", True))


_look_up(
    "torch.autograd.forward_ad._current_level",
    without="forward-mode AD is not noticed, and the tangent is None",
)


def forward_ad_is_on() -> bool:
    """Whether a `torch.autograd.forward_ad.dual_level` is entered."""
    return bool(getattr(torch.autograd.forward_ad, "_current_level", -1) >= 0)


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
    """Has to be called on a thread that lives on, before other threads compile.

    In a build for CUDA without a device the compiler installs a stand-in for CUDA's device guard.
    In torch 2.11 it vanishes with the thread that installed it, and the next compilation crashes.
    """
    if not torch.cuda.is_available():
        _set_cuda_guard()


# ---- random numbers ----

DispatchKeySet = _look_up("torch._C.DispatchKeySet", *_BOTH, instead=repr)
_dispatch_key_parse = _look_up("torch._C._dispatch_key_parse", *_BOTH)
DRAW_KEY = "DeferredInit"
"""A dispatch key that PyTorch declares and does not use; see runtime/rng.py."""
draw_key: Any = None
with contextlib.suppress(RuntimeError, TypeError):  # torch._C.DispatchKey does not list every key
    draw_key = _dispatch_key_parse(DRAW_KEY)
LOOKED_UP.append(PrivateApi(f"dispatch key {DRAW_KEY}", _BOTH, "", found=draw_key is not None))
IncludeDispatchKey = _look_up("torch._C._IncludeDispatchKeyGuard", *_BOTH)
ExcludeDispatchKey = _look_up("torch._C._ExcludeDispatchKeyGuard", *_BOTH)
operator_schemas: Callable[[], list[Any]] = _look_up("torch._C._jit_get_all_schemas", *_BOTH)

# ---- tensors ----

pytree: Any = _look_up("torch.utils._pytree", *_FEATURES)
dlpack_exchange: Any = _look_up(
    "torch.Tensor.__dlpack_c_exchange_api__",
    without="C++ asks tensors for their memory by Python calls, half a microsecond for each",
)

# ---- the loader ----

DatasetKind: Any = _look_up("torch.utils.data._DatasetKind", LOADER)
BaseIterator: Any = _look_up(
    "torch.utils.data.dataloader._BaseDataLoaderIter", LOADER, instead=object
)
_UTILS = "torch.utils.data._utils"
collate_fns: Any = _look_up(f"{_UTILS}.collate.default_collate_fn_map", LOADER, instead={})
collate_tensors: Any = _look_up(f"{_UTILS}.collate.collate_tensor_fn", LOADER)
numpy_seed: Callable[[int, int], Any] = _look_up(f"{_UTILS}.worker._generate_state", LOADER)
_WorkerInfo: Any = _look_up(f"{_UTILS}.worker.WorkerInfo", LOADER)
_worker: Any = _look_up(f"{_UTILS}.worker", LOADER)


def map_having(method: str, fn: Callable[[Any], Any], batch: Any) -> Any:
    """Applies `fn` to the parts of a batch that have a method: tensors, users' own types."""

    def has(value: Any) -> bool:
        return hasattr(value, method)

    # `is_leaf`: a PackedSequence, which is a named tuple, is one part.
    return pytree.tree_map(lambda leaf: fn(leaf) if has(leaf) else leaf, batch, is_leaf=has)


def _pin_memory(data: Any, _device: str | None = None) -> Any:
    return map_having("pin_memory", lambda value: value.pin_memory(), data)


pin_memory: Callable[..., Any] = _look_up(
    f"{_UTILS}.pin_memory.pin_memory",
    instead=_pin_memory,
    without="batches of mappings and sequences that pytree does not know are not pinned",
)


@dataclass
class _Rng:
    """The same class as in torch 2.13 and later."""

    random_generator: random.Random
    torch_generator: torch.Generator
    numpy_generator: Any = None


_RNG: Any = _look_up(
    f"{_UTILS}.worker._RNG",
    instead=_Rng,
    without="the class of get_worker_info().rng is torch_spheres' own",
)


def worker_info(
    worker: int, workers: int, seed: int, dataset: Any, generators: tuple[Any, Any, Any]
) -> Any:
    """The value of ``get_worker_info()`` in a worker; `generators`: of Python, torch and numpy."""
    return _WorkerInfo(
        id=worker, num_workers=workers, seed=seed, dataset=dataset, rng=_RNG(*generators),
        worker_method="thread",
    )  # fmt: skip


def answer_worker_info(here: Any) -> None:
    """Has `get_worker_info` return ``here.info`` in threads where that is not None.

    It also sets ``here.asked`` to True there. In all other threads, such as those of worker
    processes, it does what it did before.

    Args:
        here: a `threading.local`.
    """
    # Users have imported the function by name, so not the function but its code is replaced.
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
    # The code of get_worker_info, whose globals are those of torch.utils.data._utils.worker.
    here = _torch_spheres_here  # type: ignore[name-defined] # noqa: F821
    info = here.info
    if info is None:
        return _torch_spheres_plain()  # type: ignore[name-defined] # noqa: F821
    here.asked = True
    return info


# ---- losses ----


def backward_roots() -> tuple[Tensor, ...]:
    """Inside a node's backward: the tensors of the ``backward()`` call; empty if unknown."""
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code is not torch.autograd.backward.__code__:
        frame = frame.f_back
    roots = None if frame is None else frame.f_locals.get("tensors")
    roots = roots if isinstance(roots, (tuple, list)) else (roots,)
    return tuple(root for root in roots if isinstance(root, Tensor))


def reduction_of(node: Any) -> str | None:
    """``"mean"`` or ``"sum"`` if the autograd node is a loss with that reduction, else None."""
    reduction: Any = getattr(node, "_saved_reduction", None)
    return {1: "mean", 2: "sum"}.get(reduction)


default_store: Callable[[], Any] = _look_up(
    "torch.distributed.distributed_c10d._get_default_store", RANKS
)

# ---- attributes ----

FORWARD_HOOKS = (
    "_backward_pre_hooks", "_backward_hooks", "_forward_hooks", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
)  # fmt: skip
"""Dicts of an `nn.Module` that its call reads."""
OTHER_HOOKS = (
    "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks", "_non_persistent_buffers_set",
)  # fmt: skip
"""Registries of an `nn.Module` that its call does not read."""
SHARED_REGISTRIES = ("_parameters", "_buffers", "_modules", *OTHER_HOOKS)
"""Registries that a `SphereParallel` shares with its module."""
COMPILED = ("_compiled_call_impl",)
"""Attributes that `nn.Module.compile` sets."""

_of_modules = ("_parameters", "_buffers", "_modules", *COMPILED, "_call_impl", *FORWARD_HOOKS)
_look_at("nn.Module", nn.Module(), (PARALLEL,), " ".join((*_of_modules, *OTHER_HOOKS)))
_look_at("Tensor", torch.empty(0, device="cpu"), _BOTH, "_version")
_look_at("Tensor", torch.empty(0, device="cpu"), (PARALLEL,), "_backward_hooks")
_distribution = torch.distributions.Distribution(validate_args=False)
_look_at("Distribution", _distribution, (PARALLEL,), "_batch_shape")
_transform = torch.distributions.Transform(cache_size=1)
_look_at("Transform", _transform, (PARALLEL,), "_inv _cached_x_y")
_look_at("Generator", torch.default_generator, _BOTH, "_cdata")


def _iterator(loader: Any) -> Any:
    try:
        with torch.device("cpu"):  # whatever the default device is
            return iter(loader)
    except Exception:  # noqa: BLE001 - then wrap() refuses, and the rest works
        return None


# With a generator of its own, because an iterator draws a seed.
_loader: Any = DataLoader([0], generator=torch.Generator("cpu"))  # type: ignore[arg-type]
_look_at(
    "DataLoader", _loader, (LOADER,),
    "_get_iterator _iterator _dataset_kind _auto_collation _index_sampler "
    "check_worker_number_rationality",
)  # fmt: skip
_look_at(
    "DataLoader's iterator", _iterator(_loader), (LOADER,),
    "_auto_collation _base_seed _collate_fn _dataset _dataset_kind _drop_last _index_sampler "
    "_next_data _next_index _num_workers _num_yielded _persistent_workers _pin_memory "
    "_pin_memory_device _reset _sampler_iter _timeout",
)  # fmt: skip
del _loader, _distribution, _transform


def missing(feature: str) -> list[str]:
    """The names that a feature needs and this torch does not have."""
    return [api.path for api in LOOKED_UP if not api.found and feature in api.needed_by]


_MISSING = {feature: missing(feature) for feature in _FEATURES}


def require(feature: str) -> None:
    """Is called before a feature is used.

    Raises:
        RuntimeError: this torch lacks something that the feature needs.
    """
    if _MISSING[feature]:
        raise RuntimeError(_refusal(feature))


def _refusal(feature: str) -> str:
    return (
        f"torch {torch.__version__} does not have {', '.join(_MISSING[feature])}, which {feature} "
        f"needs; use another version (torch 2.8 to {_NEWEST_TRIED} have been tried), or a newer "
        "torch_spheres"
    )


for _feature in _MISSING:
    if _MISSING[_feature]:
        warnings.warn(f"torch_spheres: {_refusal(_feature)}", RuntimeWarning, stacklevel=2)
