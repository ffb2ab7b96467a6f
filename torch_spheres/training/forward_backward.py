"""`LossAndGradients`: forward, loss and backward shard by shard, for `forward_backward`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torch_spheres.errors import DeferredError
from torch_spheres.reduction.streaming_sum import Grads
from torch_spheres.training.batch_split import Split
from torch_spheres.training.call_arguments import CallArguments
from torch_spheres.training.row_check import compare_with_bare_module
from torch_spheres.training.row_check_values import check_loss
from torch_spheres.training.shard import Shard, forward_shard, in_shard

if TYPE_CHECKING:
    from torch_spheres.training.sharded_call import ShardedCall

__all__ = ["LossAndGradients"]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class LossAndGradients:
    """The losses and gradients of one call's shards, each of whose graphs is freed at once.

    `loss_fn` returns a shard's loss, a mean over its rows, or ``(sum, count)``. `targets` are cut
    as the call's inputs are.
    """

    def __init__(self, call: ShardedCall, loss_fn: Callable[[Any, Any], Any], targets: Any) -> None:
        if not torch.is_grad_enabled():
            raise RuntimeError(
                "forward_backward() under torch.no_grad() has no gradients to compute"
            )
        self._call, self._loss_fn, self._targets = call, loss_fn, targets
        self._target_split: Split | None = None
        count = len(call.split.bounds)
        self._losses: list[Tensor | None] = [None] * count
        self._counts: list[Any] = [None] * count
        self._shards: list[Shard | None] = [None] * count

    def run(self) -> Tensor:
        """Runs all shards and adds the gradients to ``.grad``; returns the whole batch's loss."""
        call = self._call
        if call.executor.together:
            call.reached.close()
        # The tensors that a shard reaches can be added while it runs alone.
        grads = call.sum_gradients(self._run_shard, self._cut_targets, one_first=call.closely)
        done = [shard for shard in self._shards if shard is not None]
        # A process that ran no shard gets the losses' dtype from the others.
        found, kinds = next((v for v in self._losses if v is not None), None), [0]
        with DeferredError() as caught:
            if found is not None:
                kinds = [1 + _DTYPES.index(found.dtype)]
            self._check(done)
        (kind,) = call.finish_forward(done, caught, kinds)
        like = torch.zeros((), dtype=_DTYPES[kind - 1]) if found is None else found
        with torch.no_grad():
            loss = self._total(grads, like)
        # Autograd adds the gradients to ``.grad`` and runs the hooks.
        pairs = zip([*call.trainable, *call.inputs_with_grad], grads, strict=True)
        known = [(t, g) for t, g in pairs if g is not None and t.requires_grad]
        torch.autograd.backward([t for t, _ in known], [g for _, g in known])
        return loss

    def _cut_targets(self) -> None:
        split = self._call.split
        named = CallArguments((), {"targets": self._targets})
        targets = Split(named, split.shards, self._call.ranks, self._call.options)
        if targets.rows != split.rows:
            raise ValueError(
                f"forward_backward() got inputs of {split.rows} rows and targets of {targets.rows}"
            )
        targets.bounds, targets.numbers, targets.total = split.bounds, split.numbers, split.total
        self._target_split = targets

    def _run_shard(self, k: int) -> tuple[Grads, Grads]:
        call, targets = self._call, self._target_split
        assert targets is not None
        replica = call.replicas.borrow(call.module)
        try:
            with torch.enable_grad():
                shard = forward_shard(call, k, replica)
                with in_shard(call, k, "loss", shard):
                    output = shard.rebuild()
                    _, rows = targets.arguments.build(targets.parts(k))
                    loss, self._counts[k] = _checked(self._loss_fn(output, rows["targets"]), k)
                    if self._counts[k] is None:
                        loss = loss * call.split.weights[k]
            call.reached.search_one(k, shard, [loss], len(self._losses))
            self._losses[k] = loss.detach()
            shard.outputs = []
            del output
            with in_shard(call, k, "backward", shard):
                found = call.reached.merge(*shard.backward([loss], [torch.ones_like(loss)]))
            if call.is_first:
                call.large_buffers.learn(shard)
            call.reached.close()
            self._shards[k] = Shard(shard.random, replica, buffers=shard.buffers)
            return found
        finally:
            call.replicas.give_back(replica)

    def _check(self, done: list[Shard]) -> None:
        call = self._call
        call.effects.check(done)
        compare_with_bare_module(call)
        if call.split.bounds:
            assert self._target_split is not None
            check_loss(call, self._loss_fn, self._target_split)
        if len({c is not None for c in self._counts}) > 1:
            raise ValueError("loss_fn returned (sum, count) for some shards, a mean for others")

    def _total(self, grads: Grads, like: Tensor) -> Tensor:
        """The whole batch's loss; if losses are sums, divides loss and gradients by the count."""
        numbers = [
            None if c is None else torch.tensor(float(c), dtype=torch.float64) for c in self._counts
        ]
        loss, total = self._call.totals(
            [self._losses, numbers], [like, torch.zeros((), dtype=torch.float64)]
        )
        assert loss is not None
        if total is not None:
            loss = loss / total.to(loss.device, loss.dtype)
            for i, g in enumerate(grads):
                if g is not None:  # not in place: one shard's sum is its own gradient
                    grads[i] = g / total.to(g.device, g.dtype)
        return loss


def _checked(returned: Any, k: int) -> tuple[Tensor, Any]:
    is_pair = isinstance(returned, tuple) and len(returned) == 2
    loss, count = returned if is_pair else (returned, None)
    if not isinstance(loss, Tensor) or (loss.dim() != 0 and loss.numel() != 1):
        raise ValueError(
            "loss_fn must return a scalar tensor, or (sum, count); for shard "
            f"{k} it returned {tuple(loss.shape) if isinstance(loss, Tensor) else loss!r}"
        )
    if not loss.requires_grad:
        raise ValueError(f"loss_fn returned a loss without a graph for shard {k}: nothing to train")
    return loss.reshape(()), count
