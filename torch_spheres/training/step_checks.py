"""What ranks tell each other when they begin a step, and what must be the same on all of them.

All of it is a few integers in one short message, which is sent anyway: how the model is called,
which batches have been handed out, how many steps the optimizers have made, and, every so often,
checksums of inputs, weights and hyperparameters. If something differs, all ranks see it in the same
table, and all raise.
"""

from __future__ import annotations

import itertools
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from torch_spheres.distributed.batch_log import BatchLog
from torch_spheres.distributed.drift import (
    OptimizerSteps,
    comparable_parameters,
    digest_of,
    digests,
    first_difference,
    hyperparameters,
    is_due,
)
from torch_spheres.reduction.partition import tree_leaves
from torch_spheres.runtime.rng import next_base
from torch_spheres.runtime.stack_level import users_level
from torch_spheres.training.batch_split import without_dim

if TYPE_CHECKING:
    from torch_spheres.distributed.group import Ranks
    from torch_spheres.training.batch_split import Split

__all__ = ["Agreed", "HandChecks", "StepChecks", "by_rank"]

_WHAT = ("forward", "forward_backward")
_INT64 = 2**63 - 1
_BASE = 1  # among the facts
_FIRST = 8  # calls in which inputs are compared
_MOST = 1 << 22  # bytes of each input that go into its checksum

_Facts = dict[str, int | list[int]]


@dataclass(frozen=True)
class Agreed:
    """What comes of it."""

    base: int
    """Seed of the shards' random numbers: rank 0's."""
    rows: list[int]
    """Of each rank."""


class StepChecks:
    """Of one model, on one rank.

    Args:
        module: the model.
        number: of the model, the same on all ranks; copies have that of the original.
    """

    def __init__(self, module: nn.Module, number: int) -> None:
        self._number = number
        self._calls = 0
        self._steps = OptimizerSteps(module)
        self._alike = 0  # the inputs that were the same on all ranks, the last time
        self._told_of_inputs = self._told_of_groups = False
        self._evaluated = -1  # calls, when an evaluation compared the weights

    # ---- what this rank says ----

    def tell(self, ranks: Ranks, module: nn.Module, what: str, split: Split | None) -> _Facts:
        """Of this call; `split` is None if it has failed."""
        self._calls += 1
        params = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        trained = [(n, None if is_lazy(p) else p.shape) for n, p in params]
        flat = [] if split is None else split.flat
        dims = [] if split is None else split.dims
        tensors = [(v, d) for v, d in zip(flat, dims, strict=True) if isinstance(v, Tensor)]
        shapes = [(v.dim(), without_dim(v.shape, d), v.dtype, v.requires_grad) for v, d in tensors]
        from_loader = ranks.batches.has_new_batches
        compares = self._calls <= _FIRST and module.training and not from_loader
        due = is_due(self._calls)
        return {
            "model": self._number,
            "base": next_base(),  # (its place is _BASE)
            "call": self._calls,
            "what": _WHAT.index(what),
            "mode": 2 * module.training + torch.is_grad_enabled(),
            "parts": zlib.crc32(bytes(part.training for part in module.modules())),
            "autocast": zlib.crc32(repr(_autocast()).encode()),
            "plain": zlib.crc32(repr(_plain(flat, dims)).encode()),
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
    def flat(facts: _Facts) -> list[int]:
        """As integers, as many for all calls."""
        return [n for fact in facts.values() for n in (fact if isinstance(fact, list) else [fact])]

    # ---- what all of them have said ----

    def compare(
        self, ranks: Ranks, module: nn.Module, mine: _Facts, split: Split, table: Tensor
    ) -> Agreed:
        """On all ranks, with the same table: a row for each.

        Raises:
            ValueError: they are about to do what has no meaning together.
        """
        lists = table.tolist()
        self._compare_loaders(ranks, split)
        if mine["inputs"] == 0 and all(row == lists[0] for row in lists):  # mostly
            self._alike = 0
            return Agreed(lists[0][_BASE], [split.rows] * len(lists))
        names = [name for name, fact in mine.items() if not isinstance(fact, list)]
        column = {name: [row[i] for row in lists] for i, name in enumerate(names)}
        self._compare_calls(column)
        if len({*column["trained"]}) > 1:
            _refuse_trained(ranks, module)
        has_rows = [r for r, rows in enumerate(column["rows"]) if rows]
        if len({column["form"][r] for r in has_rows}) > 1:
            shapes = [f"{v.dtype} {tuple(v.shape)}" for v in split.flat if isinstance(v, Tensor)]
            raise ValueError(
                "the ranks have inputs of different types or shapes (beside the rows): rank "
                f"{ranks.rank} has {', '.join(shapes)}"
            )
        if wrong := BatchLog.compare([row[len(names) :] for row in lists]):
            ranks.batches.forget()
            raise ValueError(wrong)
        if len({*column["steps"]}) > 1:
            raise ValueError(
                "the ranks' optimizers have made different numbers of steps of this model's "
                f"parameters, between calls: {by_rank(column['steps'])}; a step that is left out "
                "has to be left out on all ranks (where that depends on a loss or a gradient of "
                "the rank's own rows, use the whole batch's: model.gather(), or what "
                "forward_backward returns)"
            )
        if len({*column["settings"]}) > 1:
            _refuse_settings(ranks, self._steps.optimizers)
        if len({*column["values"]}) > 1:
            _refuse_values(ranks, comparable_parameters(module))
        self._compare_inputs(ranks, [column["inputs"][r] for r in has_rows])
        if len({*column["state"]}) > 1 and not ranks.has_warned_of_rng and not any(column["alone"]):
            ranks.has_warned_of_rng = True
            _warn_of_states()
        return Agreed(column["base"][0], column["rows"])

    def compare_evaluation(self, ranks: Ranks, module: nn.Module) -> None:
        """Weights and batches, when the ranks put together what each has evaluated.

        Raises:
            ValueError: they are not the same.
        """
        due, self._evaluated = self._evaluated != self._calls, self._calls
        values = digest_of(comparable_parameters(module)) if due else 0
        lists = ranks.meet("an evaluation", [values, *ranks.batches.integers()]).tolist()
        if len({row[0] for row in lists}) > 1:
            _refuse_values(ranks, comparable_parameters(module))
        if wrong := BatchLog.compare([row[1:] for row in lists]):
            ranks.batches.forget()
            raise ValueError(wrong)

    @staticmethod
    def _compare_calls(column: dict[str, list[int]]) -> None:
        modes = [f"training={bool(m & 2)}, grad enabled={bool(m & 1)}" for m in column["mode"]]
        same = (
            ("call different models, in the order in which they were made", column["model"]),
            ("call the model in different ways", [_WHAT[c] for c in column["what"]]),
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
        """Whether the loader has the model's ranks and shards."""
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
        if theirs is not ranks and not self._told_of_groups:
            self._told_of_groups = True
            warnings.warn(
                "the last batch came from a loader that shares its batches with another process "
                f"group (of {theirs.world}) than the model's (of {ranks.world}): give both the "
                "same process_group",
                UserWarning,
                stacklevel=users_level(),
            )

    def _compare_inputs(self, ranks: Ranks, digests_: Sequence[int]) -> None:
        """Whether all ranks were given the same rows: then each trains on all of a batch."""
        if len(digests_) < 2 or len({*digests_}) > 1 or digests_[0] == 0:
            self._alike = 0
            return
        text = (
            "all ranks have called the model with the same rows, where each should have its part "
            "of a batch: wrap the loader, ts.wrap(loader, model.spheres), which hands out this "
            "rank's rows, or give a plain DataLoader a SphereBatchSampler. Where the loop draws "
            "the rows itself (noise), all ranks draw the same: draw them for the whole batch, and "
            "take this rank's part"
        )
        before, self._alike = self._alike, digests_[0]
        # (Where there is a loader that shares its batches, it may be noise.)
        if before and before != digests_[0] and not ranks.batches.has_batches:
            raise ValueError(f"{text} (and so they have in another call before)")
        if not self._told_of_inputs:
            self._told_of_inputs = True
            warnings.warn(text, UserWarning, stacklevel=users_level())


class HandChecks:
    """Of a loop that computes gradients itself: the same, as far as there is no model to know.

    Args:
        optimizer: whose parameters it trains.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._sums = 0

    def meet(self, ranks: Ranks) -> None:
        """Before a sum over all ranks.

        Raises:
            ValueError: their batches, parameters or hyperparameters are not the same.
        """
        self._sums += 1
        due = is_due(self._sums)
        settings = digest_of(hyperparameters([self._optimizer])) if due else 0
        values = digest_of(self._values()) if due else 0
        mine = [self._sums, settings, values, *ranks.batches.integers()]
        lists = ranks.meet("the start of a sum", mine).tolist()
        if all(row == lists[0] for row in lists):
            return
        sums, settings_, values_ = ([row[i] for row in lists] for i in range(3))
        if len({*sums}) > 1:
            raise ValueError(f"the ranks have made different numbers of sums: {by_rank(sums)}")
        if wrong := BatchLog.compare([row[3:] for row in lists]):
            ranks.batches.forget()
            raise ValueError(wrong)
        if len({*settings_}) > 1:
            _refuse_settings(ranks, [self._optimizer])
        if len({*values_}) > 1:
            _refuse_values(ranks, self._values())

    def _values(self) -> Iterator[tuple[str, Tensor]]:
        groups = self._optimizer.param_groups
        for i, parameter in enumerate(p for group in groups for p in group["params"]):
            if parameter.layout is torch.strided and not is_lazy(parameter):
                yield f"parameter {i} of shape {tuple(parameter.shape)}", parameter


def _autocast() -> tuple[Any, ...]:
    return torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")


def _plain(flat: Sequence[Any], dims: Sequence[int | None]) -> list[Any]:
    """Arguments that every shard gets as they are: numbers, texts and switches."""
    whole = (v for v, d in zip(flat, dims, strict=True) if d is None)
    return [v for v in whole if isinstance(v, (bool, int, float, complex, str, bytes))]


def by_rank(values: Sequence[Any]) -> str:
    """For errors."""
    return ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(values))


def _digest_of_rows(tensors: Sequence[tuple[Tensor, int | None]]) -> int:
    """Of the inputs that are cut; 0 where all rows are alike, so that it says nothing."""
    crc, differ = 0, False
    for value, dim in tensors:
        if dim is None or value.dim() == 0 or type(value) is not Tensor:
            continue
        if value.layout is not torch.strided or value.is_quantized:
            continue
        rows = value.detach().movedim(dim, 0)
        differ = differ or (len(rows) > 1 and bool((rows != rows[:1]).any()))
        raw = rows.resolve_conj().resolve_neg().contiguous().reshape(-1)
        raw = raw[: _MOST // raw.itemsize].cpu().view(torch.uint8)
        crc = zlib.crc32(raw.numpy().data, crc)
    return (crc or 1) if differ else 0


def _refuse_trained(ranks: Ranks, module: nn.Module) -> NoReturn:
    mine = [
        f"{name} {'of no shape yet' if is_lazy(p) else tuple(p.shape)}"
        for name, p in module.named_parameters()
        if p.requires_grad
    ]
    everybody = ranks.objects(mine, "the comparison of what is trained")
    for other, theirs in enumerate(everybody):
        for one, two in itertools.zip_longest(everybody[0], theirs):
            if one != two:
                only = {*everybody[0]} ^ {*theirs}
                name = next((n for n in (one, two) if n in only), one or two)
                has, lacks = (0, other) if name in everybody[0] else (other, 0)
                raise ValueError(
                    "the ranks have other parameters that require a gradient: "
                    f"{name} does on rank {has}, and does not on rank {lacks}; freeze the same on "
                    "all of them"
                )
    raise ValueError("the ranks have other parameters that require a gradient")


def _refuse_settings(ranks: Ranks, optimizers: Iterable[Optimizer]) -> None:
    everybody = ranks.objects(dict(hyperparameters(optimizers)), "the comparison of settings")
    # (An optimizer that shards its states has others inside of it, not the same on all ranks.)
    common = set.intersection(*map(set, everybody))
    found = first_difference([{n: v for n, v in e.items() if n in common} for e in everybody])
    if found is None:
        return
    name, values = found
    raise ValueError(
        f"the ranks' optimizers differ: {name} is {by_rank(values)}; a schedule has to go by what "
        "all ranks have alike (the whole batch's loss: model.gather(), or what forward_backward "
        "returns), not by a loss of the rank's own rows"
    )


def _refuse_values(ranks: Ranks, named: Iterable[tuple[str, Tensor]]) -> NoReturn:
    everybody = ranks.objects(digests(named), "the comparison of weights")
    name, values = first_difference(everybody) or ("something", [])
    kinds = {value: [r for r, v in enumerate(values) if v == value] for value in values}
    shown = " and ".join(f"ranks {where}" for where in kinds.values())
    raise ValueError(
        f"the ranks' models have drifted apart: {name!r} is not the same on {shown}. Something "
        "that is a rank's own has changed it: a learning rate, a schedule by the loss of the "
        "rank's rows, a weight that was set on some ranks only. Make a SphereParallel of the "
        "module anew on all ranks to go on with rank 0's values"
    )


def _warn_of_states() -> None:
    warnings.warn(
        "torch's default generator is not at the same place on all ranks: something draws "
        "from it on each, such as a dataset that is loaded with num_workers=0. The shards' "
        "own numbers are those of rank 0; but if what is drawn goes into the training, the result "
        "depends on the number of ranks. "
        "Draw from a generator seeded by torch_spheres.sample_seed() in a dataset",
        UserWarning,
        stacklevel=users_level(),
    )
