"""Compares a model's shards with the bare module, once for each form of call.

Whether a batch can be cut into shards is a property of the model that its shapes do not tell: it
may look across rows, as contrastive losses do, or its batch may be another dimension. So the rows
of the first two shards are run together and alone. Which dimension of an output has changed is the
one along which shards are put together, and values that have changed beyond rounding show a model
that is not row-wise.

That happens in evaluation mode on a copy of the module, without gradients and hooks, and leaves no
trace in buffers or random numbers. What cannot be compared so is put together by its shapes. Once,
values are compared in training mode too, unless there is batch norm.
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
from torch_spheres.training.merge_outputs import (
    ONCE,
    ROWS,
    SCALAR,
    STATISTIC,
    Refused,
    Way,
    is_array,
    same,
)
from torch_spheres.training.pytree import Nesting
from torch_spheres.training.row_check_values import (
    STRIDE,
    Three,
    check_buffers,
    check_values,
    ignores_the_count,
    two_ranges,
)
from torch_spheres.training.trial_run import Run, runs_without_trace

if TYPE_CHECKING:
    from torch_spheres.training.sharded_call import ShardedCall

__all__ = ["Comparison", "compared"]

_FORMS = 64  # calls of more forms than these are put together by their shapes


_FLAGGED = 6  # numbers and texts that have changed so often change nothing: a step is among them


_ALIKE = 4  # comparisons of rows that are all the same, as zeros are; then they are believed


@dataclass(frozen=True)
class Comparison:
    """What the outputs of one form of call are: for outputs of this nesting and dimensions."""

    flags: tuple[Any, ...]  # numbers and texts among the arguments
    nesting: Nesting | None
    dims: tuple[int | None, ...]
    ways: tuple[Way, ...]
    means: bool = False  # scalars are means over rows, although num_items_in_batch= was there

    def fits(self, nesting: Nesting | None, dims: tuple[int | None, ...]) -> bool:
        """Whether it is about such outputs; without outputs, it is about any."""
        return nesting is None or (dims == self.dims and nesting == self.nesting)


def compared(
    call: ShardedCall, outputs: Sequence[Any] = (), nesting: Nesting | None = None
) -> Comparison:
    """How the outputs are put together; warns once if the module is not row-wise.

    Args:
        call: whose rows are taken.
        outputs: of one shard, as flat leaves.
        nesting: theirs; None: nothing will be put together.
    """
    dims = _dims(outputs)
    flags = call.split.flags
    unknown = Comparison(flags, nesting, dims, (None,) * len(dims))
    ranges = two_ranges(call, 0)
    if ranges is None:
        return unknown
    learned = call.options.learned
    with learned.lock:
        form = _form(call)
        known = learned.comparisons.setdefault(form, [])
        fitting = [c for c in known if c.fits(nesting, dims)]
        for comparison in fitting:
            if comparison.flags == flags or len(fitting) >= _FLAGGED:
                _look_again(call, comparison)
                return comparison
        if len(learned.comparisons) > _FORMS:
            return unknown
        if _compat.dispatch_modes():
            return unknown  # they would see, and count, what is no part of the call
        found = _compare(call, ranges, unknown, outputs)
        if _rows_are_alike(call, ranges):  # it tells little: the next call is looked at too
            learned.alike[form] += 1
            if learned.alike[form] < _ALIKE:
                return found
        if not any(isinstance(way, Refused) for way in found.ways):  # (they are looked at anew)
            known.append(found)
        return found


def _rows_are_alike(call: ShardedCall, ranges: tuple[int, int, int]) -> bool:
    for value, dim in zip(call.split.flat, call.split.dims, strict=True):
        if isinstance(value, Tensor) and dim is not None and not value.is_meta:
            rows = value.detach().narrow(dim, ranges[0], ranges[2] - ranges[0])
            if not torch.equal(rows, rows.narrow(dim, 0, 1).expand_as(rows)):
                return False
    return True


def _form(call: ShardedCall) -> Hashable:
    """What may change what the module returns, but for sizes: those of sequences are many.

    (Of several values of a kind, as lists have, one counts.)
    """
    values = [
        (v.dim(), v.dtype) if isinstance(v, Tensor) else v if type(v) is bool else type(v)
        for v in call.split.flat
    ]
    learned, state = call.options.learned, call.replicas.flags
    if learned.states is not None:
        learned.states.add(state)
        if len(learned.states) > _FLAGGED:  # a name that changes with each call is among them
            learned.states = None
    state = () if learned.states is None else state
    return call.module.training, call.sums, call.keys, tuple(dict.fromkeys(values)), state


def _look_again(call: ShardedCall, known: Comparison) -> None:
    """At other rows, in some of the later calls, if there are scalars.

    A loss that is a mean over tokens looks like one over rows while all have as many.
    """
    learned = call.options.learned
    if learned.warned or not call.closely or call.number == 1 or SCALAR not in known.ways:
        return
    ranges = two_ranges(call, call.number * STRIDE)
    if ranges is None or _compat.dispatch_modes():
        return
    begin, middle, end = ranges
    runs, drew = runs_without_trace(
        call, training=False, spans=((begin, end), (begin, middle), (middle, end))
    )
    if runs and not drew and all(_alike(known, (), run, exact=False) for run in runs):
        rows = end - begin, middle - begin, end - middle
        values = [*zip(*(run.outputs for run in runs), strict=True)]
        check_values(call, values, known.ways, rows, call.sums and not known.means)


def _compare(
    call: ShardedCall, ranges: tuple[int, int, int], unknown: Comparison, outputs: Sequence[Any]
) -> Comparison:
    """The comparison; `unknown` if there is none that means anything."""
    begin, middle, end = ranges
    spans = (begin, end), (begin, middle), (middle, end)
    for training in (False, True) if call.module.training else (False,):
        runs, drew = runs_without_trace(call, training=training, spans=spans)
        if runs and _alike(unknown, outputs, runs[1], exact=len(call.split.bounds) > 1):
            break
    else:
        return unknown
    found = _judged(call, runs, ranges, unknown, has_values=not drew and not training)
    learned = call.options.learned
    if call.module.training and not training and not learned.has_trained:
        # Some look across rows in training alone; batch norm does, as everybody knows.
        learned.has_trained = True
        if not any(map(_is_batch_norm, call.module.modules())):
            again, drew = runs_without_trace(call, training=True, spans=spans)
            if again and not drew and _alike(unknown, runs[1].outputs, again[1], exact=True):
                _judged(call, again, ranges, unknown, has_values=True)
    return found


def _is_batch_norm(part: nn.Module) -> bool:
    return any("BatchNorm" in kind.__name__ for kind in type(part).__mro__)


def _judged(
    call: ShardedCall,
    runs: Sequence[Run],
    ranges: tuple[int, int, int],
    unknown: Comparison,
    *,
    has_values: bool,
) -> Comparison:
    """What the runs of all rows, of the first and of the second range show."""
    begin, middle, end = ranges
    whole, *alone = runs
    if alone[0].nesting != alone[1].nesting:
        return unknown
    if whole.nesting != alone[0].nesting:
        return dataclasses.replace(unknown, ways=(Refused(_STRUCTURE),) * len(unknown.dims))
    rows = end - begin, middle - begin, end - middle
    values = [*zip(whole.outputs, alone[0].outputs, alone[1].outputs, strict=True)]
    ways = tuple(_way(three, rows) for three in values)
    means = False
    if has_values:
        means = call.sums_by_argument and ignores_the_count(call, alone[0], ways, (begin, middle))
        check_values(call, values, ways, rows, call.sums and not means)
        check_buffers(call, runs)
    return dataclasses.replace(unknown, ways=ways, means=means)


def _alike(expected: Comparison, outputs: Sequence[Any], run: Run, *, exact: bool) -> bool:
    """Whether the first range's outputs are such as the first shard's: else they tell nothing."""
    if expected.nesting is None:
        return True
    if run.nesting != expected.nesting or _dims(run.outputs) != expected.dims:
        return False
    return not exact or _shapes(run.outputs) == _shapes(outputs)


def _dims(outputs: Sequence[Any]) -> tuple[int | None, ...]:
    return tuple(len(o.shape) if is_array(o) else None for o in outputs)


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


def _way(three: Three, rows: tuple[int, int, int]) -> Way:
    """How an output is put together."""
    whole, *alone = three
    if any(isinstance(v, PackedSequence) for v in three):
        return None  # gather_output says what is the matter
    if not all(map(is_array, three)):
        if any(map(is_array, three)):
            return None
        return _way_of_others(three, rows)
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
    # As many as there are (a selection of rows): refused, unless shapes fit by chance.
    return None if lengths[0] == lengths[1] + lengths[2] else Refused(_BY_PAIRS)


def _way_of_others(three: Three, rows: tuple[int, int, int]) -> Way:
    whole, *_ = three
    if isinstance(whole, Iterator) or tensor_inside(whole) is not None:
        return None  # gather_output says what is the matter
    if is_sequence(whole) and all(map(is_sequence, three)):
        if len({len(v) for v in three}) > 1:
            fits = all(len(v) == r for v, r in zip(three, rows, strict=True))
            return ROWS if fits else Refused(_NO_TENSOR)
        return ONCE if same(whole, three[1]) and same(whole, three[2]) else Refused(_NO_TENSOR)
    if isinstance(whole, float) and all(isinstance(v, float) for v in three):
        return None  # the shards' own have to be equal
    return None if same(whole, three[1]) and same(whole, three[2]) else Refused(_NO_TENSOR)
