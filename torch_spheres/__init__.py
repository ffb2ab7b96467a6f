"""Worker threads in a hierarchy of kissing spheres, for PyTorch.

::

    import torch_spheres as ts

    with ts.KissingSpheres(levels=2) as spheres:
        squares = spheres.map(lambda x: x * x, range(100))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch_spheres.runtime.forks  # noqa: F401 - sees the forks that come from now on
from torch_spheres.runtime.default_pool import register_pool_class

if TYPE_CHECKING:
    from torch_spheres._core import NativeFunction, State, Topology, Work
    from torch_spheres.checkpoint import (
        checkpoint_state,
        load_checkpoint,
        restore_checkpoint_state,
        save_checkpoint,
    )
    from torch_spheres.data.loader import SphereLoader, wrap
    from torch_spheres.data.loader_stats import LoaderStats
    from torch_spheres.data.sampler import SphereBatchSampler
    from torch_spheres.data.worker_info import sample_seed
    from torch_spheres.errors import RankError, StoppedError
    from torch_spheres.observe.histogram import ITEM_TIME_EDGES_NS
    from torch_spheres.observe.plots import plot_loader, plot_timeline
    from torch_spheres.observe.sphere_stats import SphereStats
    from torch_spheres.observe.stats import Stats
    from torch_spheres.observe.tensorboard import StatsLog
    from torch_spheres.observe.trace import Arrow, Counter, Slice, Trace
    from torch_spheres.prepare_training import prepare
    from torch_spheres.reduction.partition import shard_bounds
    from torch_spheres.reduction.tree_sum import tree_sum
    from torch_spheres.runtime.cpu_count import usable_cores
    from torch_spheres.spheres import KissingSpheres
    from torch_spheres.training.gradient_hook import GradientHook
    from torch_spheres.training.metrics import gather_metrics
    from torch_spheres.training.module import SphereParallel
    from torch_spheres.training.parallelize import parallelize_
    from torch_spheres.training.shard_timing import ShardTimes
    from torch_spheres.training.sync_batch_norm import convert_sync_batchnorm

# Names are imported at their first use (PEP 562), so that a program imports only what it uses.
_MODULES = {
    "._core": "NativeFunction State Topology Work",
    ".checkpoint": "checkpoint_state load_checkpoint restore_checkpoint_state save_checkpoint",
    ".data.loader": "SphereLoader wrap",
    ".data.loader_stats": "LoaderStats",
    ".data.sampler": "SphereBatchSampler",
    ".data.worker_info": "sample_seed",
    ".errors": "RankError StoppedError",
    ".observe.plots": "plot_loader plot_timeline",
    ".observe.histogram": "ITEM_TIME_EDGES_NS",
    ".observe.sphere_stats": "SphereStats",
    ".observe.stats": "Stats",
    ".observe.tensorboard": "StatsLog",
    ".observe.trace": "Arrow Counter Slice Trace",
    ".prepare_training": "prepare",
    ".reduction.partition": "shard_bounds",
    ".reduction.tree_sum": "tree_sum",
    ".runtime.cpu_count": "usable_cores",
    ".spheres": "KissingSpheres",
    ".training.gradient_hook": "GradientHook",
    ".training.metrics": "gather_metrics",
    ".training.module": "SphereParallel",
    ".training.parallelize": "parallelize_",
    ".training.shard_timing": "ShardTimes",
    ".training.sync_batch_norm": "convert_sync_batchnorm",
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names.split()}

__all__ = [
    "ITEM_TIME_EDGES_NS",
    "Arrow",
    "Counter",
    "GradientHook",
    "KissingSpheres",
    "LoaderStats",
    "NativeFunction",
    "RankError",
    "ShardTimes",
    "Slice",
    "SphereBatchSampler",
    "SphereLoader",
    "SphereParallel",
    "SphereStats",
    "State",
    "Stats",
    "StatsLog",
    "StoppedError",
    "Topology",
    "Trace",
    "Work",
    "checkpoint_state",
    "convert_sync_batchnorm",
    "gather_metrics",
    "load_checkpoint",
    "parallelize_",
    "plot_loader",
    "plot_timeline",
    "prepare",
    "restore_checkpoint_state",
    "sample_seed",
    "save_checkpoint",
    "shard_bounds",
    "tree_sum",
    "usable_cores",
    "wrap",
]
__version__ = "0.1.0"


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(_MODULE_OF[name], __name__), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# Lower packages make a pool if the user gives none, and must not import this class themselves.
register_pool_class(lambda: importlib.import_module(".spheres", __name__).KissingSpheres)
