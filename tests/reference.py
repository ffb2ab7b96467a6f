"""What torch_spheres promises to compute, written in plain torch: slow, sequential, obvious.

Nothing here imports torch_spheres: the tests compare its bits with these.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

HALF = (torch.bfloat16, torch.float16)


def add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Absent operands are left out, not added as zero."""
    if a is None or b is None:
        return a if b is None else b
    return a + b


def tree(shards: Sequence[Tensor | None]) -> Tensor | None:
    """The fixed tree over 1, 12, 144 or 1728 shards; shard k's path is k in base 12, LSD first."""
    present = [t for t in shards if t is not None]
    if not present:
        return None
    dtype = present[0].dtype

    def node(indices: list[int]) -> Tensor | None:
        if len(indices) == 1:
            shard = shards[indices[0]]
            return shard.float() if shard is not None and dtype in HALF else shard
        c = [node(indices[g::12]) for g in range(12)]
        q = [add(add(c[i], c[i + 1]), add(c[i + 2], c[i + 3])) for i in (0, 4, 8)]
        return add(add(q[0], q[1]), q[2])

    total = node(list(range(len(shards))))
    assert total is not None
    return total.to(dtype)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def aligned(t: Tensor) -> Tensor:
    return t.clone() if t.data_ptr() % 64 else t


def train_step(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    criterion: Callable[[Tensor, Tensor], Tensor],
    leaves: int,
) -> Tensor:
    """Forward and backward of one batch, shard after shard; fills `.grad` and buffers."""
    copies: list[nn.Module] = []
    outputs: list[Tensor] = []
    with one_thread():
        for rows in torch.tensor_split(x, leaves):
            if len(rows):
                copies.append(copy.deepcopy(model))
                outputs.append(copies[-1](aligned(rows)))
    gathered = torch.cat(outputs).detach().requires_grad_()
    loss = criterion(gathered, y)
    loss.backward()
    assert gathered.grad is not None
    grads: list[tuple[Tensor | None, ...]] = []
    with one_thread():
        for shard, output, part in zip(
            copies, outputs, gathered.grad.split([len(o) for o in outputs]), strict=True
        ):
            params = list(shard.parameters())
            grads.append(torch.autograd.grad(output, params, aligned(part), allow_unused=True))
    absent = [None] * (leaves - len(copies))
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.grad = tree([*(g[i] for g in grads), *absent])
        for name, buffer in model.named_buffers():
            after = [dict(shard.named_buffers())[name] for shard in copies]
            if buffer.is_floating_point():
                total = tree([*after, *absent])
                assert total is not None
                buffer.copy_(total / len(after))
            else:
                buffer.copy_(after[0])
    return loss.detach()


def digest(tensors: Sequence[Tensor]) -> str:
    """A fingerprint of exact bits."""
    sha = hashlib.sha256()
    for t in tensors:
        sha.update(t.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
