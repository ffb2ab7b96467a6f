"""`SphereParallel.forward_backward`: forward, loss and backward of a shard in one go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_spheres.errors import DeferredError
from torch_spheres.reduction.streaming_sum import Grads
from torch_spheres.training.batch_split import Split
from torch_spheres.training.row_check import compared
from torch_spheres.training.row_check_values import check_loss
from torch_spheres.training.shard_task import Shard, in_shard
from torch_spheres.training.sharded_call import Call

__all__ = ["forward_backward"]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def forward_backward(call: Call, loss_fn: Callable[[Any, Any], Any], targets: Any) -> Tensor:
    """See `SphereParallel.forward_backward`."""
    if not torch.is_grad_enabled():
        raise RuntimeError("forward_backward() under torch.no_grad() has no gradients to compute")
    goals: list[Split] = []
    count = len(call.split.bounds)
    losses: list[Tensor | None] = [None] * count
    counts: list[Any] = [None] * count
    shards: list[Shard | None] = [None] * count

    def run(k: int) -> tuple[Grads, Grads]:
        replica = call.pool.borrow(call.module)
        try:
            with torch.enable_grad():
                shard = call.forward_shard(k, replica)
                with in_shard(call, k, "loss", shard):
                    output = shard.rebuild()
                    (target,) = goals[0].build(goals[0].parts(k))
                    loss, counts[k] = _checked(loss_fn(output, target), k)
                    if counts[k] is None:
                        loss = loss * call.split.weights[k]
            call.reached.look_at_one(k, shard, [loss], count)
            losses[k] = loss.detach()
            shard.outputs = []
            del output
            with in_shard(call, k, "backward", shard):
                found = call.reached.put_together(*shard.backward([loss], [torch.ones_like(loss)]))
            if call.is_first:
                call.learn(shard)
            call.reached.close()
            shards[k] = Shard(shard.random, replica, buffers=shard.buffers)
            return found
        finally:
            call.pool.give_back(replica)

    if call.crew.together:
        call.reached.close()
    # While one shard is alone, what it reaches can be added to what is summed.
    grads = call.fold(run, lambda: goals.append(call.targets(targets)), one_first=call.closely)
    done = [shard for shard in shards if shard is not None]
    counted = {c is not None for c in counts}
    # A process that ran no shard has to know what the losses are, to sum them.
    found, kinds = next((v for v in losses if v is not None), None), [0]
    with DeferredError() as caught:
        if found is not None:
            kinds = [1 + _DTYPES.index(found.dtype)]
        call.effects.check(done)
        compared(call)
        if call.split.bounds:
            check_loss(call, loss_fn, goals[0])
        if len(counted) > 1:
            raise ValueError("loss_fn returned (sum, count) for some shards, a mean for others")
    (kind,) = call.finish_forward(done, caught, kinds)
    like = torch.zeros((), dtype=_DTYPES[kind - 1]) if found is None else found
    with torch.no_grad():
        numbers = [
            None if c is None else torch.tensor(float(c), dtype=torch.float64) for c in counts
        ]
        loss, total = call.totals([losses, numbers], [like, torch.zeros((), dtype=torch.float64)])
        assert loss is not None
        if total is not None:
            loss = loss / total.to(loss.device, loss.dtype)
            for i, g in enumerate(grads):
                if g is not None:  # not in place: where one shard ran, they are that shard's own
                    grads[i] = g / total.to(g.device, g.dtype)
    # Autograd adds what is known to ``.grad``, and runs the hooks.
    pairs = zip([*call.trainable, *call.inputs_with_grad], grads, strict=True)
    known = [(t, g) for t, g in pairs if g is not None and t.requires_grad]
    torch.autograd.backward([t for t, _ in known], [g for _, g in known])
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
