"""Worker threads in a hierarchy of kissing spheres, for PyTorch.

::

    import torch_spheres as ts

    with ts.KissingSpheres(levels=2) as spheres:
        squares = spheres.map(lambda x: x * x, range(100))
"""

from torch_spheres._core import NativeFunction, State, Topology, Work
from torch_spheres.checkpoint import (
    checkpoint_state,
    load_checkpoint,
    restore_checkpoint_state,
    save_checkpoint,
)
from torch_spheres.division import shard_bounds
from torch_spheres.errors import RankError, StoppedError
from torch_spheres.gradients import GradientHook
from torch_spheres.loader import SphereLoader, wrap
from torch_spheres.loading.info import sample_seed
from torch_spheres.loading.stats import LoaderStats
from torch_spheres.metrics import gather_metrics
from torch_spheres.parallel import SphereParallel
from torch_spheres.parallelize import parallelize_
from torch_spheres.plots import plot_loader, plot_timeline
from torch_spheres.prepare import prepare
from torch_spheres.sampler import SphereBatchSampler
from torch_spheres.stats import ITEM_TIME_EDGES_NS, SphereStats, Stats
from torch_spheres.stats_log import StatsLog
from torch_spheres.sync_batch_norm import convert_sync_batchnorm
from torch_spheres.system import KissingSpheres, usable_cores
from torch_spheres.trace import Arrow, Counter, Slice, Trace
from torch_spheres.tree import tree_sum
from torch_spheres.vector_math import settle as _settle

__all__ = [
    "ITEM_TIME_EDGES_NS",
    "Arrow",
    "Counter",
    "GradientHook",
    "KissingSpheres",
    "LoaderStats",
    "NativeFunction",
    "RankError",
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

_settle()
