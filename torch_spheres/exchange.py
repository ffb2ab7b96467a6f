"""Partial sums of several processes, brought together without a bit being lost.

A ring all-reduce adds in an order that depends on the number of processes. Here each rank's partial
sums (usually one or two, see division.py) travel as they are: a *bucket* of tensors is cut into as
many slices as there are ranks, rank *r* gets everybody's slice *r* (all-to-all), adds them in the
fixed tree, and the totals go to all (all-gather). With *N* bytes of gradients a rank sends
``(p + 1) (W - 1) / W * N`` for *p* parts; a ring sends ``2 (W - 1) / W * N``.

What is small (a few scalars, the statistics of batch norm) goes to all at once, and all add it.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torch_spheres.division import Division
from torch_spheres.errors import RankError
from torch_spheres.meeting import Meeting
from torch_spheres.ranks import Ranks
from torch_spheres.system import KissingSpheres
from torch_spheres.tree import tree_sums

__all__ = ["BUCKET", "Exchange", "Layout", "part_sums", "total_over_ranks"]

Grads = list[Tensor | None]
_Flags = dict[int, list[tuple[int, int]]]  # by tensor: the (rank, part)s that have it

BUCKET = 16 << 20  # bytes of a bucket: large enough that its messages are worth their while
_SMALL = 1 << 20  # bytes that a rank sends in all: less goes in one message to everybody
_ALIGN = 32  # elements: 64 bytes of a half type
_HALF = (torch.bfloat16, torch.float16)
_SUMMED = (torch.float32, torch.float64)
_FAILED = 2


@dataclass
class _Bucket:
    """Tensors of one type, one after another."""

    dtype: torch.dtype  # of sums on the way; half types are summed in float32
    result: torch.dtype
    places: list[tuple[int, int, int]] = field(default_factory=list)  # tensor, begin, elements
    length: int = 0

    def slice_length(self, world: int) -> int:
        """Elements that each rank adds."""
        each = -(-self.length // world)
        return -(-each // _ALIGN) * _ALIGN


class Layout:
    """Which tensor is where in which bucket: the same on all ranks, whatever their number.

    Args:
        like: tensors of the shapes and types that will be summed: float32, float64, complex and
            half types.
    """

    def __init__(self, like: Sequence[Tensor]) -> None:
        self.shapes = [t.shape for t in like]
        self.complex = [t.is_complex() for t in like]
        self.buckets: list[_Bucket] = []
        open_: dict[torch.dtype, _Bucket] = {}
        self.where: list[tuple[_Bucket, int]] = []
        # From the last to the first, which is the order in which they come from a backward pass.
        where: dict[int, tuple[_Bucket, int]] = {}
        for i in reversed(range(len(like))):
            t = torch.view_as_real(like[i]) if like[i].is_complex() else like[i]
            bucket = open_.get(t.dtype)
            if bucket is None or bucket.length * bucket.dtype.itemsize >= BUCKET:
                sums = torch.float32 if t.dtype in _HALF else t.dtype
                if sums not in _SUMMED:
                    raise TypeError(f"gradients of {t.dtype} cannot be summed over processes")
                bucket = open_[t.dtype] = _Bucket(sums, t.dtype)
                self.buckets.append(bucket)
            where[i] = (bucket, bucket.length)
            bucket.places.append((i, bucket.length, t.numel()))
            bucket.length += -(-t.numel() // _ALIGN) * _ALIGN
        self.where = [where[i] for i in range(len(like))]
        self._buffers: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self.bytes = sum(b.length * b.dtype.itemsize for b in self.buckets)

    def buffers(self, part: int, ranks: Ranks) -> list[tuple[Tensor, Tensor]]:
        """For what is sent and received of a part, by bucket: made once, and used in every step."""
        known = self._buffers.get(part)
        if known is None:
            known = [
                (
                    torch.empty(length, dtype=bucket.dtype, device=ranks.device),
                    torch.empty(length, dtype=bucket.dtype, device=ranks.device),
                )
                for bucket in self.buckets
                for length in [bucket.slice_length(ranks.world) * ranks.world]
            ]
            self._buffers[part] = known
        return known

    def shaped(self, i: int, flat: Tensor) -> Tensor:
        """What a bucket holds of tensor `i`, as that tensor."""
        if not self.complex[i]:
            return flat.view(self.shapes[i])
        return torch.view_as_complex(flat.view(*self.shapes[i], 2))


class Exchange:
    """One sum over all ranks: each gives its parts, bucket by bucket, and all get the total.

    Args:
        ranks: who takes part.
        division: which parts each of them has.
        layout: of what is summed.
        what: for errors: the name of the meeting.
        spheres: who shares the additions when there are many.
    """

    def __init__(
        self,
        ranks: Ranks,
        division: Division,
        layout: Layout,
        what: str,
        spheres: KissingSpheres | None = None,
    ) -> None:
        self._ranks, self._layout, self._what = ranks, layout, what
        self._division, self._spheres = division, spheres
        parts = max(map(len, division.parts))
        self._is_small = layout.bytes * parts * (ranks.world - 1) <= _SMALL
        self._lock = threading.Lock()
        # What is sent at once, in this order: (part, bucket).
        self._units = [(p, b) for p in range(parts) for b in range(len(layout.buckets))]
        self._given: dict[tuple[int, int], list[bool]] = {}  # which tensors are there
        self._sent: list[tuple[Meeting, list[Any]]] = []  # by unit: flags, and then values
        self._buffers = [layout.buffers(p, ranks) for p in range(parts)]
        self._error: BaseException | None = None
        self.is_broken = False  # a message could not be sent: there will be no more of them
        for p in range(len(division.parts[ranks.rank]), parts):
            self.give(p, [None] * len(layout.where))

    # ---- giving ----

    def give(self, part: int, sums: Grads) -> None:
        """A part's sums, None where no shard in it had any."""
        for b, bucket in enumerate(self._layout.buckets):
            self.add(part, b, [[sums[i]] for i, _, _ in bucket.places])

    def add(self, part: int, bucket: int, columns: Sequence[Sequence[Tensor | None]]) -> None:
        """A part's values of a bucket's tensors, summed on the way into the message.

        Any thread, in any order; each once.

        Args:
            part: which.
            bucket: which.
            columns: of each tensor, in the order of the bucket's places: one value, or twelve,
                which are added in the tree. In float32 for half types.
        """
        places = self._layout.buckets[bucket].places
        sent, _ = self._buffers[part][bucket]
        outs = []
        for i, begin, size in places:
            outs.append(self._layout.shaped(i, sent[begin : begin + size]))
        with torch.no_grad():
            if any(v is not None and v.device != sent.device for c in columns for v in c):
                sums = tree_sums(columns)
                for out, total in zip(outs, sums, strict=True):
                    if total is not None:
                        out.copy_(total)
            else:
                tree_sums(columns, outs=outs)
        there = [any(v is not None for v in column) for column in columns]
        with self._lock:
            self._given[part, bucket] = there
            # All but the last, which may still have to say that something has failed.
            self._send_until(len(self._units) - 1)

    def fail(self, error: BaseException) -> None:
        """Says that this rank has no sums to give: all will know, and nobody waits."""
        with self._lock:
            self._error = error
            for p, b in self._units[len(self._sent) :]:
                self._given[p, b] = [False] * len(self._layout.buckets[b].places)

    def _send_until(self, end: int) -> None:
        # In the same order on all ranks, or messages would meet the wrong ones.
        while not self._is_small and len(self._sent) < end:
            unit = self._units[len(self._sent)]
            if unit not in self._given:
                return
            try:
                with self._ranks.explaining(self._what):
                    self._send(unit)
            except RankError:
                self.is_broken = True
                raise

    def _send(self, unit: tuple[int, int]) -> None:
        ranks, (part, bucket) = self._ranks, unit
        flags = Meeting(ranks, self._what, self._flags_of(unit))
        sent, received = self._buffers[part][bucket]
        self._sent.append((flags, ranks.scatter_async(received, sent)))

    def _flags_of(self, unit: tuple[int, int]) -> Tensor:
        state = _FAILED if self._error is not None else 0
        return torch.tensor([state, *self._given[unit]], dtype=torch.uint8)

    # ---- getting ----

    def finish(self) -> Grads:
        """The total over all ranks' parts; None where all are absent. All parts have been given.

        Raises:
            RankError: another rank has failed, or does not answer.
            BaseException: what `fail` was told.
        """
        with torch.no_grad():
            if self._is_small:
                return self._finish_small()
            with self._lock:
                self._send_until(len(self._units))
            assert len(self._sent) == len(self._units)
            return self._finish_buckets()

    def _finish_small(self) -> Grads:
        """All parts in one message to everybody."""
        packed = []
        for part, bucket in self._units:
            there = self._given[part, bucket]
            packed.append(self._flags_of((part, bucket)))
            sent, _ = self._buffers[part][bucket]
            for (_, begin, size), is_there in zip(
                self._layout.buckets[bucket].places, there, strict=True
            ):
                if not is_there:
                    sent[begin : begin + size].zero_()
            packed.append(sent[: self._layout.buckets[bucket].length].cpu().view(torch.uint8))
        table = self._ranks.gather(torch.cat(packed), self._what)
        present, failed = self._no_flags(), False
        flats: list[dict[tuple[int, int], Tensor]] = [{} for _ in self._layout.buckets]
        for r, message in enumerate(table):
            at = 0
            for p, b in self._units:
                bucket_ = self._layout.buckets[b]
                end = at + 1 + len(bucket_.places)
                failed |= self._read_flags(message[at:end].tolist(), r, p, b, present)
                at, end = end, end + bucket_.length * bucket_.dtype.itemsize
                flats[b][r, p] = message[at:end].clone().view(bucket_.dtype)  # aligned
                at = end
        self._check(failed)
        totals: Grads = [None] * len(self._layout.where)
        for bucket_, values in zip(self._layout.buckets, flats, strict=True):
            out = torch.empty(bucket_.length, dtype=bucket_.dtype)
            self._add(bucket_, values, present, out, 0)
            self._place(bucket_, out.to(bucket_.result), present, totals)
        return totals

    def _finish_buckets(self) -> Grads:
        ranks, what = self._ranks, self._what
        present, failed = self._no_flags(), False
        for (p, b), (flags, _) in zip(self._units, self._sent, strict=True):
            for r, row in enumerate(flags.finish()):
                failed |= self._read_flags(row.tolist(), r, p, b, present)
        if failed:
            # Memory that messages are still on their way to is used again by the next exchange.
            for _, works in self._sent:
                ranks.wait(works, what)
        self._check(failed)
        works_of = {unit: works for unit, (_, works) in zip(self._units, self._sent, strict=True)}
        gathered = []
        for b, bucket in enumerate(self._layout.buckets):
            length = bucket.slice_length(ranks.world)
            flats = {}
            for p in range(len(self._buffers)):
                ranks.wait(works_of[p, b], what)
                sent, received = self._buffers[p][b]
                for r in range(ranks.world):
                    source = sent if r == ranks.rank else received
                    flats[r, p] = source[r * length : (r + 1) * length]
            out = torch.empty(length * ranks.world, dtype=bucket.result, device=ranks.device)
            mine = out.view(ranks.world, length)[ranks.rank]  # at once where it has to be
            if bucket.result == bucket.dtype:
                self._add(bucket, flats, present, mine, ranks.rank * length)
            else:
                sums = torch.empty(length, dtype=bucket.dtype, device=ranks.device)
                self._add(bucket, flats, present, sums, ranks.rank * length)
                mine.copy_(sums)
            with ranks.explaining(what):
                gathered.append((ranks.gather_async(out, mine), out, mine))
        totals: Grads = [None] * len(self._layout.where)
        for bucket, (works, out, _) in zip(self._layout.buckets, gathered, strict=True):
            ranks.wait(works, what)
            self._place(bucket, out, present, totals)
        return totals

    def _no_flags(self) -> _Flags:
        return {i: [] for i in range(len(self._layout.where))}

    def _read_flags(self, row: list[int], rank: int, part: int, bucket: int, into: _Flags) -> bool:
        """Notes who has what; whether the rank has failed."""
        state, *there = row
        for (i, _, _), is_there in zip(self._layout.buckets[bucket].places, there, strict=True):
            if is_there:
                into[i].append((rank, part))
        return state == _FAILED

    def _check(self, failed: bool) -> None:
        if failed:
            error, self._error = self._error, None
            try:
                self._ranks.raise_errors(self._what, error)
            finally:
                del error  # its traceback owns this frame, and others that own this object

    def _add(
        self,
        bucket: _Bucket,
        flats: dict[tuple[int, int], Tensor],
        present: _Flags,
        out: Tensor,
        first: int,
    ) -> None:
        """The fixed tree over all ranks' parts, of elements `first` and on of a bucket."""
        division = self._division
        columns: list[list[Tensor | None]] = []
        outs: list[Tensor | None] = []
        for having, run in itertools.groupby(bucket.places, lambda place: present[place[0]]):
            places = list(run)
            begin, end = places[0][1], places[-1][1] + places[-1][2]
            low, high = max(begin - first, 0), min(end - first, len(out))
            if low >= high:
                continue
            column: list[Tensor | None] = [None] * division.places
            for r, p in having:
                column[division.place(division.parts[r][p])] = flats[r, p][low:high]
            columns.append(column)
            outs.append(out[low:high])
        tree_sums(columns, outs=outs, spheres=self._spheres)

    def _place(self, bucket: _Bucket, out: Tensor, present: _Flags, totals: Grads) -> None:
        for i, begin, size in bucket.places:
            if present[i]:
                totals[i] = self._layout.shaped(i, out[begin : begin + size])


def part_sums(
    column: Sequence[Tensor | None], like: Tensor, division: Division, rank: int
) -> Grads:
    """The sums of a rank's parts, of one value for each leaf; of half types in float32."""
    half = like.dtype in _HALF
    sums = []
    for part in division.parts[rank]:
        chosen: list[Tensor | None] = [None] * len(column)
        for leaf in division.in_part(part):
            value = column[leaf]
            chosen[leaf] = value.float() if half and value is not None else value
        sums.append(tree_sums([chosen])[0])
    return sums


def total_over_ranks(
    columns: Sequence[Sequence[Tensor | None]],
    like: Sequence[Tensor],
    ranks: Ranks,
    spheres: KissingSpheres | None = None,
    what: str = "the sum of gradients",
) -> Grads:
    """In the tree over all ranks' leaves: one value for each leaf, and a tensor like the sum."""
    if not columns:
        return []
    division = ranks.divide(len(columns[0]))
    with torch.no_grad():
        exchange = Exchange(ranks, division, Layout(like), what, spheres)
        parts = [part_sums(c, t, division, ranks.rank) for c, t in zip(columns, like, strict=True)]
        for p in range(len(division.parts[ranks.rank])):
            exchange.give(p, [sums[p] for sums in parts])
        found = exchange.finish()
        return [
            None if total is None else total.to(t.device)
            for total, t in zip(found, like, strict=True)
        ]
