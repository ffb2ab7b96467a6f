"""One call of a `SphereParallel` model whose batch several processes share.

Each rank runs its own shards, and the ranks meet four times: before the forward (how many
rows each has, and whether they are about to do the same), after it (buffers, scalars, errors), and
for the gradients. A part of their sums is sent when its last shard has run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torch_spheres.distributed.gather_rows import own_rows_only
from torch_spheres.distributed.group import Ranks
from torch_spheres.distributed.tree_all_reduce import Exchange, Layout, total_over_ranks
from torch_spheres.errors import Caught
from torch_spheres.reduction.streaming_sum import Grads, StreamingSum
from torch_spheres.reduction.tree_sum import tree_sums
from torch_spheres.runtime.trace_hooks import phase
from torch_spheres.training.batch_split import Split
from torch_spheres.training.buffers import needs_two_rows
from torch_spheres.training.merge_outputs import FIRST, ONCE, ROWS, SCALAR, Way, same
from torch_spheres.training.refusals import refuse_ranks_without_rows, refuse_shards_of_one_row
from torch_spheres.training.sharded_call import Call
from torch_spheres.training.step_checks import by_rank

__all__ = ["SharedCall"]

_PLAIN = (bool, int, float, complex, str, bytes)


class SharedCall(Call):
    """A call on this rank's part of a batch."""

    ranks: Ranks

    # ---- before the forward ----

    def _split(self, arguments: Sequence[tuple[int | str, Any]]) -> Split:
        self._scalars: list[list[Tensor]] = []  # outputs, of each shard, weighted
        split = None
        with Caught() as caught:
            split = super()._split(arguments)
        checks = self.pool.checks
        assert checks is not None
        facts = checks.tell(self.ranks, self.module, self.what, split)
        table = self.ranks.meet("the start of forward", checks.flat(facts), caught)
        assert split is not None
        agreed = checks.compare(self.ranks, self.module, facts, split, table)
        self.base = agreed.base
        split.share(agreed.rows)
        if any(map(needs_two_rows, self.pool.parts)):
            refuse_shards_of_one_row(split.total, split.shards)
        split.flat = [
            v if d is None else own_rows_only(v, split.total, d)
            for v, d in zip(split.flat, split.dims, strict=True)
        ]
        self._somebody_has_none = 0 in agreed.rows
        if self.crew.together:
            refuse_ranks_without_rows(agreed.rows)
        return split

    # ---- sums ----

    def totals(
        self, columns: Sequence[Sequence[Tensor | None]], like: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """In the tree over all ranks' shards."""
        placed = [self.padded(column) for column in columns]
        return total_over_ranks(placed, like, self.ranks, what=f"the sums after {self.what}")

    def agree(self, what: str, caught: Caught, notes: Sequence[int] = ()) -> list[int]:
        """All ranks' greatest notes, unless one of them has an error."""
        return [int(greatest) for greatest in self.ranks.meet(what, notes, caught).amax(0)]

    def first_shards(self, values: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
        """Rank 0's: it has shard 0, which has rows if there are any."""
        if not like:
            return []
        mine = [torch.zeros_like(t) if v is None else v for v, t in zip(values, like, strict=True)]
        flat = torch.cat([v.to(torch.int64).flatten() for v in mine])
        first = self.ranks.gather(flat, "the exchange of buffers")[0]
        pieces = first.split([t.numel() for t in like])
        return [p.to(t.dtype).view(t.shape) for p, t in zip(pieces, like, strict=True)]

    # ---- outputs ----

    def scalars_total(self, values: Sequence[Tensor]) -> Tensor:
        """Stands for it: the other ranks' come in `share_structure`."""
        weighted = self.weighted(values)
        self._scalars.append(weighted)
        return weighted[0].detach()

    def share_structure(self, outputs: list[Any]) -> list[Any]:
        """Scalars become those of all ranks; a rank without rows gets outputs without rows."""
        if self._somebody_has_none:
            outputs = self._from_others(outputs)
        plain = [i for i, o in enumerate(outputs) if isinstance(o, _PLAIN)]
        if plain:  # those of the batch's first shard, as in one process
            said = [outputs[i] for i in plain]
            found = self.ranks.objects(said, "the exchange of outputs that are no tensors")
            for i, *values in zip(plain, *found, strict=True):
                if not all(same(value, values[0]) for value in values):
                    raise ValueError(
                        f"output {i} of the module is no tensor and differs between the ranks: "
                        f"{by_rank(values)}; return a tensor"
                    )
                outputs[i] = values[0]
        scalars = [i for i, way in enumerate(self.ways) if way == SCALAR]
        if scalars:
            like = [outputs[i].detach() for i in scalars]
            columns = self._scalars or [[] for _ in scalars]
            for i, total in zip(scalars, self.totals(columns, like), strict=True):
                outputs[i] = total
        return outputs

    def _from_others(self, outputs: list[Any]) -> list[Any]:
        mine = None
        if self.split.bounds:
            empty = [_without_rows(o, way) for o, way in zip(outputs, self.ways, strict=True)]
            mine = self.nesting, self.differentiable_outputs, self.ways, empty
        first = self.ranks.objects(mine, "the exchange of outputs' shapes")[0]
        if self.split.bounds:
            return outputs
        self.nesting, self.differentiable_outputs, self.ways, outputs = first
        device = next((p.device for p in self.module.parameters()), torch.device("cpu"))
        return [o.to(device) if isinstance(o, Tensor) else o for o in outputs]

    # ---- gradients ----

    def new_fold(self) -> StreamingSum:
        """One whose parts are given to the exchange as they are completed."""
        layouts, sparse = self.pool.layouts, _sparse_parameters(self.module)
        self._sparse = [i for i, p in enumerate(self.trainable) if id(p) in sparse]
        self._dense = [i for i, p in enumerate(self.trainable) if id(p) not in sparse]
        dense = [self.trainable[i] for i in self._dense]
        key = [(p.shape, p.dtype) for p in dense]
        if layouts.get("key") != key:
            layouts.update(key=key, layout=Layout(dense))
        self._division = self.ranks.divide(self.split.shards)
        own_parts = self._division.parts[self.ranks.rank]
        self._sparse_sums: list[dict[int, Tensor]] = [{} for _ in own_parts]
        self._exchange = Exchange(
            self.ranks,
            self._division,
            layouts["layout"],
            "the exchange of gradients",
            self.crew.spheres,
            late=self.crew.together,
        )
        return StreamingSum(
            self.split.places,
            self.split.leaves,
            self.crew.concurrency,
            own_parts,
            self._emit,
            self.crew.spheres,
        )

    def _emit(self, part: int, values: list[Grads | None]) -> None:
        columns = [
            [None if v is None else v[i] for v in values] for i in range(len(self.trainable))
        ]
        for i in self._dense:
            if any(v is not None and v.layout is not torch.strided for v in columns[i]):
                raise RuntimeError(
                    f"parameter {i} of shape {tuple(self.trainable[i].shape)} has a sparse "
                    "gradient, but belongs to no module with sparse=True: the ranks could not "
                    "agree on how to send it"
                )
        self._exchange.give(part, [columns[i] for i in self._dense])
        sums = tree_sums([columns[i] for i in self._sparse])
        for i, total in zip(self._sparse, sums, strict=True):
            if total is not None:
                self._sparse_sums[part][i] = total

    def finish_fold(self, fold: StreamingSum, run: Callable[[], object]) -> Grads:
        """Meets the other ranks, with an error too."""
        del fold  # it has given all it has to the exchange
        with Caught() as caught:
            run()
        if self._exchange.is_broken:
            caught.raise_if_any()
        with phase(self.crew.spheres, "sum"):
            found = dict(zip(self._dense, self._exchange.finish(caught), strict=True))
            found.update(self._total_of_sparse())
        totals = [found.get(i) for i in range(len(self.trainable))]
        return [
            None if t is None else t.to(p.device)
            for t, p in zip(totals, self.trainable, strict=True)
        ]

    def _total_of_sparse(self) -> dict[int, Tensor]:
        """Sparse gradients, which all ranks send to all."""
        if not self._sparse:
            return {}
        division = self._division
        found = self.ranks.objects(self._sparse_sums, "the exchange of sparse gradients")
        totals = {}
        for i in {i for sums in found for mine in sums for i in mine}:
            column: Grads = [None] * division.places
            for r, sums in enumerate(found):
                for part, mine in zip(division.parts[r], sums, strict=True):
                    column[division.place(part)] = mine.get(i)
            (total,) = tree_sums([column])
            assert total is not None
            totals[i] = total.to(self.trainable[i].dtype)
        return totals


def _without_rows(output: Any, way: Way) -> Any:
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
