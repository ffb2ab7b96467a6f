"""Compares shards with the bare module, once for each form of call; used by each forward.

Shapes alone do not tell whether a model is row-wise, that is, whether its batch can be cut into
shards: it may look across rows (contrastive losses do), or its batch may be another dimension. So
the rows of the first two shards are run together and alone (trial_run.py). The dimension of an
output that changes with the rows is the one along which shards are concatenated; values that change
by more than rounding show that the model is not row-wise (row_check_values.py).

The comparison runs in evaluation mode; once it runs in training mode too, unless there is batch
norm. Outputs that cannot be compared are merged by their shapes (merge_rules.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from torch_spheres import _compat
from torch_spheres.runtime.object_graph import is_sequence, tensor_inside
from torch_spheres.training.merge_rules import (
    ONCE,
    ROWS,
    SCALAR,
    STATISTIC,
    MergeRule,
    Refused,
    is_array,
    same,
)
from torch_spheres.training.pytree import Nesting
from torch_spheres.training.row_check_values import (
    RangeValues,
    check_buffers,
    check_values,
    ignores_the_count,
)
from torch_spheres.training.trial_run import STRIDE, RowRanges, Run, run_trials

if TYPE_CHECKING:
    from torch_spheres.training.sharded_call import ShardedCall

__all__ = ["Comparison", "compare_with_bare_module"]

_MAX_FORMS = 64  # outputs of further forms of call are merged by their shapes
_MAX_FLAGS = 6  # a flag with more values than this (a step number) does not change the outputs
_MAX_EQUAL_ROWS = 4  # comparisons of equal rows, such as zeros, until one is trusted


@dataclass(frozen=True)
class Comparison:
    """The merge rules for outputs of this structure and these numbers of dimensions."""

    flags: tuple[Any, ...]  # numbers and strings among the arguments
    nesting: Nesting | None
    dims: tuple[int | None, ...]
    rules: tuple[MergeRule, ...]
    means: bool = False  # scalars are means over rows, although num_items_in_batch= was given

    def fits(self, nesting: Nesting | None, dims: tuple[int | None, ...]) -> bool:
        """Whether it is about such outputs; a `nesting` of None fits all."""
        return nesting is None or (dims == self.dims and nesting == self.nesting)


def compare_with_bare_module(
    call: ShardedCall, outputs: Sequence[Any] = (), nesting: Nesting | None = None
) -> Comparison:
    """Finds how the outputs are merged; warns once if the module is not row-wise.

    Args:
        call: whose rows are taken.
        outputs: of one shard, as flat leaves.
        nesting: structure of `outputs`; None if they will not be merged.
    """
    dims = _dims(outputs)
    flags = call.split.flags
    unknown = Comparison(flags, nesting, dims, (None,) * len(dims))
    ranges = RowRanges.of(call, 0)
    if ranges is None:
        return unknown
    findings = call.options.findings
    with findings.lock:
        form = _form(call)
        known = findings.comparisons.setdefault(form, [])
        fitting = [c for c in known if c.fits(nesting, dims)]
        for comparison in fitting:
            if comparison.flags == flags or len(fitting) >= _MAX_FLAGS:
                _compare_scalars_again(call, comparison)
                return comparison
        # Dispatch modes (profilers, counters) would see operations that are not the call's.
        if len(findings.comparisons) > _MAX_FORMS or _compat.dispatch_modes():
            return unknown
        found = _compare(call, ranges, unknown, outputs)
        if _rows_are_equal(call, ranges):  # which shows little, so that the next call is compared
            findings.equal_rows[form] += 1
            if findings.equal_rows[form] < _MAX_EQUAL_ROWS:
                return found
        if not any(isinstance(rule, Refused) for rule in found.rules):
            known.append(found)
        return found


def _rows_are_equal(call: ShardedCall, ranges: RowRanges) -> bool:
    for value, dim in zip(call.split.flat, call.split.dims, strict=True):
        if isinstance(value, Tensor) and dim is not None and not value.is_meta:
            rows = value.detach().narrow(dim, ranges.begin, ranges.end - ranges.begin)
            if not torch.equal(rows, rows.narrow(dim, 0, 1).expand_as(rows)):
                return False
    return True


def _form(call: ShardedCall) -> Hashable:
    """Whatever may change the outputs' structure, but for sizes: sequences have many lengths.

    Of several values of a kind, as lists have, one counts.
    """
    values = [
        (v.dim(), v.dtype) if isinstance(v, Tensor) else v if type(v) is bool else type(v)
        for v in call.split.flat
    ]
    findings, state = call.options.findings, call.replicas.scan.flags
    if findings.states is not None:
        findings.states.add(state)
        if len(findings.states) > _MAX_FLAGS:  # one of the flags changes with each call
            findings.states = None
    state = () if findings.states is None else state
    return (
        call.module.training,
        call.scalars_are_sums,
        (*call.split.arguments.keys,),
        tuple(dict.fromkeys(values)),
        state,
    )


def _compare_scalars_again(call: ShardedCall, known: Comparison) -> None:
    """Compares scalars at other rows, in some of the later calls.

    A loss that is a mean over tokens looks like a mean over rows while all rows have as many.
    """
    findings = call.options.findings
    if findings.warned or not call.closely or call.number == 1 or SCALAR not in known.rules:
        return
    ranges = RowRanges.of(call, call.number * STRIDE)
    if ranges is None or _compat.dispatch_modes():
        return
    runs, drew = run_trials(call, training=False, spans=ranges.spans)
    if runs and not drew and all(_matches(known, (), run, exact=False) for run in runs):
        values = [*zip(*(run.outputs for run in runs), strict=True)]
        check_values(
            call, values, known.rules, ranges.sizes, call.scalars_are_sums and not known.means
        )


def _compare(
    call: ShardedCall, ranges: RowRanges, unknown: Comparison, outputs: Sequence[Any]
) -> Comparison:
    """Runs the ranges and compares them; `unknown` if no run means anything."""
    for training in (False, True) if call.module.training else (False,):
        runs, drew = run_trials(call, training=training, spans=ranges.spans)
        if runs and _matches(unknown, outputs, runs[1], exact=len(call.split.bounds) > 1):
            break
    else:
        return unknown
    found = _compare_runs(call, runs, ranges, unknown, has_values=not drew and not training)
    findings = call.options.findings
    if call.module.training and not training and not findings.has_trained:
        # Some models look across rows in training mode only. Batch norm does, as is well known.
        findings.has_trained = True
        if not any(map(_is_batch_norm, call.module.modules())):
            again, drew = run_trials(call, training=True, spans=ranges.spans)
            if again and not drew and _matches(unknown, runs[1].outputs, again[1], exact=True):
                _compare_runs(call, again, ranges, unknown, has_values=True)
    return found


def _is_batch_norm(part: nn.Module) -> bool:
    return any("BatchNorm" in kind.__name__ for kind in type(part).__mro__)


def _compare_runs(
    call: ShardedCall,
    runs: Sequence[Run],
    ranges: RowRanges,
    unknown: Comparison,
    *,
    has_values: bool,
) -> Comparison:
    """Compares the run of all rows with those of the first and of the second range."""
    whole, *alone = runs
    if alone[0].nesting != alone[1].nesting:
        return unknown
    if whole.nesting != alone[0].nesting:
        return dataclasses.replace(unknown, rules=(Refused(_STRUCTURE),) * len(unknown.dims))
    values = [*zip(whole.outputs, alone[0].outputs, alone[1].outputs, strict=True)]
    rules = tuple(_merge_rule(three, ranges.sizes) for three in values)
    means = False
    if has_values:
        means = call.sums_by_argument and ignores_the_count(call, alone[0], rules, ranges.spans[1])
        check_values(call, values, rules, ranges.sizes, call.scalars_are_sums and not means)
        check_buffers(call, runs)
    return dataclasses.replace(unknown, rules=rules, means=means)


def _matches(expected: Comparison, outputs: Sequence[Any], run: Run, *, exact: bool) -> bool:
    """Whether the first range's outputs have the first shard's structure; `exact`: and shapes."""
    if expected.nesting is None:
        return True
    if run.nesting != expected.nesting or _dims(run.outputs) != expected.dims:
        return False
    return not exact or _shapes(run.outputs) == _shapes(outputs)


def _dims(outputs: Sequence[Any]) -> tuple[int | None, ...]:
    return tuple(None if shape is None else len(shape) for shape in _shapes(outputs))


def _shapes(outputs: Sequence[Any]) -> list[Any]:
    return [tuple(o.shape) if is_array(o) else None for o in outputs]


# ---- shapes ----

_STRUCTURE = (
    "has another structure for more rows, as a list with tensors for each row does; stack "
    "or pad them into one tensor"
)

_SQUEEZED = (
    "has another number of dimensions for one row than for several, as squeeze() gives it; "
    "squeeze a dimension by its number, squeeze(-1)"
)

_BY_PAIRS = (
    "depends on pairs of rows, or on all of them: more than its batch dimension changes with the "
    "rows, as in a matrix of similarities, or where rows are padded to the longest of them. Shards "
    "know their own rows alone: return what it is computed from, and compute it outside of the "
    "module; pad to a fixed length (pad_packed_sequence has total_length=)"
)

_NO_TENSOR = (
    "is no tensor and depends on the rows; return a tensor: one value for each row is put "
    "together, one without dimensions is averaged or summed"
)


def _merge_rule(three: RangeValues, rows: tuple[int, int, int]) -> MergeRule:
    """How an output is merged, by its shapes for all rows and for each range."""
    whole, *alone = three
    if any(isinstance(v, PackedSequence) for v in three):
        return None  # merge_output raises the error
    if not all(map(is_array, three)):
        if any(map(is_array, three)):
            return None
        return _rule_of_other_values(three, rows)
    if any(len(v.shape) != len(whole.shape) for v in alone):
        return Refused(_SQUEEZED)
    if not len(whole.shape):
        return SCALAR
    changed = [d for d, n in enumerate(whole.shape) if any(v.shape[d] != n for v in alone)]
    if not changed:
        return ONCE if same(*alone) and same(whole, alone[0]) else Refused(STATISTIC)
    if len(changed) > 1:
        return Refused(_BY_PAIRS)
    (dim,) = changed
    lengths = [v.shape[dim] for v in three]
    if all(n * rows[0] == lengths[0] * r for n, r in zip(lengths, rows, strict=True)):
        return dim
    # A selection of rows has any number of them: merge_output refuses it by its shapes.
    return None if lengths[0] == lengths[1] + lengths[2] else Refused(_BY_PAIRS)


def _rule_of_other_values(three: RangeValues, rows: tuple[int, int, int]) -> MergeRule:
    whole, *_ = three
    if isinstance(whole, Iterator) or tensor_inside(whole) is not None:
        return None  # merge_output raises the error
    if is_sequence(whole) and all(map(is_sequence, three)):
        if len({len(v) for v in three}) > 1:
            fits = all(len(v) == r for v, r in zip(three, rows, strict=True))
            return ROWS if fits else Refused(_NO_TENSOR)
        return ONCE if same(whole, three[1]) and same(whole, three[2]) else Refused(_NO_TENSOR)
    if isinstance(whole, float) and all(isinstance(v, float) for v in three):
        return None  # merge_output compares the shards' own
    return None if same(whole, three[1]) and same(whole, three[2]) else Refused(_NO_TENSOR)
