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


def placed(values: Sequence[Tensor | None], shards: int) -> list[Tensor | None]:
    """Shard j of S goes to the first leaf of the j-th of S equal blocks, from left to right."""
    leaves = min(n for n in (1, 12, 144, 1728) if n % shards == 0)
    if leaves == shards:
        return [*values, *[None] * (leaves - len(values))]
    order = [0]
    while len(order) < leaves:  # all twelve children of a node stand together
        order = [node + len(order) * child for node in order for child in range(12)]
    column: list[Tensor | None] = [None] * leaves
    for j, value in enumerate(values):
        column[order[j * (leaves // shards)]] = value
    return column


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


class ShardSeeds:
    """Shard k draws from the default generator seeded with base + k; base is drawn once, if used.

    Afterwards the default generator is where that one draw left it.
    """

    def __init__(self) -> None:
        self.state = torch.get_rng_state()
        self.base = int(torch.randint(2**63 - 1, ()))
        self.advanced = torch.get_rng_state()
        self.after: dict[int, Tensor] = {}  # a shard's backward goes on where its forward ended
        self.drawn = False

    @contextlib.contextmanager
    def of(self, k: int) -> Iterator[None]:
        if k in self.after:
            torch.set_rng_state(self.after[k])
        else:
            torch.default_generator.manual_seed(self.base + k)
            if torch.cuda.is_available():  # else each call is kept for a CUDA that may start later
                torch.cuda.manual_seed_all(self.base + k)
        before = torch.get_rng_state()
        yield
        self.after[k] = torch.get_rng_state()
        self.drawn |= not torch.equal(before, self.after[k])

    def leave(self) -> None:
        torch.set_rng_state(self.advanced if self.drawn else self.state)


def set_gradients(
    model: nn.Module,
    copies: Sequence[nn.Module],
    grads: Sequence[tuple[Tensor | None, ...]],
    shards: int,
) -> None:
    """Adds the tree sums to `.grad`, and merges the copies' buffers into the model's."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for i, p in enumerate(trainable):
            p.grad = add(p.grad, tree(placed([g[i] for g in grads], shards)))
        for name, buffer in model.named_buffers():
            after = [dict(shard.named_buffers())[name] for shard in copies]
            if all(torch.equal(a, buffer) for a in after):
                continue
            if buffer.is_floating_point():
                total = tree(placed(after, shards))
                assert total is not None
                buffer.copy_(total / len(after))
            else:
                buffer.copy_(after[0])


def train_step(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    criterion: Callable[[Tensor, Tensor], Tensor],
    shards: int,
) -> Tensor:
    """Forward and backward of one batch, shard after shard; fills `.grad` and buffers."""
    copies: list[nn.Module] = []
    outputs: list[Tensor] = []
    seeds = ShardSeeds()
    with one_thread():
        for k, rows in enumerate(torch.tensor_split(x, shards)):
            if len(rows):
                copies.append(copy.deepcopy(model))
                with seeds.of(k):
                    outputs.append(copies[-1](aligned(rows)))
    gathered = torch.cat(outputs).detach().requires_grad_()
    loss = criterion(gathered, y)
    loss.backward()
    assert gathered.grad is not None
    grads: list[tuple[Tensor | None, ...]] = []
    parts = gathered.grad.split([len(o) for o in outputs])
    with one_thread():
        for k, (shard, output, part) in enumerate(zip(copies, outputs, parts, strict=True)):
            params = [p for p in shard.parameters() if p.requires_grad]
            with seeds.of(k):
                grads.append(torch.autograd.grad(output, params, aligned(part), allow_unused=True))
    seeds.leave()
    set_gradients(model, copies, grads, shards)
    return loss.detach()


def train_step_by_shard(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    loss_fn: Callable[[Tensor, Tensor], Tensor | tuple[Tensor, int]],
    shards: int,
) -> Tensor:
    """The same without gathering: a loss for each shard, weighted by rows or by its count."""
    copies: list[nn.Module] = []
    grads: list[tuple[Tensor | None, ...]] = []
    losses: list[Tensor | None] = []
    counts: list[int] = []
    seeds = ShardSeeds()
    with one_thread():
        split = zip(torch.tensor_split(x, shards), torch.tensor_split(y, shards), strict=True)
        for k, (rows, targets) in enumerate(split):
            if not len(rows):
                continue
            copies.append(copy.deepcopy(model))
            params = [p for p in copies[-1].parameters() if p.requires_grad]
            with seeds.of(k):
                loss = loss_fn(copies[-1](aligned(rows)), aligned(targets))
                if isinstance(loss, tuple):
                    loss, count = loss
                    counts.append(count)
                else:
                    loss = loss * (len(rows) / len(x))
                grads.append(torch.autograd.grad(loss, params, allow_unused=True))
            losses.append(loss.detach())
    seeds.leave()
    total = tree(placed(losses, shards))
    assert total is not None
    set_gradients(model, copies, grads, shards)
    if counts:
        for p in model.parameters():
            if p.grad is not None:
                p.grad /= sum(counts)
        total = total / sum(counts)
    return total


def digest(tensors: Sequence[Tensor]) -> str:
    """A fingerprint of exact bits."""
    sha = hashlib.sha256()
    for t in tensors:
        dense = t.detach().to_dense() if t.is_sparse else t.detach()
        flat = dense.resolve_conj().contiguous().flatten()
        sha.update(flat.view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
