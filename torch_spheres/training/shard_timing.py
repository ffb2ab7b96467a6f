"""How long a batch takes in other numbers of shards: for `suggest_shards` and the slow warning."""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torch_spheres import _compat
from torch_spheres.reduction.partition import possible_world_sizes
from torch_spheres.runtime.rng import TrialRandom
from torch_spheres.training.autotune import Plan, reproducible_ways
from torch_spheres.training.batch_split import Split
from torch_spheres.training.buffers import needs_two_rows
from torch_spheres.training.call_arguments import CallArguments
from torch_spheres.training.executor import ShardExecutor
from torch_spheres.training.lazy_modules import is_lazy
from torch_spheres.training.pytree import flatten
from torch_spheres.training.replica import Replica
from torch_spheres.training.sync_batch_norm import waits_for_others

if TYPE_CHECKING:
    from torch_spheres.training.engine import Engine

__all__ = ["ShardTimes", "bare_copy", "count_shards", "suggest_shards", "time_shards"]

_CLOSE = 1.05  # of the least time: then more shards are the better ones, since they spread wider


@dataclass(frozen=True)
class ShardTimes:
    """What `SphereParallel.suggest_shards` has measured; print it to read it.

    Attributes:
        rows: of the batch that was measured.
        ratios: for each number of shards, the time of a forward and a backward, as a multiple of
            plain PyTorch's for the whole batch with its intra-op threads.
    """

    rows: int
    ratios: dict[int, float]

    @property
    def best(self) -> int:
        """The largest number of shards that takes at most 1.05 times of the least time."""
        least = min(self.ratios.values())
        return max(shards for shards, ratio in self.ratios.items() if ratio <= _CLOSE * least)

    def __str__(self) -> str:
        texts = [f"{n} of {self.rows / n:.3g} rows {r:.2f}x" for n, r in self.ratios.items()]
        return (
            f"shards, and the time of a step as a multiple of plain PyTorch's: {', '.join(texts)}; "
            f"shards={self.best} is the best here"
        )


def bare_copy(module: nn.Module, *, compiled: bool = True, hooks: bool = False) -> nn.Module:
    """The module on the same parameters, with copies of its buffers.

    Args:
        module: the user's.
        compiled: whether the copy is, if the module is.
        hooks: whether the copy has the module's.
    """
    replica = Replica(module)
    replica.rebind([[*vars(part)] for part in module.modules()], hooks=hooks)
    replica.begin_shard()
    return replica.module if compiled else _compat.uncompiled(replica.module)


def count_shards(engine: Engine, arguments: CallArguments, shards: int) -> int:
    """How many shards of `shards` a batch is cut into: fewer if it has few rows."""
    return len(_cut(engine, arguments, shards).bounds)


def _cut(engine: Engine, arguments: CallArguments, shards: int) -> Split:
    least = 2 if any(map(needs_two_rows, engine.module.modules())) else 1
    return Split(arguments, shards, options=engine.options, module=engine.module, least=least)


def suggest_shards(
    engine: Engine, args: tuple[Any, ...], kwargs: dict[str, Any], repeats: int
) -> ShardTimes:
    """See `SphereParallel.suggest_shards`."""
    engine.refuse_inside()
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "suggest_shards measures a forward and a backward, which torch.inference_mode() does "
            "not have: call it outside of that block"
        )
    if any(map(is_lazy, engine.module.modules())):
        raise RuntimeError("a lazy module has no shapes yet: run a batch through the model first")
    arguments = CallArguments(args, kwargs)
    rows = _cut(engine, arguments, 1).rows
    # With several processes, only numbers that they can share; and rows for each shard.
    world = 1 if engine.ranks is None else engine.ranks.world
    possible = [n for n in possible_world_sizes(engine.spheres.leaves) if n % world == 0]
    numbers = [n for n in possible if n == world or count_shards(engine, arguments, n) == n]
    try:
        found = time_shards(engine, arguments, numbers, repeats=repeats, backward=True)
    except RuntimeError as error:
        if "use_reentrant" in str(error) or "checkpointing is not compatible" in str(error).lower():
            error.add_note(
                "suggest_shards computes gradients with torch.autograd.grad, which reentrant "
                "checkpoints refuse: measure the model with checkpoint(..., use_reentrant=False)"
            )
        raise
    ratios = {n: seconds / found[0] for n, seconds in found.items() if n > 0}
    return ShardTimes(rows, ratios)


def time_shards(
    engine: Engine,
    arguments: CallArguments,
    candidates: Sequence[int],
    *,
    repeats: int,
    backward: bool,
    compiled: bool = True,
    workers: int | None = None,
) -> dict[int, float]:
    """Seconds that a batch takes in each number of shards; by 0, those of plain PyTorch.

    The ways take turns, and the median of each counts. No trace is left: no gradients, buffers,
    random numbers, keys and values in caches, and no hook is called.

    Args:
        engine: whose module and spheres are used, by this process alone.
        arguments: of the module.
        candidates: numbers of shards.
        repeats: measurements of each way, after one that does not count.
        backward: whether a backward, with a gradient of ones, is part of what is measured.
        compiled: whether a module that is compiled is measured so.
        workers: how many spheres run shards; None: as many as is fastest.
    """
    draws = TrialRandom()
    with draws.leaving_no_trace():
        bare = _copy_that_runs(engine.module, arguments, compiled)
    together = waits_for_others(engine.module)
    ways: dict[tuple[int, int], Callable[[CallArguments], Any]] = {
        (0, 0): functools.partial(_run, bare)
    }
    for shards in candidates:
        trial = type(engine)(
            bare,
            engine.spheres,
            reproducible=True,
            process_group=False,
            options=engine.options,
            shards=shards,
        )
        trial.pool.reported = engine.pool.reported  # what was said once is not said again
        trial.pool.checks_closely = False
        plans = reproducible_ways(shards, min(engine.spheres.concurrency, shards))
        if workers is not None:
            plans = [Plan(shards, min(workers, shards))]
        for i, plan in enumerate(plans[:1] if together else plans):
            executor = ShardExecutor(engine.spheres, plan, together)
            ways[shards, i] = functools.partial(trial.run_in_shards, executor, bare)
    seconds: dict[tuple[int, int], list[float]] = {way: [] for way in ways}
    weights = [p for p in bare.parameters() if p.requires_grad]
    with _cuda_generators_kept(bare), draws.leaving_no_trace():
        for _ in range(1 + repeats):
            for way, run in ways.items():
                run_once = functools.partial(run, arguments.copied())
                seconds[way].append(_seconds(run_once, weights if backward else None))
    medians = {way: statistics.median(each[1:]) for way, each in seconds.items()}
    return {n: min(s for (shards, _), s in medians.items() if shards == n) for n, _ in ways}


@contextlib.contextmanager
def _cuda_generators_kept(module: nn.Module) -> Iterator[None]:
    """Puts those of the module's devices back: CUDA kernels may draw past any source."""
    devices = {p.device for p in module.parameters() if p.is_cuda}
    states = {device: torch.cuda.get_rng_state(device) for device in devices}
    try:
        yield
    finally:
        for device, state in states.items():
            torch.cuda.set_rng_state(state, device)


def _copy_that_runs(module: nn.Module, arguments: CallArguments, compiled: bool) -> nn.Module:
    """`bare_copy`, with the module's hooks if its forward fails without them."""
    bare = bare_copy(module, compiled=compiled)
    try:
        _seconds(functools.partial(_run, bare, arguments.copied()), None)
    except Exception:  # noqa: BLE001 - if it was something else, the next pass raises it again
        bare = bare_copy(module, compiled=compiled, hooks=True)
    return bare


def _run(module: nn.Module, arguments: CallArguments) -> Any:
    return module(*arguments.args, **arguments.kwargs)


def _seconds(run: Callable[[], Any], weights: Sequence[Tensor] | None) -> float:
    begin = time.perf_counter()
    with torch.set_grad_enabled(weights is not None):
        outputs = flatten(run())[0]
        roots = [o for o in outputs if isinstance(o, Tensor) and o.requires_grad]
        if roots and weights:
            ones = [torch.ones_like(o) for o in roots]
            torch.autograd.grad(roots, weights, ones, allow_unused=True)
    return time.perf_counter() - begin
