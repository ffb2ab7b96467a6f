"""Warns where rows have other values together than alone; used by row_check.py.

`check_loss` does the same for the losses of `forward_backward`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from torch_spheres import _compat
from torch_spheres.runtime.rng import TrialRandom
from torch_spheres.runtime.stack_level import users_level
from torch_spheres.training.merge_rules import ROWS, SCALAR, MergeRule, same
from torch_spheres.training.pytree import unflatten
from torch_spheres.training.rounding import differs, rounding_of
from torch_spheres.training.trial_run import STRIDE, RowRanges, Run, run_trials

if TYPE_CHECKING:
    from torch_spheres.training.batch_split import Split
    from torch_spheres.training.sharded_call import ShardedCall

__all__ = ["RangeValues", "check_buffers", "check_loss", "check_values", "ignores_the_count"]

RangeValues = tuple[Any, Any, Any]
"""An output for all rows of a `RowRanges`, for its first range and for its second."""
_SCALAR_ROUNDING = 256  # times the precision


def check_values(
    call: ShardedCall,
    values: Sequence[RangeValues],
    rules: Sequence[MergeRule],
    rows: tuple[int, int, int],
    sums: bool,
) -> None:
    """Warns, once, of an output whose values for rows together are not those of rows alone."""
    findings = call.options.findings
    if findings.warned:
        return
    inside = (
        call.nesting.in_objects() if call.what == "forward" and call.nesting is not None else ()
    )
    eps = rounding_of(call)
    for i, (three, rule) in enumerate(zip(values, rules, strict=True)):
        text = None
        if isinstance(rule, int):
            text = _rows_differ(three, rule, eps)
        elif rule == SCALAR and all(map(_has_values, three)) and inside and not inside[i]:
            text = _scalars_differ(three, rows, eps, sums)
        elif rule == ROWS and not same([*three[0]], [*three[1], *three[2]]):
            text = _NOT_ROW_WISE
        if text is not None:
            findings.warned = True
            warnings.warn(f"output {i} of the module {text}", UserWarning, users_level())
            return


def check_buffers(call: ShardedCall, runs: Sequence[Run]) -> None:
    """Warns, once for each buffer, where merging the shards' values gives something else."""
    whole, *alone = (run.changes for run in runs)
    eps = rounding_of(call)
    for key, (value, given) in whole.items():
        both = [changes.get(key, (given, given))[0] for changes in alone]
        if value.is_floating_point() or value.is_complex():
            far = differs(value, (both[0] + both[1]) / 2, eps)
        else:
            far = not torch.equal(value, both[0])
        name = ".".join(key)
        if far and f"buffer {name}" not in call.replicas.reported:
            call.replicas.reported.add(f"buffer {name}")
            warnings.warn(
                f"the module's forward leaves in the buffer {name} something else for rows "
                "together than what SphereParallel makes of the shards' (the mean of "
                "floating-point buffers, the first shard's of others): a sum or a count over rows, "
                "a queue of rows, a greatest value. Keep it outside of the module, and write to it "
                "what the module returns",
                UserWarning,
                users_level(),
            )


def ignores_the_count(
    call: ShardedCall, run: Run, rules: Sequence[MergeRule], span: tuple[int, int]
) -> bool:
    """Whether scalars do not depend on ``num_items_in_batch=``, and so are means over rows."""
    twice = {"num_items_in_batch": lambda count: 2 * count}
    runs, _ = run_trials(call, training=False, spans=[span], change=twice)
    if not runs or runs[0].nesting != run.nesting:
        return False
    eps = rounding_of(call)
    scalars = [
        (before, after)
        for before, after, rule in zip(run.outputs, runs[0].outputs, rules, strict=True)
        if rule == SCALAR and _has_values(before) and not torch.equal(2 * after, before)
    ]
    return bool(scalars) and not any(differs(before, after, eps) for before, after in scalars)


_NOT_ROW_WISE = (
    "is not the same for rows that are alone in a shard and for rows together with others: the "
    "module looks across the rows of a batch, or its batch is not dimension 0, as in layers that "
    "have batch_first=False. Shards know their own rows alone, so the result is not that of the "
    "bare module. SphereParallel(..., batch_dim=1), or batch_dim={'name': 1}, says where the batch "
    "is, and whole=('name',) which arguments every shard needs all of, such as a mask; what looks "
    "across rows (a contrastive loss, for one) belongs outside of the module"
)


def _rows_differ(three: RangeValues, dim: int, eps: float) -> str | None:
    whole, *alone = (torch.from_numpy(v) if _is_numeric(v) else v for v in three)
    if not isinstance(whole, Tensor):
        same_rows = same(whole, np.concatenate(alone, dim))
        return None if same_rows else _NOT_ROW_WISE
    if not all(map(_has_values, three)):
        return None
    parts = whole.split([v.shape[dim] for v in alone], dim)
    far = any(differs(a, b, eps) for a, b in zip(parts, alone, strict=True))
    return _NOT_ROW_WISE if far else None


def _has_values(value: Any) -> bool:
    """Whether a value can be compared."""
    if not isinstance(value, Tensor):
        return True
    return value.layout is torch.strided and not value.is_meta and not value.is_quantized


def _is_numeric(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind in "biufc"


def _scalars_differ(
    three: RangeValues, rows: tuple[int, int, int], eps: float, sums: bool
) -> str | None:
    whole, *alone = (v.detach().to(torch.complex128 if v.is_complex() else torch.float64)
                     for v in three)  # fmt: skip
    mean = alone[0] * (rows[1] / rows[0]) + alone[1] * (rows[2] / rows[0])
    total = alone[0] + alone[1]
    ours, other = (total, mean) if sums else (mean, total)
    # One reduction rounds less than a network whose values may cancel.
    relative = min(math.sqrt(eps), _SCALAR_ROUNDING * eps)
    if not differs(whole, ours, eps, relative):
        return None
    if not differs(whole, other, eps, relative):
        now, then = ("sum", "mean") if sums else ("mean", "sum")
        return (
            f"has no dimensions and is a {then} over rows, but the shards' are put together as a "
            f"{now}: SphereParallel(..., scalars={then!r}) makes it right"
        )
    return (
        "has no dimensions, and is neither the mean nor the sum of the shards': it is a mean over "
        "something else than rows (tokens that are not padding, for one), or looks across rows. "
        f"The shards' {'sum' if sums else 'mean, weighted by their rows'}, is what comes out. "
        "Return a value for each row, or a sum and a count with scalars='sum'; or compute it "
        "outside of the module, with forward_backward() and a loss that returns (sum, count)"
    )


# ---- losses of forward_backward ----


def check_loss(call: ShardedCall, loss_fn: Callable[[Any, Any], Any], target_split: Split) -> None:
    """Warns, once, if the shards' losses in `forward_backward` do not make up the batch's loss.

    In some of the calls, `loss_fn` gets the outputs of two shards' rows together and alone.
    """
    findings = call.options.findings
    ranges = RowRanges.of(call, (call.number - 1) * STRIDE)
    warned = findings.warned or findings.warned_of_loss
    if warned or not call.closely or ranges is None or _compat.dispatch_modes():
        return
    runs, drew = run_trials(call, training=False, spans=ranges.spans)
    if not runs or drew:
        return
    losses, draws = [], TrialRandom()
    try:
        with torch.no_grad(), draws.leaving_no_trace():
            for run, span in zip(runs, ranges.spans, strict=True):
                _, rows = target_split.arguments.build(target_split.cut(*span))
                losses.append(loss_fn(unflatten(run.outputs, run.nesting), rows["targets"]))
    except Exception:  # noqa: BLE001
        return  # an error in the shards' losses is raised there
    text = None if draws.drew else _loss_differs(call, losses, ranges.sizes)
    if text is not None:
        findings.warned_of_loss = True
        warnings.warn(text, UserWarning, users_level())


def _loss_differs(call: ShardedCall, losses: list[Any], rows: tuple[int, int, int]) -> str | None:
    sums = isinstance(losses[0], tuple)
    values = [loss[0] if sums else loss for loss in losses]
    if not all(isinstance(v, Tensor) and v.numel() == 1 for v in values):
        return None
    three = values[0].reshape(()), values[1].reshape(()), values[2].reshape(())
    if _scalars_differ(three, rows, rounding_of(call), sums) is None:
        if not sums or float(losses[0][1]) == float(losses[1][1]) + float(losses[2][1]):
            return None
        return (
            "loss_fn returns (sum, count), but the counts of two shards do not add up to that of "
            f"their rows together: {[float(loss[1]) for loss in losses]}. Return the count of what "
            "was summed"
        )
    is_sum = not sums and _scalars_differ(three, rows, rounding_of(call), sums=True) is None
    found = "a sum over rows" if is_sum else (
        "no mean over rows: it is one over something else (tokens that are not padding, classes "
        "with weights), or looks across rows"
    )  # fmt: skip
    if sums:
        return (
            "loss_fn returns (sum, count), but the sums of two shards do not add up to that of "
            "their rows together: it looks across rows, of which each shard has its own alone. Use "
            "model(x), and compute such a loss from the outputs of the whole batch"
        )
    return (
        f"loss_fn returns {found}, and the shards' are put together as a mean weighted by their "
        "rows, which is another loss. Return (sum, count), whose quotient over the whole batch is "
        "the loss, such as (F.cross_entropy(out, y, reduction='sum'), (y != -100).sum()); or use "
        "model(x), and compute the loss from the outputs"
    )
