"""Checksums of weights and hyperparameters, and which optimizers have made steps.

All ranks get the same gradients, so their weights stay the same unless something of a rank's own
gets in: a learning rate, a schedule by ``loss.item()``, a weight that is changed by hand. The
checks of each step, and of a checkpoint, compare these checksums between ranks, and name the first
value that differs.
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
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import register_optimizer_step_post_hook

from torch_spheres.runtime.process_wide import is_on

__all__ = [
    "OptimizerSteps", "comparable_parameters", "comparable_values", "digest_of", "digests",
    "first_difference", "hyperparameters", "is_due",
]  # fmt: skip

_OFTEN = 64  # calls between two comparisons, once there were so many
_SMALL = 1 << 14  # bytes of a tensor that go into a checksum of their order
_COLUMNS = 2048  # of the table that a tensor on an accelerator is taken for
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by item size
_SETTINGS = (bool, int, float, str, tuple, type(None))  # types of compared hyperparameters
_PLAIN = (Tensor, nn.Parameter)  # subclasses may be shards, or compute their values


def is_due(call: int) -> bool:
    """Whether a model's call of that number, from 1, compares weights: 2, 4, ... 64, 128, 192, ...

    A comparison reads all weights once; a training step does so some ten times.
    """
    return call > 1 and (call & (call - 1) == 0 if call < _OFTEN else call % _OFTEN == 0)


def comparable_parameters(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The plain, dense parameters, by name; no buffers, which one rank's evaluation may change."""
    for name, value in module.named_parameters():
        is_plain = type(value) in _PLAIN and value.layout is torch.strided
        if is_plain and not nn.parameter.is_lazy(value) and value.device.type != "meta":
            yield name, value


def _checksum(tensor: Tensor) -> int:
    """Of a tensor's bits; of a large one on an accelerator, of its beginning and of sums of all.

    The items are taken as a table, of which all rows and all columns are summed, so that values
    that have changed places count too.
    """
    value = tensor.detach().resolve_conj().resolve_neg().contiguous()
    flat = (torch.view_as_real(value) if value.is_complex() else value).reshape(-1)
    if flat.is_cpu:
        return zlib.crc32(flat.view(torch.uint8).numpy().data)
    return _checksum_by_sums(flat)


def _checksum_by_sums(flat: Tensor) -> int:
    crc = zlib.crc32(flat[: _SMALL // flat.itemsize].view(torch.uint8).cpu().numpy().data)
    if flat.nbytes <= _SMALL:
        return crc
    # Summed as integers of the item's size, which have its alignment.
    items = flat.view(_INTEGERS[flat.itemsize])
    table, rest = items.split([len(items) // _COLUMNS * _COLUMNS, len(items) % _COLUMNS])
    table = table.view(-1, _COLUMNS)
    sums = [table.sum(dim, dtype=torch.int64).cpu() for dim in (0, 1)]
    for part in (*sums, rest.cpu()):
        crc = zlib.crc32(part.numpy().data, crc)
    return crc


@torch.no_grad()
def digests(named: Iterable[tuple[str, Any]]) -> dict[str, int]:
    """A checksum of each value, by name: of a tensor's bits, of anything else's repr."""
    return {
        name: _checksum(value) if isinstance(value, Tensor) else zlib.crc32(repr(value).encode())
        for name, value in named
    }


def digest_of(named: Iterable[tuple[str, Any]]) -> int:
    """One checksum of all names and values."""
    crc = 0
    for name, value in digests(named).items():
        crc = zlib.crc32(f"{name}:{value}".encode(), crc)
    return crc


def hyperparameters(optimizers: Iterable[Optimizer]) -> Iterator[tuple[str, Any]]:
    """Learning rates and the like, of each group of each optimizer, by a name for errors."""
    for n, optimizer in enumerate(optimizers):
        of_many = f" {n}" if n else ""
        for g, group in enumerate(optimizer.param_groups):
            for key, value in sorted(group.items()):
                plain = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
                if key != "params" and isinstance(plain, _SETTINGS):
                    yield f"{key} of {type(optimizer).__name__}{of_many}, group {g}", plain


def comparable_values(objects: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The weights, hyperparameters and optimizer states of named objects, by a name for errors."""
    for name, thing in objects.items():
        if isinstance(thing, nn.Module):
            for key, value in comparable_parameters(thing):
                yield f"{name}.{key}", value
        elif isinstance(thing, Optimizer):
            for key, value in hyperparameters([thing]):
                yield f"{name}: {key}", value
            for i, state in thing.state_dict()["state"].items():
                for key, value in state.items() if isinstance(state, dict) else ():
                    if type(value) is Tensor and value.layout is torch.strided:
                        yield f"{name}.state[{i}].{key}", value
        elif isinstance(thing, LRScheduler):
            for key, value in thing.state_dict().items():
                if isinstance(value, (bool, int, float, str)):
                    yield f"{name}.{key}", value


def first_difference(tables: Sequence[Mapping[str, Any]]) -> tuple[str, list[Any]] | None:
    """The first name whose value differs between tables, and its value in each of them."""
    for name in {name: None for table in tables for name in table}:
        values = [table.get(name, "nothing") for table in tables]
        if any(value != values[0] for value in values):
            return name, values
    return None


class OptimizerSteps:
    """Finds the optimizers that train a module, and notes when one makes a step.

    Args:
        module: whose parameters are trained; it is not kept alive.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        # Whether an optimizer trains the module, and how many groups it had then.
        self._known: weakref.WeakKeyDictionary[Optimizer, tuple[bool, int]]
        self._known = weakref.WeakKeyDictionary()
        self._has_stepped = False
        self._calls = 0
        _all.add(self)
        _count_steps()

    @property
    def optimizers(self) -> list[Optimizer]:
        """The optimizers that have made a step, in the order of their first ones."""
        return [optimizer for optimizer, (is_ours, _) in self._known.items() if is_ours]

    def calls_after_steps(self) -> int:
        """How many calls of the module, with this one, came after a step or several.

        Steps themselves are not counted: some optimizers have others inside, not equally many on
        all ranks.
        """
        self._calls += self._has_stepped
        self._has_stepped = False
        return self._calls

    def note_step(self, optimizer: Optimizer) -> None:
        """An optimizer of this process, of this module or another, has made a step."""
        is_ours, groups = self._known.get(optimizer, (False, 0))
        if not is_ours and groups != len(optimizer.param_groups):
            module = self._module()
            mine = set() if module is None else {id(p) for p in module.parameters()}
            trained = (p for group in optimizer.param_groups for p in group["params"])
            is_ours = any(id(p) in mine for p in trained)
            self._known[optimizer] = is_ours, len(optimizer.param_groups)
        self._has_stepped |= is_ours


_all: weakref.WeakSet[OptimizerSteps] = weakref.WeakSet()


@functools.cache
def _count_steps() -> None:
    """Installs a hook, once, that notes the steps of all optimizers of the process."""

    def after_step(optimizer: Optimizer, *_: object) -> None:
        for steps in list(_all):
            steps.note_step(optimizer)

    if is_on("TORCH_SPHERES_STEP_HOOK"):
        register_optimizer_step_post_hook(after_step)
