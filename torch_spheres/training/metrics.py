"""`gather_metrics`: sums over the rows of a batch, over all processes, for an evaluation."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torch_spheres.distributed.group import ProcessGroup, Ranks, find_ranks
from torch_spheres.distributed.tree_all_reduce import total_over_ranks
from torch_spheres.errors import DeferredError
from torch_spheres.reduction.partition import Division, divide
from torch_spheres.reduction.tree_sum import tree_sums
from torch_spheres.runtime.pool import SpherePool
from torch_spheres.training.engine import engine_of

if TYPE_CHECKING:
    from torch_spheres.spheres import KissingSpheres

__all__ = ["gather_metrics"]


@torch.no_grad()
def gather_metrics(
    model_or_spheres: nn.Module | KissingSpheres,
    /,
    *,
    process_group: ProcessGroup | bool | None = None,
    **values: Tensor,
) -> dict[str, float | int]:
    """Sums over all rows of one batch: the same bits for any number of processes.

    ::

        hits = rows = loss = 0
        for x, y in validation:                     # wrapped, as for training
            out = model(x)
            sums = ts.gather_metrics(
                model,
                loss=F.cross_entropy(out, y, reduction="none"),
                hits=out.argmax(1) == y,
            )
            hits, loss, rows = hits + sums["hits"], loss + sums["loss"], rows + sums["rows"]

    Each shard's rows are added first, in float64, then the shards' sums in the fixed tree. All
    processes call it together, each with its own rows, and all get the same result.

    Args:
        model_or_spheres: a `SphereParallel`, or a model that `parallelize_` was called on, whose
            processes share the batch; or the `KissingSpheres` of a wrapped loader.
        process_group: the processes that share the batch, for `KissingSpheres`, as in `wrap`.
        values: real tensors of any dtype and shape ``(rows, ...)`` with this process's rows.

    Returns:
        The sum of each value by its name: a float, or an int (exact) for integers and booleans;
        and ``"rows"``, the number of rows of the batch.

    Raises:
        TypeError: the first argument is neither a parallel model nor a `KissingSpheres`, or a value
            is complex or has no rows.
        ValueError: there are no values, one is called ``rows``, they have different rows, or the
            processes do not have their parts of one batch.
        RankError: another process does not come, or has failed.
    """
    shards, ranks = _shards_and_ranks(model_or_spheres, process_group)
    division, rank, total = _agreed_rows(shards, ranks, values)
    engine = engine_of(model_or_spheres)
    if ranks is not None and engine is not None and engine.pool.checks is not None:
        engine.pool.checks.compare_evaluation(ranks, engine.module)
    sizes = [len(places) for places in division.ranges(rank, total)]
    owned = division.owned(rank)
    columns = [_by_leaf(value, owned, sizes, division.leaves) for value in values.values()]
    like = [torch.zeros((), dtype=torch.float64)] * len(columns)
    sums = (
        tree_sums(columns)
        if ranks is None
        else total_over_ranks(columns, like, ranks, what="gather_metrics")
    )
    found: dict[str, float | int] = {}
    for (name, value), summed in zip(values.items(), sums, strict=True):
        number = 0.0 if summed is None else float(summed)
        found[name] = number if value.is_floating_point() else int(number)
    return {**found, "rows": total}


def _agreed_rows(
    shards: int, ranks: Ranks | None, values: dict[str, Any]
) -> tuple[Division, int, int]:
    """The division of rows between processes, the rank of this one, the number of rows in all."""
    rows, names = 0, zlib.crc32(repr([*values]).encode())
    with DeferredError() as caught:
        rows = _rows_of(values)
    if ranks is None:
        caught.raise_if_any()
        counts = [rows]
    else:
        counts, kinds = ranks.meet("gather_metrics", [rows, names], caught).T.tolist()
        if len({*kinds}) > 1:
            raise ValueError(
                "gather_metrics(): the processes have values of different names, this one: "
                f"{', '.join(values)}"
            )
    total = sum(counts)
    world, rank = (1, 0) if ranks is None else (ranks.world, ranks.rank)
    division = divide(world, shards)
    if counts != division.counts(total):
        raise ValueError(
            f"gather_metrics(): the processes have {counts} rows, which are not their parts of a "
            f"batch of {total}: give the rows as the wrapped loader, or the model, hands them out"
        )
    return division, rank, total


def _shards_and_ranks(
    given: Any, process_group: ProcessGroup | bool | None
) -> tuple[int, Ranks | None]:
    if isinstance(given, SpherePool):
        return given.leaves, find_ranks(process_group, given.leaves)
    engine = engine_of(given)
    if engine is None:
        raise TypeError(
            "gather_metrics() needs a SphereParallel, a model that parallelize_() was called on, "
            f"or a KissingSpheres, got {type(given).__name__}"
        )
    return engine.shards, engine.ranks


def _rows_of(values: dict[str, Tensor]) -> int:
    if not values:
        raise ValueError("gather_metrics() was given no values: gather_metrics(model, loss=losses)")
    if "rows" in values:
        raise ValueError('gather_metrics() returns "rows" itself; give that value another name')
    for name, value in values.items():
        if not isinstance(value, Tensor) or value.dim() == 0 or value.is_complex():
            shown = tuple(value.shape) if isinstance(value, Tensor) else repr(value)
            raise TypeError(
                f"{name} must be a tensor of numbers with a row for each of the batch's, got "
                f"{shown}; a loss for each row: reduction='none'"
            )
    rows = {name: len(value) for name, value in values.items()}
    if len({*rows.values()}) > 1:
        raise ValueError(f"gather_metrics() was given values of different rows: {rows}")
    return next(iter(rows.values()))


def _by_leaf(value: Tensor, owned: list[int], sizes: list[int], leaves: int) -> list[Tensor | None]:
    """By leaf, the sums of this process's shards; None where there are no rows."""
    sums: list[Tensor | None] = [None] * leaves
    for leaf, part in zip(owned, value.detach().cpu().double().split(sizes), strict=True):
        if len(part):
            # A sequential sum: that of torch depends on the number of threads.
            sums[leaf] = torch.from_numpy(part.reshape(-1).numpy().cumsum()[-1:]).reshape(())
    return sums
