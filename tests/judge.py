"""Plain torch as the judge of what `SphereParallel` returns, and of the gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import torch_spheres as ts
from torch_spheres.training.pytree import flatten, unflatten


class Calls(nn.Module):
    """Calls a function with a layer, a matrix and a vector of weights, and the arguments."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)
        self.matrix = nn.Parameter(torch.randn(4, 4))
        self.vector = nn.Parameter(torch.rand(3) + 0.5)
        self.fn = fn

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.fn(self, *args, **kwargs)


def parallel(
    fn: Callable[..., Any], spheres: ts.KissingSpheres, **options: Any
) -> ts.SphereParallel:
    return ts.SphereParallel(Calls(fn), spheres, **options)


def tensors_of(value: Any) -> list[Tensor]:
    return [v for v in flatten(value)[0] if isinstance(v, Tensor)]


def detached(value: Any) -> Any:
    """A copy of the arguments, whose floating-point tensors require gradients."""
    leaves, nesting = flatten(value)
    made = [
        v.detach().clone().requires_grad_(v.is_floating_point()) if isinstance(v, Tensor) else v
        for v in leaves
    ]
    return unflatten(made, nesting)


def loss_of(outputs: list[Tensor]) -> Tensor:
    """Weighs every element of every output differently."""
    total = torch.zeros((), dtype=torch.float64)
    for i, output in enumerate(outputs):
        if output.is_floating_point():
            weights = torch.linspace(0.5 + i, 1.5, output.numel(), dtype=torch.float64)
            total = total + (output.double() * weights.view(output.shape)).sum()
    return total


def judged(
    module: nn.Module,
    spheres: ts.KissingSpheres,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    look: Callable[[Any], Any] = lambda output: output,
    **options: Any,
) -> Any:
    """What the model returns on the spheres: values and gradients are those of plain torch."""
    plain, mine = copy.deepcopy(module), copy.deepcopy(module)
    parallel = ts.SphereParallel(mine, spheres, **options)
    found = []
    for model in (parallel, plain):
        given, named = detached(args), detached(kwargs or {})
        output = model(*given, **named)
        outputs = tensors_of(look(output))
        loss_of(outputs).backward()
        inputs = [t.grad for t in tensors_of((given, named)) if t.is_floating_point()]
        weights = [p.grad for p in model.parameters()]
        found.append((output, outputs, inputs, weights))
    (output, *ours), (_, *theirs) = found
    for kind, mine_of, other in zip(("outputs", "inputs", "weights"), ours, theirs, strict=True):
        assert len(mine_of) == len(other), kind
        for i, (a, b) in enumerate(zip(mine_of, other, strict=True)):
            if a is None or b is None:
                assert a is None, (kind, i)
                assert b is None, (kind, i)
            else:
                where = f"{kind} {i}: "
                torch.testing.assert_close(
                    a, b, rtol=1e-4, atol=1e-5, msg=lambda text, where=where: where + text
                )
    return output
