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
import warnings
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from torch_spheres import _compat
from torch_spheres.advice import users_level
from torch_spheres.nesting import Nesting, flatten_output
from torch_spheres.objects import is_sequence, tensor_inside
from torch_spheres.outputs import ONCE, ROWS, SCALAR, STATISTIC, Refused, Way, is_array, same
from torch_spheres.random import TrialRandom, random_states, restore_random_states
from torch_spheres.replica import Buffer, Replica
from torch_spheres.rounding import differs, rounding_of

if TYPE_CHECKING:
    from torch_spheres.shards import Call

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


def compared(call: Call, outputs: Sequence[Any] = (), nesting: Nesting | None = None) -> Comparison:
    """How the outputs are put together; warns once if the module is not row-wise.

    Args:
        call: whose rows are taken.
        outputs: of one shard, as flat leaves.
        nesting: theirs; None: nothing will be put together.
    """
    dims = _dims(outputs)
    flags = call.split.flags
    unknown = Comparison(flags, nesting, dims, (None,) * len(dims))
    ranges = _two_ranges(call)
    if ranges is None:
        return unknown
    learned = call.cutting.learned
    with learned.lock:
        form = _form(call)
        known = learned.comparisons.setdefault(form, [])
        fitting = [c for c in known if c.fits(nesting, dims)]
        for comparison in fitting:
            if comparison.flags == flags or len(fitting) >= _FLAGGED:
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


def _rows_are_alike(call: Call, ranges: tuple[int, int, int]) -> bool:
    for value, dim in zip(call.split.flat, call.split.dims, strict=True):
        if isinstance(value, Tensor) and dim is not None and not value.is_meta:
            rows = value.detach().narrow(dim, ranges[0], ranges[2] - ranges[0])
            if not torch.equal(rows, rows.narrow(dim, 0, 1).expand_as(rows)):
                return False
    return True


def _form(call: Call) -> Hashable:
    """What may change what the module returns, but for sizes: those of sequences are many.

    (Of several values of a kind, as lists have, one counts.)
    """
    values = [
        (v.dim(), v.dtype) if isinstance(v, Tensor) else v if type(v) is bool else type(v)
        for v in call.split.flat
    ]
    learned, state = call.cutting.learned, call.pool.flags
    if learned.states is not None:
        learned.states.add(state)
        if len(learned.states) > _FLAGGED:  # a name that changes with each call is among them
            learned.states = None
    state = () if learned.states is None else state
    return call.module.training, call.sums, call.keys, tuple(dict.fromkeys(values)), state


def _two_ranges(call: Call) -> tuple[int, int, int] | None:
    """Two neighbouring ranges of rows: two shards, or the halves of a process's only one."""
    bounds = call.split.bounds
    if len(bounds) > 1:
        return bounds[0][0], bounds[0][1], bounds[1][1]
    if call.ranks is None or not bounds or bounds[0][1] - bounds[0][0] < 2:
        return None
    begin, end = bounds[0]
    return begin, (begin + end) // 2, end


@dataclass
class Run:
    """A forward that was tried: what it returned, and by how much it changed buffers."""

    outputs: list[Any]
    nesting: Nesting
    changes: dict[tuple[str, str], Tensor]  # of floating-point buffers, by type and name


def _compare(
    call: Call, ranges: tuple[int, int, int], unknown: Comparison, outputs: Sequence[Any]
) -> Comparison:
    """The comparison; `unknown` if there is none that means anything."""
    begin, middle, end = ranges
    spans = (begin, end), (begin, middle), (middle, end)
    for training in (False, True) if call.module.training else (False,):
        runs, drew = _runs_without_trace(call, training=training, spans=spans)
        if runs and _alike(unknown, outputs, runs[1], exact=len(call.split.bounds) > 1):
            break
    else:
        return unknown
    found = _judged(call, runs, ranges, unknown, has_values=not drew and not training)
    learned = call.cutting.learned
    if call.module.training and not training and not learned.has_trained:
        # Some look across rows in training alone; batch norm does, as everybody knows.
        learned.has_trained = True
        if not any(map(_is_batch_norm, call.module.modules())):
            again, drew = _runs_without_trace(call, training=True, spans=spans)
            if again and not drew and _alike(unknown, runs[1].outputs, again[1], exact=True):
                _judged(call, again, ranges, unknown, has_values=True)
    return found


def _is_batch_norm(part: nn.Module) -> bool:
    return any("BatchNorm" in kind.__name__ for kind in type(part).__mro__)


def _runs_without_trace(
    call: Call, *, training: bool, spans: Sequence[tuple[int, int]]
) -> tuple[list[Run], bool]:
    """The forward of each range of rows; and whether it drew random numbers."""
    draws, before = TrialRandom(), random_states()
    try:
        # (A forward may use autograd itself, as forces are computed from an energy.)
        with_grad = (False, True) if torch.is_grad_enabled() else (False,)
        runs = next(
            (r for grad in with_grad if (r := _runs(call, draws, training, grad, spans))), []
        )
    finally:
        drew = draws.any or not _equal_states(before, random_states())
        restore_random_states(before)
    return runs, drew


def _judged(
    call: Call,
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
        means = call.sums_by_argument and _are_means(call, values, ways, rows)
        _check_values(call, values, ways, rows, call.sums and not means)
        _check_buffers(call, runs)
    return dataclasses.replace(unknown, ways=ways, means=means)


def _runs(
    call: Call, draws: TrialRandom, training: bool, grad: bool, ranges: Sequence[tuple[int, int]]
) -> list[Run]:
    """The forward of each range of rows, without a trace; nothing if it cannot run so."""
    found: list[Run] = []
    try:
        for first, last in ranges:
            # A new one: what the last one's forward set is gone.
            replica = Replica(call.module, (), call.pool.known_as())
            for part, source in zip(replica.module.modules(), call.module.modules(), strict=True):
                part.training = training and source.training
                for name in _compat.FORWARD_HOOKS:
                    setattr(part, name, OrderedDict())
            # (To compile it for other rows can take minutes.)
            module = _compat.uncompiled(replica.module)
            values = call.split.cut(first, last)
            own = [v.detach().clone() if isinstance(v, Tensor) else v for v in values]
            args, kwargs = call.arguments(own)
            buffers = replica.begin_shard()
            with torch.set_grad_enabled(grad), draws.active():
                outputs, nesting = flatten_output(module(*args, **kwargs))
            if grad:
                outputs = [v.detach() if isinstance(v, Tensor) else v for v in outputs]
            found.append(Run(outputs, nesting, _changes(buffers)))
    except Exception:  # noqa: BLE001
        return []  # whatever is wrong shows in the shards, or is wrong in this mode alone
    return found


def _changes(buffers: Sequence[Buffer]) -> dict[tuple[str, str], Tensor]:
    found = {}
    for buffer in buffers:
        value = buffer.changed_value()
        if value is not None and value.shape == buffer.given.shape and value.is_floating_point():
            found[type(buffer.source).__name__, buffer.name] = value - buffer.given
    return found


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


def _equal_states(before: Any, after: Any) -> bool:
    return torch.equal(before["torch"], after["torch"]) and all(
        before[name] == after[name] for name in ("python", "numpy")
    )


# ---- shapes ----

Three = tuple[Any, Any, Any]  # of an output: of both ranges together, of the first, of the second
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
        return ONCE if same(*alone) else Refused(STATISTIC)
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
        return ONCE
    if isinstance(whole, float) and all(isinstance(v, float) for v in three):
        return None  # the shards' own have to be equal
    return None if same(whole, three[1]) and same(whole, three[2]) else Refused(_NO_TENSOR)


# ---- values ----


def _are_means(
    call: Call, values: Sequence[Three], ways: Sequence[Way], rows: tuple[int, int, int]
) -> bool:
    """Whether scalars are means over rows, and no sums."""
    pairs = zip(values, ways, strict=True)
    scalars = [three for three, way in pairs if way == SCALAR and all(map(_has_values, three))]
    eps = rounding_of(call)
    return any(
        _scalars_differ(three, rows, eps, sums=False) is None
        and _scalars_differ(three, rows, eps, sums=True) is not None
        for three in scalars
    )


def _check_values(
    call: Call,
    values: Sequence[Three],
    ways: Sequence[Way],
    rows: tuple[int, int, int],
    sums: bool,
) -> None:
    """Warns, once, if the rows together are not what they are alone."""
    learned = call.cutting.learned
    if learned.warned:
        return
    inside = call.in_objects() if call.what == "forward" else ()
    eps = rounding_of(call)
    for i, (three, way) in enumerate(zip(values, ways, strict=True)):
        text = None
        if isinstance(way, int):
            text = _rows_differ(three, way, eps)
        elif way == SCALAR and all(map(_has_values, three)) and inside and not inside[i]:
            text = _scalars_differ(three, rows, eps, sums)
        elif way == ROWS and not same([*three[0]], [*three[1], *three[2]]):
            text = _NOT_ROW_WISE
        if text is not None:
            learned.warned = True
            warnings.warn(f"output {i} of the module {text}", UserWarning, users_level())
            return


def _check_buffers(call: Call, runs: Sequence[Run]) -> None:
    """Warns, once for each, of buffers in which sums over rows are made: they become a share."""
    whole, *alone = (run.changes for run in runs)
    eps = rounding_of(call)
    for key, change in whole.items():
        first, second = (changes.get(key) for changes in alone)
        if first is None or second is None or differs(change, first + second, eps):
            continue
        if differs(change, (first + second) / 2, eps) and f"sum {key}" not in call.pool.reported:
            call.pool.reported.add(f"sum {key}")
            warnings.warn(
                f"the module's forward adds something of each row to the buffer {'.'.join(key)}: "
                "of floating-point buffers SphereParallel makes the mean over the shards, so that "
                "a shard's share of the sum comes out. Add outside of the module what it returns",
                UserWarning,
                users_level(),
            )


_NOT_ROW_WISE = (
    "is not the same for rows that are alone in a shard and for rows together with others: the "
    "module looks across the rows of a batch, or its batch is not dimension 0, as in layers that "
    "have batch_first=False. Shards know their own rows alone, so the result is not that of the "
    "bare module. SphereParallel(..., batch_dim=1), or batch_dim={'name': 1}, says where the batch "
    "is, and whole=('name',) which arguments every shard needs all of, such as a mask; what looks "
    "across rows (a contrastive loss, for one) belongs outside of the module"
)


def _rows_differ(three: Three, dim: int, eps: float) -> str | None:
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
    """Whether it can be compared by value."""
    if not isinstance(value, Tensor):
        return True
    return value.layout is torch.strided and not value.is_meta and not value.is_quantized


def _is_numeric(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind in "biufc"


def _scalars_differ(three: Three, rows: tuple[int, int, int], eps: float, sums: bool) -> str | None:
    whole, *alone = (v.detach().to(torch.complex128 if v.is_complex() else torch.float64)
                     for v in three)  # fmt: skip
    mean = alone[0] * (rows[1] / rows[0]) + alone[1] * (rows[2] / rows[0])
    total = alone[0] + alone[1]
    ours, other = (total, mean) if sums else (mean, total)
    if not differs(whole, ours, eps):
        return None
    if not differs(whole, other, eps):
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
