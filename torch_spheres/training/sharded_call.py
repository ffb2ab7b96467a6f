"""One call of a `SphereParallel` model: its shards' forward and backward, on the spheres."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torch_spheres import _compat
from torch_spheres.distributed.group import Ranks
from torch_spheres.errors import Caught
from torch_spheres.reduction.streaming_sum import Grads, StreamingSum, rounded
from torch_spheres.reduction.tree_sum import tree_sums
from torch_spheres.runtime.rng import CallRandom, ShardRandom
from torch_spheres.runtime.trace_hooks import phase
from torch_spheres.training.batch_split import Cutting, Split, without_dim
from torch_spheres.training.buffers import (
    buffers_of,
    merge_buffers,
    needs_two_rows,
    take_new_shapes,
)
from torch_spheres.training.executor import Crew
from torch_spheres.training.forward_effects import ForwardEffects, checksum, contents, version_of
from torch_spheres.training.gather_outputs import cut_grad, gather, gather_input_grad
from torch_spheres.training.merge_outputs import Way
from torch_spheres.training.pytree import Nesting, flatten_output
from torch_spheres.training.reached_tensors import Reached
from torch_spheres.training.refusals import refuse_compiled, refuse_forward_ad
from torch_spheres.training.replica import Replica
from torch_spheres.training.replica_pool import ReplicaPool
from torch_spheres.training.shard_task import Shard, in_shard

__all__ = ["Call"]

_LARGE = 1 << 16  # bytes: a smaller buffer is copied in less time than it takes to think about it


class Call:
    """One call's split, its shards, and what has to be put together from them.

    Args:
        ranks: who shares the batch, in a `SharedCall`.
        what: ``"forward"`` or ``"forward_backward"``.
        cutting: which arguments are cut, and how outputs without dimensions are put together.
        own_leaves: where rows of a batch that several processes share are evaluated by each alone:
            those of this process.
    """

    base: int | None = None  # seed of the shards' random numbers, if it has been agreed on

    def __init__(
        self,
        module: nn.Module,
        pool: ReplicaPool,
        crew: Crew,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        ranks: Ranks | None = None,
        what: str = "forward",
        *,
        cutting: Cutting | None = None,
        own_leaves: Sequence[int] | None = None,
    ) -> None:
        self.module, self.pool, self.crew = module, pool, crew
        self.ranks, self.what = ranks, what
        self.cutting = Cutting() if cutting is None else cutting
        # (Hugging Face's models divide their loss by it: of the whole batch, in each shard.)
        # A model may ignore the argument, which the comparison with the bare module shows.
        self.sums_by_argument = (
            self.cutting.scalars != "sum" and kwargs.get("num_items_in_batch") is not None
        )
        self.sums = self.sums_by_argument or self.cutting.scalars == "sum"
        self._own_leaves = own_leaves
        self._positional = len(args)
        pool.follow(module)
        self.keys = (*range(len(args)), *kwargs)
        self.context = crew.context()
        self.split = self._split([*zip(self.keys, (*args, *kwargs.values()), strict=True)])
        self.crew = crew = crew.for_call(module, self.split.places, ranks)
        self.random = CallRandom(self.base, crew.spheres if crew.plan.workers > 0 else None)
        self.shards: list[Shard | None] = []
        self._freed = False
        self.nesting: Nesting | None = None  # of the outputs
        self.differentiable_outputs: list[bool] = []
        self.ways: list[Way] = []  # how each output is put together
        self.compiled: tuple[Any, ...] | None = None
        if any(map(_compat.is_compiled, pool.parts)):
            refuse_compiled(crew.together)
            self.compiled = self._signature()
            _compat.prepare_to_compile()
        training = tuple(part.training for part in pool.parts)
        trained = tuple(p.requires_grad for p in pool.parameters)
        self.kind = what, torch.is_grad_enabled(), training, trained
        self.number, self.closely = pool.watches(self.kind)
        self.is_first = self.number == 1
        self._learnt = not self.is_first  # which large buffers the forward writes to
        self.effects = ForwardEffects(module, pool, closely=self.closely, again=not self.is_first)
        self.reached = Reached(pool, self.closely, self.number, ranks is None)
        self.differentiable = [
            i
            for i, value in enumerate(self.split.flat)
            if isinstance(value, Tensor) and value.requires_grad
        ]

    # What SharedCall does in another way.

    def _split(self, arguments: Sequence[tuple[int | str, Any]]) -> Split:
        """The arguments, cut by rows."""
        refuse_forward_ad()
        least = 2 if any(map(needs_two_rows, self.pool.parts)) else 1
        shards = self.crew.plan.shards
        split = Split(arguments, shards, self.ranks, self.cutting, self.module, least)
        if self._own_leaves is not None:
            split.take_leaves(self._own_leaves)
        return split

    def targets(self, value: Any) -> Split:
        """What a loss compares the outputs with, cut as the inputs are."""
        goal = Split([("targets", value)], self.split.shards, self.ranks, self.cutting)
        if goal.rows != self.split.rows:
            raise ValueError(
                f"forward_backward() got inputs of {self.split.rows} rows and targets of "
                f"{goal.rows}"
            )
        goal.bounds, goal.leaves = self.split.bounds, self.split.leaves
        goal.total = self.split.total
        return goal

    def totals(
        self, columns: Sequence[Sequence[Tensor | None]], like: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """Sums in the tree, each of one value for each shard that runs; and a tensor like it."""
        del like
        return tree_sums([self.padded(column) for column in columns])

    def agree(self, what: str, caught: Caught, notes: Sequence[int] = ()) -> list[int]:
        """Raises what was caught on all ranks; the element-wise maximum of their notes."""
        del what
        caught.raise_if_any()
        return list(notes)

    def first_shards(self, values: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
        """The values that the batch's first shard has; None where this process has no shard."""
        del like
        return [v for v in values if v is not None]

    def share_structure(self, outputs: list[Any]) -> list[Any]:
        """Outputs for a process that ran no shard; others keep theirs."""
        return outputs

    @property
    def ran(self) -> int:
        """Shards that run, in all processes."""
        return (
            len(self.split.bounds)
            if self.ranks is None
            else min(self.split.total, self.split.shards)
        )

    def _signature(self) -> tuple[Any, ...]:
        """What compiled code depends on, but for the rows: new ones are compiled anew."""
        leaves = zip(self.split.flat, self.split.dims, strict=True)
        tensors = [(v, d) for v, d in leaves if isinstance(v, Tensor)]
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), self.module.training
        autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        shapes = [
            (without_dim(v.shape, d), without_dim(v.stride(), d), v.dtype, v.requires_grad)
            for v, d in tensors
        ]
        return (*modes, *autocast, *shapes)

    def arguments(self, leaves: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The module's arguments, with other leaves."""
        values = self.split.build(leaves)
        first, rest = values[: self._positional], values[self._positional :]
        return tuple(first), dict(zip(self.keys[self._positional :], rest, strict=True))

    @property
    def trainable(self) -> list[Tensor]:
        """Whose gradients are summed over the shards."""
        return self.reached.tensors

    @property
    def inputs_with_grad(self) -> list[Tensor]:
        """Tensors among the arguments that require a gradient."""
        return [self.split.flat[i] for i in self.differentiable]

    # ---- forward ----

    def forward_shard(self, k: int, replica: Replica) -> Shard:
        """Runs one shard's forward in the calling thread's context, see `in_shard`."""
        shard = Shard(ShardRandom(self.random, self.split.leaves[k]), replica)
        grad = torch.is_grad_enabled
        taken = replica.begin_shard(self._has_own)
        try:
            with in_shard(self, k, "forward", shard):
                values = self.split.parts(k)
                for i in self.differentiable if grad() else ():
                    values[i] = values[i].detach().requires_grad_()
                    shard.inputs.append(values[i])
                args, kwargs = self.arguments(values)
                before = contents(self.keys, (*args, *kwargs.values()))
                plain = self.split.outside_objects(values)  # (a cache is there to be written to)
                versions = [version_of(v) for v in plain]
                sums = [checksum(v) for v in plain] if self.closely else []
                called = replica.module.forward if self.pool.calls_forward else replica.module
                output = called(*args, **kwargs)
                now = [checksum(v) for v in plain] if self.closely else []
                if now != sums or versions != [version_of(v) for v in plain]:
                    raise RuntimeError(
                        "the module's forward wrote in place to its arguments, of which a shard "
                        "has a part or a copy: x = x.clone() first, or return what is new"
                    )
                self.effects.look_at_arguments(before)
        except Exception as error:
            error.add_note(self.split.described())
            raise
        shard.outputs, shard.nesting = flatten_output(output)
        self.effects.look_at(replica)
        shard.buffers = [(buffer, buffer.changed_value()) for buffer in taken]
        shard.params = self.reached.targets(replica)
        return shard

    def _has_own(self, part: nn.Module, name: str, value: Tensor) -> bool:
        """Whether each shard gets a copy of a buffer.

        Small ones always; large ones where the first shard of the first call wrote to its own.
        """
        is_small = value.nbytes <= _LARGE
        return is_small or not self._learnt or (id(part), name) in self.pool.written

    def learn(self, shard: Shard) -> None:
        """From the first shard: which large buffers have to be copied for the others."""
        self._learnt = True
        for buffer, value in shard.buffers:
            if value is not None:
                self.pool.written.add((id(buffer.source), buffer.name))

    @property
    def runs_one_first(self) -> bool:
        """Whether one shard has to be looked at before others run."""
        large = any(b.nbytes > _LARGE for b in self.module.buffers())
        return self.is_first and large and not self.crew.together

    def run_forward(self) -> list[Any]:
        """All shards' forward on the spheres; the outputs put together, as flat leaves."""

        def run(k: int) -> Shard:
            replica = self.pool.borrow(self.module)
            try:
                return self.forward_shard(k, replica)
            finally:
                self.pool.give_back(replica)

        shards: list[Shard] = []
        outputs: list[Any] = []
        with Caught() as caught:
            first = min(len(self.split.bounds), self.runs_one_first)
            shards = self.crew.map(run, first)
            for shard in shards:
                self.learn(shard)
            shards += self.crew.map(lambda k: run(k + first), len(self.split.bounds) - first)
            self.shards = list(shards)
            self.effects.check(shards)
            self.reached.look_at(shards)
            outputs = gather(self, shards)
        self.finish_forward(shards, caught)
        return self.share_structure(outputs)

    def finish_forward(
        self, shards: Sequence[Shard], caught: Caught, notes: Sequence[int] = ()
    ) -> list[int]:
        """What comes after all shards' forward: buffers, random numbers, and who failed.

        Returns:
            The greatest of all processes' notes.
        """
        buffers = buffers_of(self.module)
        if caught.error is None:
            caught.error = take_new_shapes(shards, self.ranks is None)
        mine = [any(s.buffers[i][1] is not None for s in shards) for i in range(len(buffers))]
        has_rows = bool(self.split.bounds)
        told = self.agree(
            "the forward",
            caught,
            [*notes, has_rows and self.sums, has_rows and not self.sums, self.random.drew, *mine],
        )
        notes, (sums, means, drew, *changed) = told[: len(notes)], told[len(notes) :]
        if sums and means:
            raise ValueError(
                "the ranks do not agree whether outputs without dimensions are sums or means over "
                "the rows, which a call with num_items_in_batch= leaves open: say scalars='sum', "
                "or leave the argument out"
            )
        self.sums = bool(sums)
        if drew:
            self.random.base()  # where other processes' shards drew, and none of these
        merge_buffers(self, shards, {i: buffers[i] for i, c in enumerate(changed) if c})
        self.random.warn_if_missed()
        self.effects.warn()
        self.pool.count(self.kind)
        return notes

    def in_objects(self) -> list[bool]:
        """Of each output, whether it is part of a distribution or the like."""
        assert self.nesting is not None
        return self.nesting.in_objects()

    def weighted(self, values: Sequence[Tensor]) -> list[Tensor]:
        """The shards' scalars, to be summed."""
        if self.sums:
            return [*values]
        return [v * w for v, w in zip(values, self.split.weights, strict=True)]

    def scalars_total(self, values: Sequence[Tensor]) -> Tensor:
        """The shards' scalars put together."""
        total = self.totals([self.weighted(values)], values[:1])[0]
        assert total is not None
        return total

    def padded(self, values: Sequence[Tensor | None]) -> list[Tensor | None]:
        """One place for each leaf: those without rows are absent."""
        places: list[Tensor | None] = [None] * self.split.places
        for leaf, value in zip(self.split.leaves, values, strict=True):
            places[leaf] = value
        return places

    # ---- backward ----

    def run_backward(self, grads: tuple[Tensor | None, ...]) -> list[Tensor | None]:
        """All shards' backward; gradients of `trainable`, then of `inputs_with_grad`."""
        keep = _compat.keeps_graph()
        context = self.crew.context()  # now: an autocast block usually ends with the forward
        shards = self.shards
        if self._freed:
            raise RuntimeError(
                "backward through SphereParallel a second time: the shards' graphs were freed; "
                "use backward(retain_graph=True) the first time, or call the model again"
            )
        if not keep:
            self.shards, self._freed = [], True
        pieces = [cut_grad(self, g, i, shards) for i, g in enumerate(grads)]

        def backward(k: int) -> tuple[Grads, Grads]:
            shard = shards[k]
            assert shard is not None
            if not keep:
                shards[k] = None  # frees the graph as soon as this shard is done
            roots, root_grads = [], []
            for output, cut in zip(shard.outputs, pieces, strict=True):
                grad = None if cut is None else cut[k]
                if grad is not None and isinstance(output, Tensor) and output.requires_grad:
                    roots.append(output)
                    root_grads.append(grad)
            if not roots:
                return [None] * len(self.trainable), [None] * len(shard.inputs)
            with in_shard(self, k, "backward", shard, context):
                return self.reached.put_together(*shard.backward(roots, root_grads, keep))

        return self.fold(backward)

    def fold(
        self,
        work: Callable[[int], tuple[Grads, Grads]],
        prepare: Callable[[], object] = lambda: None,
        one_first: bool = False,
    ) -> Grads:
        """The whole batch's gradients of `trainable`, then of `inputs_with_grad`.

        Args:
            work: returns both for shard *k*.
            prepare: is called before; an error in it is everybody's.
            one_first: whether a shard runs alone before the others.
        """
        fold = self.new_fold()
        rest: list[Grads] = [[] for _ in self.split.leaves]
        place = {leaf: k for k, leaf in enumerate(self.split.leaves)}

        def item(_: int) -> None:
            leaf = fold.begin()
            if leaf is None:
                return
            try:
                with torch.no_grad():
                    grads, rest[place[leaf]] = work(place[leaf])
                    with phase(self.crew.spheres, "sum", leaf):
                        fold.add(leaf, grads)
            except BaseException:
                fold.fail()
                raise

        def run() -> None:
            prepare()
            first = min(len(rest), one_first and not self.crew.together)
            self.crew.map(item, first)
            self.crew.map(item, len(rest) - first)

        sums = self.finish_fold(fold, run)
        with torch.no_grad():
            for i, leaf in enumerate(self.differentiable):
                value, dim = self.split.flat[leaf], self.split.dims[leaf]
                sums.append(gather_input_grad(self, value, dim, [grads[i] for grads in rest]))
        return sums

    def new_fold(self) -> StreamingSum:
        """For this call's gradients."""
        split, crew = self.split, self.crew
        return StreamingSum(split.places, split.leaves, crew.concurrency, spheres=crew.spheres)

    def finish_fold(self, fold: StreamingSum, run: Callable[[], object]) -> Grads:
        """Has the shards run, and returns the sums."""
        run()
        with torch.no_grad(), phase(self.crew.spheres, "sum"):
            return rounded(fold.finish(), self.trainable)
