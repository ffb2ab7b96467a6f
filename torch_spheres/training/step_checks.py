"""`StepChecks`: what must be the same on all ranks when they begin a step.

`RankCollective` sends each rank's facts as integers in the one message that starts a forward: how
the model is called, which batches were handed out, how many steps the optimizers have made, and,
every so often, checksums of inputs, weights and hyperparameters. All ranks get the same table, so
that all raise the same error. `GradientHook` uses `GradientSumChecks` for a loop of the user's own.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from torch_spheres.distributed.drift import (
    OptimizerSteps,
    comparable_parameters,
    digest_of,
    hyperparameters,
    is_due,
)
from torch_spheres.reduction.partition import tree_leaves
from torch_spheres.runtime.rng import peek_base
from torch_spheres.runtime.stack_level import users_level
from torch_spheres.training.batch_split import without_dim
from torch_spheres.training.rank_differences import (
    by_rank,
    refuse_batches,
    refuse_settings,
    refuse_trained,
    refuse_values,
    warn_of_generators,
)

if TYPE_CHECKING:
    from torch_spheres.distributed.group import Ranks
    from torch_spheres.training.batch_split import Split

__all__ = ["GradientSumChecks", "StepAgreement", "StepChecks"]

_METHODS = ("forward", "forward_backward")
_INT64 = 2**63 - 1
_BASE = 1  # column of "base"
_COMPARED_CALLS = 8  # first calls, in which inputs are compared
_MAX_BYTES = 1 << 22  # of each input, that its checksum reads

_Facts = dict[str, int | list[int]]


@dataclass(frozen=True)
class StepAgreement:
    """What the ranks have agreed on."""

    base: int
    """Rank 0's seed of the shards' random numbers."""
    rows: list[int]
    """Number of rows of each rank."""


class StepChecks:
    """The checks of one model on one rank.

    Args:
        module: the model.
        number: of the model, the same on all ranks; copies have that of the original.
    """

    def __init__(self, module: nn.Module, number: int) -> None:
        self._number = number
        self._calls = 0
        self._steps = OptimizerSteps(module)
        self._equal_inputs = 0  # checksum, where all ranks had the same inputs in the last call
        self._warned_of_inputs = self._warned_of_groups = False
        self._evaluated = -1  # number of calls when an evaluation last compared the weights

    def facts_of(self, ranks: Ranks, module: nn.Module, what: str, split: Split | None) -> _Facts:
        """Facts of a call on this rank; `split` is None if cutting the arguments has failed."""
        self._calls += 1
        params = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        trained = [(n, None if is_lazy(p) else p.shape) for n, p in params]
        flat = [] if split is None else split.flat
        dims = [] if split is None else split.dims
        tensors = [(v, d) for v, d in zip(flat, dims, strict=True) if isinstance(v, Tensor)]
        shapes = [(v.dim(), without_dim(v.shape, d), v.dtype, v.requires_grad) for v, d in tensors]
        autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        from_loader = ranks.batches.has_new_batches
        compares = self._calls <= _COMPARED_CALLS and module.training and not from_loader
        due = is_due(self._calls)
        return {
            "model": self._number,
            "base": peek_base(),  # its column is _BASE
            "call": self._calls,
            "what": _METHODS.index(what),
            "mode": 2 * module.training + torch.is_grad_enabled(),
            "parts": zlib.crc32(bytes(part.training for part in module.modules())),
            "autocast": zlib.crc32(repr(autocast).encode()),
            "plain": zlib.crc32(repr(_plain_arguments(flat, dims)).encode()),
            "trained": zlib.crc32(repr(trained).encode()),
            "rows": 0 if split is None else split.rows,
            "form": zlib.crc32(repr(shapes).encode()),
            "seed": torch.initial_seed() & _INT64,
            "state": zlib.crc32(torch.get_rng_state().numpy().tobytes()),
            "alone": ranks.drew_alone,
            "steps": self._steps.calls_after_steps(),
            "inputs": _digest_of_rows(tensors) if compares else 0,
            "values": digest_of(comparable_parameters(module)) if due else 0,
            "settings": digest_of(hyperparameters(self._steps.optimizers)) if due else 0,
            "batches": ranks.batches.integers(),
        }

    @staticmethod
    def as_integers(facts: _Facts) -> list[int]:
        """The facts as integers, of the same number for all calls."""
        return [n for fact in facts.values() for n in (fact if isinstance(fact, list) else [fact])]

    def compare(
        self, ranks: Ranks, module: nn.Module, mine: _Facts, split: Split, table: Tensor
    ) -> StepAgreement:
        """Compares all ranks' facts: `table` has a row of `as_integers` for each.

        Raises:
            ValueError: the ranks' calls do not belong together.
        """
        lists = table.tolist()
        self._compare_loaders(ranks, split)
        if mine["inputs"] == 0 and all(row == lists[0] for row in lists):  # the usual case
            self._equal_inputs = 0
            return StepAgreement(lists[0][_BASE], [split.rows] * len(lists))
        names = [name for name, fact in mine.items() if not isinstance(fact, list)]
        column = {name: [row[i] for row in lists] for i, name in enumerate(names)}
        differ = {name for name, values in column.items() if len({*values}) > 1}
        self._compare_calls(column)
        if "trained" in differ:
            refuse_trained(ranks, module)
        has_rows = [r for r, rows in enumerate(column["rows"]) if rows]
        if len({column["form"][r] for r in has_rows}) > 1:
            shapes = [f"{v.dtype} {tuple(v.shape)}" for v in split.flat if isinstance(v, Tensor)]
            raise ValueError(
                "the ranks have inputs of different types or shapes (beside the rows): rank "
                f"{ranks.rank} has {', '.join(shapes)}"
            )
        refuse_batches(ranks, [row[len(names) :] for row in lists])
        if "steps" in differ:
            raise ValueError(
                "the ranks' optimizers have made different numbers of steps of this model's "
                f"parameters, between calls: {by_rank(column['steps'])}; a step that is left out "
                "has to be left out on all ranks (where that depends on a loss or a gradient of "
                "the rank's own rows, use the whole batch's: model.gather(), or what "
                "forward_backward returns)"
            )
        if "settings" in differ:
            refuse_settings(ranks, self._steps.optimizers)
        if "values" in differ:
            refuse_values(ranks, comparable_parameters(module))
        self._compare_inputs(ranks, [column["inputs"][r] for r in has_rows])
        if "state" in differ and not ranks.has_warned_of_rng and not any(column["alone"]):
            ranks.has_warned_of_rng = True
            warn_of_generators()
        return StepAgreement(column["base"][0], column["rows"])

    def compare_evaluation(self, ranks: Ranks, module: nn.Module) -> None:
        """Raises a ValueError if weights or batches differ when metrics are summed."""
        due, self._evaluated = self._evaluated != self._calls, self._calls
        values = digest_of(comparable_parameters(module)) if due else 0
        lists = ranks.meet("an evaluation", [values, *ranks.batches.integers()]).tolist()
        if len({row[0] for row in lists}) > 1:
            refuse_values(ranks, comparable_parameters(module))
        refuse_batches(ranks, [row[1:] for row in lists])

    @staticmethod
    def _compare_calls(column: dict[str, list[int]]) -> None:
        modes = [f"training={bool(m & 2)}, grad enabled={bool(m & 1)}" for m in column["mode"]]
        same = (
            ("call different models, in the order in which they were made", column["model"]),
            ("call the model in different ways", [_METHODS[c] for c in column["what"]]),
            ("are in different modes", modes),
            (
                "are in different modes in parts of the model (train() and eval()): checksums",
                column["parts"],
            ),
            ("have different settings of autocast: checksums", column["autocast"]),
            (
                "give the model different arguments that are no tensors of rows: checksums",
                column["plain"],
            ),
            ("have called the model a different number of times", column["call"]),
            (
                "were seeded differently (random numbers belong to shards: give all the same seed)",
                column["seed"],
            ),
        )
        for text, values in same:
            if len({*values}) > 1:
                raise ValueError(f"the ranks {text}: {by_rank(values)}")

    def _compare_loaders(self, ranks: Ranks, split: Split) -> None:
        """Checks that the loader cuts batches for the model's ranks and shards."""
        latest = ranks.take_latest_loader()
        if latest is None:
            return
        theirs, shards = latest
        if theirs is ranks and shards != split.shards:
            fewer = "" if tree_leaves(split.shards) == split.shards else f", shards={split.shards}"
            raise ValueError(
                f"the loader hands out rows for {shards} shards, and the model has {split.shards}: "
                f"give wrap() the model's spheres, ts.wrap(loader, model.spheres{fewer})"
            )
        if theirs is not ranks and not self._warned_of_groups:
            self._warned_of_groups = True
            warnings.warn(
                "the last batch came from a loader that shares its batches with another process "
                f"group (of {theirs.world}) than the model's (of {ranks.world}): give both the "
                "same process_group",
                UserWarning,
                stacklevel=users_level(),
            )

    def _compare_inputs(self, ranks: Ranks, digests: Sequence[int]) -> None:
        """Checks that each rank has its own rows of a batch, and not all of it."""
        if len(digests) < 2 or len({*digests}) > 1 or digests[0] == 0:
            self._equal_inputs = 0
            return
        text = (
            "all ranks have called the model with the same rows, where each should have its part "
            "of a batch: wrap the loader, ts.wrap(loader, model.spheres), which hands out this "
            "rank's rows, or give a plain DataLoader a SphereBatchSampler. Where the loop draws "
            "the rows itself (noise), all ranks draw the same: draw them for the whole batch, and "
            "take this rank's part"
        )
        before, self._equal_inputs = self._equal_inputs, digests[0]
        # With a loader that shares its batches, these inputs may be noise that the loop draws.
        if before and before != digests[0] and not ranks.batches.has_batches:
            raise ValueError(f"{text} (and so they have in another call before)")
        if not self._warned_of_inputs:
            self._warned_of_inputs = True
            warnings.warn(text, UserWarning, stacklevel=users_level())


class GradientSumChecks:
    """The checks of a loop that computes gradients itself and trains the optimizer's parameters."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._sums = 0

    def meet(self, ranks: Ranks) -> None:
        """Raises a ValueError if batches, parameters or hyperparameters differ before a sum."""
        self._sums += 1
        due = is_due(self._sums)
        settings = digest_of(hyperparameters([self._optimizer])) if due else 0
        values = digest_of(self._values()) if due else 0
        mine = [self._sums, settings, values, *ranks.batches.integers()]
        lists = ranks.meet("the start of a sum", mine).tolist()
        sums, all_settings, all_values = ([row[i] for row in lists] for i in range(3))
        if len({*sums}) > 1:
            raise ValueError(f"the ranks have made different numbers of sums: {by_rank(sums)}")
        refuse_batches(ranks, [row[3:] for row in lists])
        if len({*all_settings}) > 1:
            refuse_settings(ranks, [self._optimizer])
        if len({*all_values}) > 1:
            refuse_values(ranks, self._values())

    def _values(self) -> Iterator[tuple[str, Tensor]]:
        groups = self._optimizer.param_groups
        for i, parameter in enumerate(p for group in groups for p in group["params"]):
            if parameter.layout is torch.strided and not is_lazy(parameter):
                yield f"parameter {i} of shape {tuple(parameter.shape)}", parameter


def _plain_arguments(flat: Sequence[Any], dims: Sequence[int | None]) -> list[Any]:
    """Numbers and strings, which every shard gets as they are."""
    whole = (v for v, d in zip(flat, dims, strict=True) if d is None)
    return [v for v in whole if isinstance(v, (bool, int, float, complex, str, bytes))]


def _digest_of_rows(tensors: Sequence[tuple[Tensor, int | None]]) -> int:
    """A checksum of the inputs that are cut; 0 if all rows are equal, which shows nothing."""
    crc, rows_differ = 0, False
    for value, dim in tensors:
        if dim is None or value.dim() == 0 or type(value) is not Tensor:
            continue
        if value.layout is not torch.strided or value.is_quantized:
            continue
        rows = value.detach().movedim(dim, 0)
        rows_differ = rows_differ or (len(rows) > 1 and bool((rows != rows[:1]).any()))
        raw = rows.resolve_conj().resolve_neg().contiguous().reshape(-1)
        raw = raw[: _MAX_BYTES // raw.itemsize].cpu().view(torch.uint8)
        crc = zlib.crc32(raw.numpy().data, crc)
    return (crc or 1) if rows_differ else 0
