"""Errors and warnings that name what differs between ranks; used by step_checks.py.

Checksums show that something differs. Then the ranks exchange the values' names to find out what.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from torch_spheres.distributed.batch_log import BatchLog
from torch_spheres.distributed.drift import digests, first_difference, hyperparameters
from torch_spheres.runtime.stack_level import users_level

if TYPE_CHECKING:
    from torch_spheres.distributed.group import Ranks

__all__ = [
    "by_rank", "refuse_batches", "refuse_settings", "refuse_trained", "refuse_values",
    "warn_of_generators",
]  # fmt: skip


def by_rank(values: Sequence[Any]) -> str:
    """Each rank's value, as text for an error."""
    return ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(values))


def refuse_batches(ranks: Ranks, table: Sequence[Sequence[int]]) -> None:
    """Raises a ValueError if the batches of all ranks' logs differ."""
    if wrong := BatchLog.compare(table):
        ranks.batches.forget()
        raise ValueError(wrong)


def refuse_trained(ranks: Ranks, module: nn.Module) -> NoReturn:
    """Raises a ValueError that names a parameter which only some ranks train."""
    mine = [
        f"{name} {'of no shape yet' if is_lazy(p) else tuple(p.shape)}"
        for name, p in module.named_parameters()
        if p.requires_grad
    ]
    tables = ranks.objects(mine, "the comparison of what is trained")
    for other, theirs in enumerate(tables):
        for one, two in itertools.zip_longest(tables[0], theirs):
            if one != two:
                only = {*tables[0]} ^ {*theirs}
                name = next((n for n in (one, two) if n in only), one or two)
                has, lacks = (0, other) if name in tables[0] else (other, 0)
                raise ValueError(
                    "the ranks have other parameters that require a gradient: "
                    f"{name} does on rank {has}, and does not on rank {lacks}; freeze the same on "
                    "all of them"
                )
    raise ValueError("the ranks have other parameters that require a gradient")


def refuse_settings(ranks: Ranks, optimizers: Iterable[Optimizer]) -> None:
    """Raises a ValueError that names the first hyperparameter that differs, if there is one."""
    tables = ranks.objects(dict(hyperparameters(optimizers)), "the comparison of settings")
    # An optimizer that shards its states holds others, which are not the same on all ranks.
    common = set.intersection(*map(set, tables))
    found = first_difference([{n: v for n, v in e.items() if n in common} for e in tables])
    if found is None:
        return
    name, values = found
    raise ValueError(
        f"the ranks' optimizers differ: {name} is {by_rank(values)}; a schedule has to go by what "
        "all ranks have alike (the whole batch's loss: model.gather(), or what forward_backward "
        "returns), not by a loss of the rank's own rows"
    )


def refuse_values(ranks: Ranks, named: Iterable[tuple[str, Tensor]]) -> NoReturn:
    """Raises a ValueError that names the first weight that differs."""
    tables = ranks.objects(digests(named), "the comparison of weights")
    name, values = first_difference(tables) or ("something", [])
    kinds = {value: [r for r, v in enumerate(values) if v == value] for value in values}
    shown = " and ".join(f"ranks {where}" for where in kinds.values())
    raise ValueError(
        f"the ranks' models have drifted apart: {name!r} is not the same on {shown}. Something "
        "that is a rank's own has changed it: a learning rate, a schedule by the loss of the "
        "rank's rows, a weight that was set on some ranks only. Make a SphereParallel of the "
        "module anew on all ranks to go on with rank 0's values"
    )


def warn_of_generators() -> None:
    """Warns that the ranks' random states differ."""
    warnings.warn(
        "torch's default generator is not at the same place on all ranks: something draws "
        "from it on each, such as a dataset that is loaded with num_workers=0. The shards' "
        "own numbers are those of rank 0; but if what is drawn goes into the training, the result "
        "depends on the number of ranks. "
        "Draw from a generator seeded by torch_spheres.sample_seed() in a dataset",
        UserWarning,
        stacklevel=users_level(),
    )
