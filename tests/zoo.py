"""Small models, one for each way in which a model can be difficult, and how they are trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from reference import digest
from torch import Tensor, nn
from torch.nn import functional as F


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(144, 32), nn.GELU(), nn.Dropout(0.2), nn.Linear(32, 10)
    )


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * 5 * 5, 10),
    )


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(4))
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(4))
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i in (0, 2):
            y = self.convs[i](self.norms[i](x).relu())
            x = x + self.convs[i + 1](self.norms[i + 1](y).relu())
        return self.head(F.dropout2d(x, 0.1, self.training).mean((2, 3)))


class Transformer(nn.Module):
    """Dropout on the embedding, in the attention's weights, after it, in and after the MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 16)
        self.dropout = nn.Dropout(0.1)
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.embed(x.flatten(1, 2)))
        x = self.encoder(x)
        q = F.scaled_dot_product_attention(x, x, x, dropout_p=0.1 if self.training else 0.0)
        return self.head(q.mean(1))


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(12, 16, 2, dropout=0.3, batch_first=True)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x.flatten(1, 2))[0][:, -1])


class Tied(nn.Module):
    """Tied weights, an unused parameter, a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(144, 144)
        self.tied = nn.Linear(144, 144)
        self.tied.weight = self.first.weight
        self.unused = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.ones(144), requires_grad=False)
        self.last = nn.Linear(144, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.tied(self.first(x.flatten(1)).relu() * self.frozen).tanh())


class Experts(nn.Module):
    """A mixture of experts: each row goes to one of four, which some shards never use."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate = nn.Linear(144, 32), nn.Linear(32, 4)
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))
        self.last = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1)).tanh()
        weights, chosen = self.gate(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            rows = (chosen == k).nonzero().flatten()
            if len(rows):
                out = out.index_add(0, rows, expert(x[rows]) * weights[rows, None])
        return self.last(x + out)


class Sparse(nn.Module):
    """An embedding with sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.EmbeddingBag(50, 16, mode="mean", sparse=True)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        words = (x.flatten(1) * 20).long().abs() % 50
        return self.head(self.embed(words[:, :9]))


class _Inside(torch.autograd.Function):
    """A layer whose backward runs it again, as those do that save memory."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.weight = weight
        return (x @ weight).tanh()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = (x @ ctx.weight).tanh()
            return torch.autograd.grad(y, (x, ctx.weight), grad)


class Reversible(nn.Module):
    """Gradients that are computed in a backward pass inside the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(144, 10)
        self.weight = nn.Parameter(torch.randn(144, 144) / 12)

    def forward(self, x: Tensor) -> Tensor:
        y = _Inside.apply(x.flatten(1), self.weight)
        return self.head(_Inside.apply(y, self.weight) @ self.weight)


class Hooking(nn.Module):
    """A forward that hangs a hook on one of its parameters, once, as some regularisers do."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(144, 32)
        self.last = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.last.weight
        if not hasattr(weight, "handle"):
            weight.handle = weight.register_hook(lambda grad: grad * 2)
        return self.last(self.first(x.flatten(1)).relu())


# Of which only some tests make something.
OTHERS: dict[str, Callable[[], nn.Module]] = {"reversible": Reversible, "hooking": Hooking}

ZOO: dict[str, Callable[[], nn.Module]] = {
    "mlp with dropout": mlp,
    "cnn with batch norm": cnn,
    "residual net": Residual,
    "transformer with dropout": Transformer,
    "lstm with dropout": Lstm,
    "tied, unused, frozen": Tied,
    "mixture of experts": Experts,
    "sparse embedding": Sparse,
}


def make(name: str) -> nn.Module:
    torch.manual_seed(7)
    return {**ZOO, **OTHERS}[name]()


def batches(rows: int, steps: int = 3) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        yield (
            torch.randn(rows, 1, 12, 12, generator=generator),
            torch.randint(0, 10, (rows,), generator=generator),
        )


@dataclass(frozen=True)
class Optimizers:
    """One optimizer, or two where the sparse parameters need their own."""

    each: tuple[torch.optim.Optimizer, ...]

    def step(self) -> None:
        for optimizer in self.each:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.each:
            optimizer.zero_grad()


OPTIMIZERS = ("sgd", "adamw")


def optimizer_of(model: nn.Module, kind: str = "adamw") -> Optimizers:
    sparse = [m.weight for m in model.modules() if getattr(m, "sparse", False)]
    dense = [p for p in model.parameters() if p.requires_grad and not any(p is s for s in sparse)]
    made: list[torch.optim.Optimizer] = []
    if kind == "sgd":
        made.append(torch.optim.SGD([*dense, *sparse], lr=0.05, momentum=0.9))
    else:
        made.append(torch.optim.AdamW(dense, lr=0.01))
        if sparse:
            made.append(torch.optim.SparseAdam(sparse, lr=0.01))
    return Optimizers(tuple(made))


def fingerprint(model: nn.Module, optimizers: Optimizers, losses: list[Tensor]) -> str:
    """Of weights and buffers, optimizer state, gradients, losses and the random generator.

    One digest for each kind, so that a difference says where it is.
    """
    state = [
        value
        for optimizer in optimizers.each
        for group in optimizer.param_groups
        for p in group["params"]
        for value in optimizer.state.get(p, {}).values()
        if isinstance(value, Tensor)
    ]
    kinds = {
        "weights": list(model.state_dict().values()),
        "state": state,
        "gradients": [p.grad for p in model.parameters() if p.grad is not None],
        "losses": losses,
        "random": [torch.get_rng_state()],
    }
    return " ".join(f"{kind}:{digest(tensors)}" for kind, tensors in kinds.items())
