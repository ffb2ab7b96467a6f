"""Whether the ranks' weights and hyperparameters are still the same.

Gradients are the same on all ranks, so weights stay the same, unless something of a rank's own gets
in: a learning rate, a schedule by ``loss.item()``, a weight that is changed by hand. From then on
each rank trains another model. Checksums of all values are compared every so often; if they differ,
the first value that does is named.
"""

from __future__ import annotations

import functools
import weakref
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from torch_spheres.runtime.process_wide import is_on

__all__ = [
    "OptimizerSteps", "digest_of", "digests", "first_difference", "hyperparameters", "is_due",
    "values_of",
]  # fmt: skip

_OFTEN = 64  # calls between two comparisons, once there were so many
_SMALL = 1 << 14  # bytes: all of them go into a checksum that knows their order


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by their bytes
_PLAIN = (Tensor, nn.Parameter)  # others may be shards of a tensor, or compute what they are


def is_due(call: int) -> bool:
    """Whether the values are compared in a model's call of that number, counted from 1.

    Calls 2, 4, 8 and so on up to 64, and every 64th: the comparison reads all weights once, which a
    step of training does some ten times.
    """
    return call > 1 and (call & (call - 1) == 0 if call < _OFTEN else call % _OFTEN == 0)


def values_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters, by name."""
    # (Not the buffers: an evaluation of one rank alone may write to them.)
    for name, value in module.named_parameters():
        is_plain = type(value) in _PLAIN and value.layout is torch.strided
        if is_plain and not nn.parameter.is_lazy(value) and value.device.type != "meta":
            yield name, value


def _checksum(tensor: Tensor) -> int:
    """Of its bits. A large tensor's is their sum, at the speed of memory, and that of its begin."""
    value = tensor.detach().resolve_conj().resolve_neg().contiguous()
    flat = (torch.view_as_real(value) if value.is_complex() else value).reshape(-1)
    crc = zlib.crc32(flat[: _SMALL // flat.itemsize].view(torch.uint8).cpu().numpy().data)
    if flat.nbytes <= _SMALL:
        return crc
    # (As integers of the same size, which may begin anywhere in memory where the values may.)
    total = int(flat.view(_INTEGERS[flat.itemsize]).sum(dtype=torch.int64))
    return zlib.crc32(str(total).encode(), crc)


@torch.no_grad()
def digests(named: Iterable[tuple[str, Any]]) -> dict[str, int]:
    """A checksum of each value: of a tensor's bits, of anything else's text."""
    return {
        name: _checksum(value) if isinstance(value, Tensor) else zlib.crc32(repr(value).encode())
        for name, value in named
    }


def digest_of(named: Iterable[tuple[str, Any]]) -> int:
    """One for all of them."""
    crc = 0
    for name, value in digests(named).items():
        crc = zlib.crc32(f"{name}:{value}".encode(), crc)
    return crc


def hyperparameters(optimizers: Iterable[Optimizer]) -> Iterator[tuple[str, Any]]:
    """Of each group of each optimizer: learning rates and the like."""
    for n, optimizer in enumerate(optimizers):
        of_many = f" {n}" if n else ""
        for g, group in enumerate(optimizer.param_groups):
            for key, value in sorted(group.items()):
                plain = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
                if key != "params" and isinstance(
                    plain, (bool, int, float, str, tuple, type(None))
                ):
                    yield f"{key} of {type(optimizer).__name__}{of_many}, group {g}", plain


def first_difference(tables: Sequence[Mapping[str, Any]]) -> tuple[str, list[Any]] | None:
    """The first name that does not have the same value in all tables, and each one's value."""
    for name in {name: None for table in tables for name in table}:
        values = [table.get(name, "nothing") for table in tables]
        if any(value != values[0] for value in values):
            return name, values
    return None


class OptimizerSteps:
    """The optimizers that train a module, and whether they have made a step.

    Args:
        module: whose parameters; not kept alive.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        # Whether it trains the module, and of how many groups it was then.
        self._known: weakref.WeakKeyDictionary[Optimizer, tuple[bool, int]]
        self._known = weakref.WeakKeyDictionary()
        self._stepped = False
        self._calls = 0
        _all.add(self)
        _listen()

    @property
    def optimizers(self) -> list[Optimizer]:
        """That have made a step, in the order of their first ones."""
        return [optimizer for optimizer, (is_ours, _) in self._known.items() if is_ours]

    def calls_after_steps(self) -> int:
        """How many calls of the module there were, this one too, before which a step was made.

        (Not how many steps: some optimizers have others inside of them, not as many on all ranks.)
        """
        self._calls += self._stepped
        self._stepped = False
        return self._calls

    def count(self, optimizer: Optimizer) -> None:
        """One of the process's optimizers has made a step."""
        is_ours, groups = self._known.get(optimizer, (False, 0))
        if not is_ours and groups != len(optimizer.param_groups):
            module = self._module()
            mine = set() if module is None else {id(p) for p in module.parameters()}
            trained = (p for group in optimizer.param_groups for p in group["params"])
            is_ours = any(id(p) in mine for p in trained)
            self._known[optimizer] = is_ours, len(optimizer.param_groups)
        self._stepped |= is_ours


_all: weakref.WeakSet[OptimizerSteps] = weakref.WeakSet()


@functools.cache
def _listen() -> None:
    """Has all optimizers' steps counted; once, for the first model that several ranks train."""

    def after_step(optimizer: Optimizer, *_: object) -> None:
        for steps in list(_all):
            steps.count(optimizer)

    if is_on("TORCH_SPHERES_STEP_HOOK"):
        register_optimizer_step_post_hook(after_step)
