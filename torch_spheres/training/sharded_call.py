"""`ShardedCall`: one call of a model, as its shards' forward and backward on the spheres."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torch_spheres import _compat
from torch_spheres.distributed.group import Ranks
from torch_spheres.errors import DeferredError
from torch_spheres.reduction.partition import Division
from torch_spheres.reduction.streaming_sum import Grads
from torch_spheres.runtime.rng import CallRandom
from torch_spheres.runtime.trace_hooks import phase
from torch_spheres.training.batch_split import Split
from torch_spheres.training.buffers import (
    LargeBuffers,
    adopt_new_shapes,
    buffers_of,
    merge_buffers,
    needs_two_rows,
)
from torch_spheres.training.call_arguments import CallArguments
from torch_spheres.training.collective import Collective, LocalCollective, RankCollective
from torch_spheres.training.executor import ShardExecutor
from torch_spheres.training.forward_backward import LossAndGradients
from torch_spheres.training.forward_effects import ForwardEffects
from torch_spheres.training.merge_outputs import cut_grad, merge_input_grad, merge_outputs
from torch_spheres.training.merge_rules import MergeRule
from torch_spheres.training.pytree import Nesting
from torch_spheres.training.reached_tensors import ReachedTensors
from torch_spheres.training.refusals import refuse_compiled, refuse_forward_ad
from torch_spheres.training.replica_pool import ReplicaPool
from torch_spheres.training.shard import Shard, compiled_variant, forward_shard, in_shard
from torch_spheres.training.split_options import SplitOptions

__all__ = ["ShardedCall"]


class ShardedCall:
    """One call's split, its shards, and what has to be put together from them.

    Args:
        module: what the shards run.
        replicas: of the module, and what is known about it from earlier calls.
        executor: who runs the shards.
        arguments: of the module.
        ranks: who shares the batch; None: this process has all of it.
        what: ``"forward"`` or ``"forward_backward"``.
        options: which arguments are cut, and how outputs without dimensions are put together.
        own_part: where rows of a batch that several processes share are evaluated by each alone:
            how they are divided, and which of the processes this one is.
    """

    def __init__(
        self,
        module: nn.Module,
        replicas: ReplicaPool,
        executor: ShardExecutor,
        arguments: CallArguments,
        ranks: Ranks | None = None,
        what: str = "forward",
        *,
        options: SplitOptions,
        own_part: tuple[Division, int] | None = None,
    ) -> None:
        self.module, self.replicas, self.executor = module, replicas, executor
        self.ranks, self.what, self.options = ranks, what, options
        # (Hugging Face's models divide their loss by it: of the whole batch, in each shard.)
        # A model may ignore the argument, which the comparison with the bare module shows.
        self.sums_by_argument = (
            options.scalars != "sum" and arguments.kwargs.get("num_items_in_batch") is not None
        )
        self.scalars_are_sums = self.sums_by_argument or options.scalars == "sum"
        replicas.refresh(module)
        self.context = executor.context()
        self.collective: Collective = LocalCollective() if ranks is None else RankCollective(ranks)
        self.split = self.collective.begin_call(
            self, functools.partial(self._cut, arguments, executor.plan.shards, own_part)
        )
        self.executor = executor.for_call(module, self.split.tree_size, ranks)
        runs_on = executor.spheres if executor.plan.workers > 0 else None
        self.random = CallRandom(self.collective.base, runs_on)
        self.shards: list[Shard | None] = []
        self._freed = False
        self.nesting: Nesting | None = None  # of the outputs
        self.differentiable_outputs: list[bool] = []
        self.merge_rules: list[MergeRule] = []  # how each output is put together
        self.compiled: tuple[Any, ...] | None = None
        if any(map(_compat.is_compiled, replicas.parts)):
            refuse_compiled(self.executor.together)
            self.compiled = compiled_variant(self.module, self.split)
            _compat.prepare_to_compile()
        self._kind = what, torch.is_grad_enabled(), *replicas.modes()
        self.number, self.closely = replicas.call_number(self._kind)
        self.is_first = self.number == 1
        self.large_buffers = LargeBuffers(replicas, learns=self.is_first)
        self.effects = ForwardEffects(module, replicas, self.closely, again=not self.is_first)
        self.reached = ReachedTensors(replicas, self.closely, self.number, ranks is None)
        self.differentiable = self.split.with_grad()

    def _cut(
        self,
        arguments: CallArguments,
        shards: int,
        own_part: tuple[Division, int] | None,
    ) -> Split:
        refuse_forward_ad()
        least = 2 if any(map(needs_two_rows, self.replicas.parts)) else 1
        split = Split(arguments, shards, self.ranks, self.options, self.module, least)
        if own_part is not None:
            split.take_own(*own_part)
        return split

    @property
    def trainable(self) -> list[Tensor]:
        """Whose gradients are summed over the shards."""
        return self.reached.tensors

    @property
    def inputs_with_grad(self) -> list[Tensor]:
        """Tensors among the arguments that require a gradient."""
        return [self.split.flat[i] for i in self.differentiable]

    def totals(
        self, columns: Sequence[Sequence[Tensor | None]], like: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """Sums over all shards of all processes; see `Collective.totals`."""
        return self.collective.totals(self, columns, like)

    # ---- forward ----

    def run_forward(self) -> list[Any]:
        """All shards' forward on the spheres; the outputs put together, as flat leaves.

        With gradients they have one node in the caller's graph.
        """
        shards: list[Shard] = []
        outputs: list[Any] = []
        with DeferredError() as caught:
            # Of large buffers, only those that a first shard has written to are copied for others.
            one_first = self.is_first and LargeBuffers.any_in(self.module)
            first = min(len(self.split.bounds), one_first and not self.executor.together)
            shards = self.executor.map(self._forward_shard, first)
            for shard in shards:
                self.large_buffers.learn(shard)
            others = len(self.split.bounds) - first
            shards += self.executor.map(lambda k: self._forward_shard(k + first), others)
            self.shards = list(shards)
            self.effects.check(shards)
            self.reached.search(shards)
            outputs = merge_outputs(self, shards)
        self.finish_forward(shards, caught)
        outputs = self.collective.complete_outputs(self, outputs)
        if torch.is_grad_enabled():
            # After the forward, which finds what it reaches beside the parameters.
            tensors = [*self.trainable, *self.inputs_with_grad]
            outputs = [*_ShardsNode.apply(self, outputs, *tensors)]  # type: ignore[no-untyped-call]
        return outputs

    def _forward_shard(self, k: int) -> Shard:
        replica = self.replicas.borrow(self.module)
        try:
            return forward_shard(self, k, replica)
        finally:
            self.replicas.give_back(replica)

    def finish_forward(
        self, shards: Sequence[Shard], caught: DeferredError, notes: Sequence[int] = ()
    ) -> list[int]:
        """What comes after all shards' forward: buffers, random numbers, and who failed.

        Returns:
            The greatest of all processes' notes.
        """
        buffers = buffers_of(self.module)
        if caught.error is None:
            caught.error = adopt_new_shapes(shards, self.ranks is None)
        mine = [any(s.buffers[i][1] is not None for s in shards) for i in range(len(buffers))]
        has_rows = bool(self.split.bounds)
        flags = [has_rows and self.scalars_are_sums, has_rows and not self.scalars_are_sums]
        # Of each entry all processes get the greatest: a flag is set if any of them has set it.
        told = self.collective.agree(
            "the forward", caught, [*notes, *flags, self.random.drew, *mine]
        )
        sums, means, drew, *changed = told[len(notes) :]
        notes = told[: len(notes)]
        if sums and means:
            raise ValueError(
                "the ranks do not agree whether outputs without dimensions are sums or means over "
                "the rows, which a call with num_items_in_batch= leaves open: say scalars='sum', "
                "or leave the argument out"
            )
        self.scalars_are_sums = bool(sums)
        if drew:
            self.random.base()  # where other processes' shards drew, and none of these
        merge_buffers(self, shards, {i: buffers[i] for i, c in enumerate(changed) if c})
        self.random.warn_if_missed()
        self.effects.warn()
        self.replicas.count(self._kind)
        return notes

    def weighted(self, values: Sequence[Tensor]) -> list[Tensor]:
        """The shards' scalars, to be summed."""
        return [*values] if self.scalars_are_sums else self.split.weighted(values)

    # ---- backward ----

    def run_backward(self, grads: tuple[Tensor | None, ...]) -> list[Tensor | None]:
        """All shards' backward; gradients of `trainable`, then of `inputs_with_grad`."""
        keep = _compat.keeps_graph()
        context = self.executor.context()  # now: autocast blocks usually end with the forward
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
                return self.reached.merge(*shard.backward(roots, root_grads, keep))

        return self.sum_gradients(backward)

    def forward_backward(self, loss_fn: Callable[[Any, Any], Any], targets: Any) -> Tensor:
        """See `SphereParallel.forward_backward`."""
        return LossAndGradients(self, loss_fn, targets).run()

    def sum_gradients(
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
        fold = self.collective.gradient_sum(self)
        of_inputs: list[Grads] = [[] for _ in self.split.leaves]
        shard_of = {leaf: k for k, leaf in enumerate(self.split.leaves)}

        def item(_: int) -> None:
            leaf = fold.begin()
            if leaf is None:
                return
            try:
                with torch.no_grad():
                    grads, of_inputs[shard_of[leaf]] = work(shard_of[leaf])
                    with phase(self.executor.spheres, "sum", leaf):
                        fold.add(leaf, grads)
            except BaseException:
                fold.fail()
                raise

        def run() -> None:
            prepare()
            first = min(len(of_inputs), one_first and not self.executor.together)
            self.executor.map(item, first)
            self.executor.map(item, len(of_inputs) - first)

        sums = self.collective.finish_gradients(self, fold, run)
        with torch.no_grad():
            for i, number in enumerate(self.differentiable):
                value, dim = self.split.flat[number], self.split.dims[number]
                sums.append(merge_input_grad(self, value, dim, [grads[i] for grads in of_inputs]))
        return sums


class _ShardsNode(torch.autograd.Function):
    """Puts the shards into the caller's graph as one node, with the parameters as its inputs.

    Autograd itself then adds the sums to ``.grad``, runs the parameters' hooks, and knows what
    ``torch.autograd.grad`` asks for.
    """

    @staticmethod
    def forward(ctx: Any, call: ShardedCall, outputs: list[Any], *_: Tensor) -> tuple[Any, ...]:
        ctx.call = call
        ctx.set_materialize_grads(False)
        fixed = [
            o
            for o, differs in zip(outputs, call.differentiable_outputs, strict=True)
            if isinstance(o, Tensor) and not differs
        ]
        ctx.mark_non_differentiable(*fixed)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "backward(create_graph=True) through SphereParallel: gradients of gradients would "
                "need the shards' graphs a second time; compute such a loss on the bare "
                "model.module, or after model.forward.remove() where parallelize_ was called"
            )
        return (None, None, *ctx.call.run_backward(grads))
