# ruff: noqa: ARG002 - both classes have one interface, of which one or the other needs less.
"""What a call does in common with the other processes that share its batch, or alone.

`ShardedCall` has one of the two: `LocalCollective` where this process has the whole batch,
`RankCollective` where each rank has a part of it. The ranks meet before the forward (how many rows
each has, and whether they are about to do the same), after it (buffers, scalars, errors), and for
the gradients, of which a part is sent when its last shard has run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from torch_spheres.distributed.grad_scale import unscale_grad
from torch_spheres.distributed.group import Ranks
from torch_spheres.distributed.tree_all_reduce import BucketLayout, TreeAllReduce, total_over_ranks
from torch_spheres.errors import DeferredError
from torch_spheres.reduction.streaming_sum import Grads, StreamingSum, rounded
from torch_spheres.reduction.tree_sum import tree_sums
from torch_spheres.runtime.trace_hooks import phase
from torch_spheres.training.buffers import needs_two_rows
from torch_spheres.training.merge_rules import FIRST, ONCE, ROWS, SCALAR, MergeRule, same
from torch_spheres.training.rank_differences import by_rank
from torch_spheres.training.refusals import refuse_ranks_without_rows, refuse_shards_of_one_row

if TYPE_CHECKING:
    from torch_spheres.training.batch_split import Split
    from torch_spheres.training.sharded_call import ShardedCall

__all__ = ["Collective", "LocalCollective", "RankCollective"]

_PLAIN = (bool, int, float, complex, str, bytes)


class Collective(Protocol):
    """One of these belongs to one call."""

    base: int | None
    """Seed of the shards' random numbers, if the processes have agreed on one."""

    def begin_call(self, call: ShardedCall, cut: Callable[[], Split]) -> Split:
        """The arguments as `cut` cuts them, with each process's part of the rows."""

    def totals(
        self, call: ShardedCall, columns: Sequence[Sequence[Tensor | None]], like: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """Sums in the tree, over all processes' shards.

        Args:
            call: whose shards they are.
            columns: for each sum, one value of each shard of this process.
            like: for each sum a tensor of its shape and type, for processes without shards.
        """

    def agree(self, what: str, caught: DeferredError, notes: Sequence[int] = ()) -> list[int]:
        """Raises what was caught, on all processes; returns the greatest of all their notes."""

    def first_shards(self, values: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
        """The values that the batch's first shard has, for all processes."""

    def scalars_total(self, call: ShardedCall, values: Sequence[Tensor]) -> Tensor:
        """The sum of a scalar output's values, or what stands for it until `complete_outputs`."""

    def complete_outputs(self, call: ShardedCall, outputs: list[Any]) -> list[Any]:
        """Completes outputs that this process could not make alone."""

    def gradient_sum(self, call: ShardedCall) -> StreamingSum:
        """What the call's shards add their gradients to."""

    def finish_gradients(
        self, call: ShardedCall, fold: StreamingSum, run: Callable[[], object]
    ) -> Grads:
        """Has the shards run, and returns the whole batch's gradients."""


class LocalCollective:
    """Of a process that has the whole batch."""

    base: int | None = None

    def begin_call(self, call: ShardedCall, cut: Callable[[], Split]) -> Split:
        """See `Collective`."""
        return cut()

    def totals(
        self, call: ShardedCall, columns: Sequence[Sequence[Tensor | None]], like: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """See `Collective`."""
        return tree_sums([call.split.by_leaf(column) for column in columns])

    def agree(self, what: str, caught: DeferredError, notes: Sequence[int] = ()) -> list[int]:
        """See `Collective`."""
        caught.raise_if_any()
        return list(notes)

    def first_shards(self, values: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
        """See `Collective`."""
        return [v for v in values if v is not None]

    def scalars_total(self, call: ShardedCall, values: Sequence[Tensor]) -> Tensor:
        """See `Collective`."""
        total = self.totals(call, [values], values[:1])[0]
        assert total is not None
        return total

    def complete_outputs(self, call: ShardedCall, outputs: list[Any]) -> list[Any]:
        """See `Collective`."""
        return outputs

    def gradient_sum(self, call: ShardedCall) -> StreamingSum:
        """See `Collective`."""
        split, executor = call.split, call.executor
        return StreamingSum(
            split.tree_size, split.leaves, executor.concurrency, spheres=executor.spheres
        )

    def finish_gradients(
        self, call: ShardedCall, fold: StreamingSum, run: Callable[[], object]
    ) -> Grads:
        """See `Collective`."""
        run()
        with torch.no_grad(), phase(call.executor.spheres, "sum"):
            return rounded(fold.finish(), call.trainable)


class RankCollective:
    """Of a rank, which has its part of the batch."""

    def __init__(self, ranks: Ranks) -> None:
        self.base: int | None = None
        self._ranks = ranks
        self._scalars: list[Sequence[Tensor]] = []  # outputs, of each shard, weighted
        self._somebody_has_none = False

    # ---- before the forward ----

    def begin_call(self, call: ShardedCall, cut: Callable[[], Split]) -> Split:
        """See `Collective`."""
        split = None
        with DeferredError() as caught:
            split = cut()
        checks = call.replicas.checks
        assert checks is not None
        facts = checks.facts_of(self._ranks, call.module, call.what, split)
        table = self._ranks.meet("the start of forward", checks.as_integers(facts), caught)
        assert split is not None
        agreed = checks.compare(self._ranks, call.module, facts, split, table)
        self.base = agreed.base
        split.cut_as_rank(agreed.rows)
        if any(map(needs_two_rows, call.replicas.parts)):
            refuse_shards_of_one_row(split.total, split.shards)
        split.flat = [
            v if d is None else unscale_grad(v, split.total, d)
            for v, d in zip(split.flat, split.dims, strict=True)
        ]
        self._somebody_has_none = 0 in agreed.rows
        if call.executor.together:
            refuse_ranks_without_rows(agreed.rows)
        return split

    # ---- sums ----

    def totals(
        self, call: ShardedCall, columns: Sequence[Sequence[Tensor | None]], like: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """See `Collective`."""
        placed = [call.split.by_leaf(column) for column in columns]
        return total_over_ranks(placed, like, self._ranks, what=f"the sums after {call.what}")

    def agree(self, what: str, caught: DeferredError, notes: Sequence[int] = ()) -> list[int]:
        """See `Collective`."""
        return [int(greatest) for greatest in self._ranks.meet(what, notes, caught).amax(0)]

    def first_shards(self, values: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
        """Rank 0's: it has shard 0, which has rows if there are any."""
        if not like:
            return []
        mine = [torch.zeros_like(t) if v is None else v for v, t in zip(values, like, strict=True)]
        flat = torch.cat([v.to(torch.int64).flatten() for v in mine])
        first = self._ranks.gather(flat, "the exchange of buffers")[0]
        pieces = first.split([t.numel() for t in like])
        return [p.to(t.dtype).view(t.shape) for p, t in zip(pieces, like, strict=True)]

    # ---- outputs ----

    def scalars_total(self, call: ShardedCall, values: Sequence[Tensor]) -> Tensor:
        """See `Collective`."""
        self._scalars.append(values)
        return values[0].detach()

    def complete_outputs(self, call: ShardedCall, outputs: list[Any]) -> list[Any]:
        """Scalars become those of all ranks; a rank without rows gets outputs without rows."""
        if self._somebody_has_none:
            outputs = self._from_others(call, outputs)
        plain = [i for i, o in enumerate(outputs) if isinstance(o, _PLAIN)]
        if plain:  # those of the batch's first shard, as in one process
            said = [outputs[i] for i in plain]
            found = self._ranks.objects(said, "the exchange of outputs that are no tensors")
            for i, *values in zip(plain, *found, strict=True):
                if not all(same(value, values[0]) for value in values):
                    raise ValueError(
                        f"output {i} of the module is no tensor and differs between the ranks: "
                        f"{by_rank(values)}; return a tensor"
                    )
                outputs[i] = values[0]
        scalars = [i for i, way in enumerate(call.merge_rules) if way == SCALAR]
        if scalars:
            like = [outputs[i].detach() for i in scalars]
            columns = self._scalars or [[] for _ in scalars]
            for i, total in zip(scalars, self.totals(call, columns, like), strict=True):
                outputs[i] = total
        return outputs

    def _from_others(self, call: ShardedCall, outputs: list[Any]) -> list[Any]:
        mine = None
        if call.split.bounds:
            empty = [
                _without_rows(o, way) for o, way in zip(outputs, call.merge_rules, strict=True)
            ]
            mine = call.nesting, call.differentiable_outputs, call.merge_rules, empty
        first = self._ranks.objects(mine, "the exchange of outputs' shapes")[0]
        if call.split.bounds:
            return outputs
        call.nesting, call.differentiable_outputs, call.merge_rules, outputs = first
        device = next((p.device for p in call.module.parameters()), torch.device("cpu"))
        return [o.to(device) if isinstance(o, Tensor) else o for o in outputs]

    # ---- gradients ----

    def gradient_sum(self, call: ShardedCall) -> StreamingSum:
        """One whose parts are given to the exchange as they are completed."""
        layouts, sparse = call.replicas.layouts, _sparse_parameters(call.module)
        trainable = call.trainable
        self._sparse = [i for i, p in enumerate(trainable) if id(p) in sparse]
        self._dense = [i for i, p in enumerate(trainable) if id(p) not in sparse]
        dense = [trainable[i] for i in self._dense]
        key = [(p.shape, p.dtype) for p in dense]
        if layouts.get("key") != key:
            layouts.update(key=key, layout=BucketLayout(dense))
        split, executor = call.split, call.executor
        self._division = self._ranks.divide(split.shards)
        own_parts = self._division.parts[self._ranks.rank]
        self._sparse_sums: list[dict[int, Tensor]] = [{} for _ in own_parts]
        self._exchange = TreeAllReduce(
            self._ranks,
            self._division,
            layouts["layout"],
            "the exchange of gradients",
            executor.spheres,
            deferred=executor.together,
        )
        return StreamingSum(
            split.tree_size,
            split.leaves,
            executor.concurrency,
            own_parts,
            functools.partial(self._send, call),
            executor.spheres,
        )

    def _send(self, call: ShardedCall, part: int, values: list[Grads | None]) -> None:
        """Gives a part's sums to the exchange, once its last shard has run."""
        trainable = call.trainable
        columns = [[None if v is None else v[i] for v in values] for i in range(len(trainable))]
        for i in self._dense:
            if any(v is not None and v.layout is not torch.strided for v in columns[i]):
                raise RuntimeError(
                    f"parameter {i} of shape {tuple(trainable[i].shape)} has a sparse "
                    "gradient, but belongs to no module with sparse=True: the ranks could not "
                    "agree on how to send it"
                )
        self._exchange.add_part(part, [columns[i] for i in self._dense])
        sums = tree_sums([columns[i] for i in self._sparse])
        for i, total in zip(self._sparse, sums, strict=True):
            if total is not None:
                self._sparse_sums[part][i] = total

    def finish_gradients(
        self, call: ShardedCall, fold: StreamingSum, run: Callable[[], object]
    ) -> Grads:
        """Meets the other ranks, with an error too."""
        with DeferredError() as caught:
            run()
        if self._exchange.is_broken:
            caught.raise_if_any()
        with phase(call.executor.spheres, "sum"):
            found = dict(zip(self._dense, self._exchange.finish(caught), strict=True))
            found.update(self._total_of_sparse(call.trainable))
        return [
            None if (total := found.get(i)) is None else total.to(p.device)
            for i, p in enumerate(call.trainable)
        ]

    def _total_of_sparse(self, trainable: Sequence[Tensor]) -> dict[int, Tensor]:
        """Sparse gradients, which all ranks send to all."""
        if not self._sparse:
            return {}
        division = self._division
        found = self._ranks.objects(self._sparse_sums, "the exchange of sparse gradients")
        totals = {}
        for i in {i for sums in found for mine in sums for i in mine}:
            column: Grads = [None] * division.places
            for r, sums in enumerate(found):
                for part, mine in zip(division.parts[r], sums, strict=True):
                    column[division.place(part)] = mine.get(i)
            (total,) = tree_sums([column])
            assert total is not None
            totals[i] = total.to(trainable[i].dtype)
        return totals


def _without_rows(output: Any, way: MergeRule) -> Any:
    """For a rank that has none."""
    if way == ROWS:
        return type(output)()
    if not isinstance(output, Tensor) or way == FIRST:
        return output
    if way == ONCE:
        return output.detach().cpu()
    shape = [*output.shape]
    if isinstance(way, int):
        shape[way] = 0
    return torch.zeros(shape, dtype=output.dtype)


def _sparse_parameters(module: nn.Module) -> set[int]:
    """Ids of those whose gradients are sparse: known to all ranks before there is any gradient."""
    return {
        id(p)
        for part in module.modules()
        if getattr(part, "sparse", False) is True
        for p in part.parameters(recurse=False)
    }
