"""Partial sums of several processes, brought together without a bit being lost.

A ring all-reduce adds in an order that depends on the number of processes. Here each rank's partial
sums (one or two, see ranks.py) travel as they are: a *bucket* of tensors is cut into as many slices
as there are ranks, rank *r* gets everybody's slice *r* (all-to-all), adds them in the fixed tree,
and the totals go to all (all-gather). With *N* bytes of gradients a rank sends
``(p + 1) (W - 1) / W * N`` for *p* parts; a ring sends ``2 (W - 1) / W * N``.

What is small (a few scalars, the statistics of batch norm) goes to all at once, and all add it.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torch_spheres.errors import RankError
from torch_spheres.ranks import Ranks
from torch_spheres.sampler import GROUPS
from torch_spheres.system import KissingSpheres
from torch_spheres.tree import tree_sums

__all__ = ["Exchange", "Layout", "part_sums", "total_over_ranks"]

Grads = list[Tensor | None]
_Flags = list[list[list[int]]]  # by rank, by part: its state, then that of each tensor

_BUCKET = 16 << 20  # bytes of a bucket: large enough that its messages are worth their while
_SMALL = 1 << 20  # bytes that a rank sends in all: less goes in one message to everybody
_ALIGN = 32  # elements: 64 bytes of a half type
_HALF = (torch.bfloat16, torch.float16)
_SUMMED = (torch.float32, torch.float64)
_ABSENT, _PRESENT, _FAILED = 0, 1, 2


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
            if bucket is None or bucket.length * bucket.dtype.itemsize >= _BUCKET:
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

    def real(self, i: int, value: Tensor) -> Tensor:
        """A value of tensor `i` as its bucket has it, flat."""
        return (torch.view_as_real(value) if self.complex[i] else value).reshape(-1)

    def shaped(self, i: int, flat: Tensor) -> Tensor:
        """The other way round."""
        if not self.complex[i]:
            return flat.view(self.shapes[i])
        return torch.view_as_complex(flat.view(*self.shapes[i], 2))


class Exchange:
    """One sum over all ranks: each gives its parts, in order, and all get the total.

    Args:
        ranks: who takes part.
        layout: of what is summed.
        what: for errors: the name of the meeting.
        spheres: who shares the additions when there are many.
    """

    def __init__(
        self, ranks: Ranks, layout: Layout, what: str, spheres: KissingSpheres | None = None
    ) -> None:
        self._ranks, self._layout, self._what = ranks, layout, what
        self._spheres = spheres
        count = max(map(len, ranks.parts))
        self._is_small = layout.bytes * count * (ranks.world - 1) <= _SMALL
        self._lock = threading.Lock()
        self._given: list[Grads | None] = [None] * count
        self._issued = 0
        self._error: BaseException | None = None
        self.is_broken = False  # a message could not be sent: there will be no more of them
        self._flags: list[tuple[list[Any], Tensor]] = []  # by part: work, what it fills
        self._slices: list[list[tuple[list[Any], Tensor, Tensor]]] = []  # by part and bucket
        for part in range(len(ranks.own_parts), count):
            self._given[part] = [None] * len(layout.where)

    # ---- giving ----

    def give(self, part: int, sums: Grads) -> None:
        """A part's sums, None where no shard in it had any. Any thread, in any order."""
        with self._lock:
            self._given[part] = sums
            self._issue()

    def fail(self, error: BaseException) -> None:
        """Says that this rank has no sums to give: all will know, and nobody waits."""
        with self._lock:
            self._error = error
            nothing: Grads = [None] * len(self._layout.where)
            self._given = [nothing if i >= self._issued else None for i in range(len(self._given))]
            self._issue()

    def _issue(self) -> None:
        # In the order of the parts on all ranks, or messages would meet the wrong ones.
        while self._issued < len(self._given):
            sums = self._given[self._issued]
            if sums is None:
                return
            if not self._is_small:
                self._given[self._issued] = None
                try:
                    with self._ranks.explaining(self._what):
                        self._send(sums)
                except RankError:
                    self.is_broken = True
                    raise
            self._issued += 1

    def _flags_of(self, sums: Grads) -> Tensor:
        flags = [_ABSENT if s is None else _PRESENT for s in sums]
        return torch.tensor([_FAILED if self._error else _PRESENT, *flags], dtype=torch.uint8)

    def _send(self, sums: Grads) -> None:
        ranks, device = self._ranks, self._ranks.device
        flags = self._flags_of(sums).to(device)
        table = torch.empty(ranks.world * len(flags), dtype=torch.uint8, device=device)
        self._flags.append((ranks.gather_async(table, flags), table))
        slices = []
        buffers = self._layout.buffers(self._issued, ranks)
        for bucket, (sent, received) in zip(self._layout.buckets, buffers, strict=True):
            for i, begin, size in bucket.places:
                value = sums[i]
                if value is not None:
                    sent[begin : begin + size].copy_(self._layout.real(i, value))
            slices.append((ranks.scatter_async(received, sent), received, sent))
        self._slices.append(slices)

    # ---- getting ----

    def finish(self) -> Grads:
        """The total over all ranks' parts; None where all are absent. All parts have been given.

        Raises:
            RankError: another rank has failed, or does not answer.
            BaseException: what `fail` was told.
        """
        assert self._issued == len(self._given)
        with torch.no_grad():
            return self._finish_small() if self._is_small else self._finish_buckets()

    def _finish_small(self) -> Grads:
        """All parts in one message to everybody."""
        packed = []
        for sums in self._given:
            assert sums is not None
            packed.append(_bytes(self._flags_of(sums)))
            for bucket in self._layout.buckets:
                flat = torch.zeros(bucket.length, dtype=bucket.dtype)
                for i, begin, size in bucket.places:
                    value = sums[i]
                    if value is not None:
                        flat[begin : begin + size].copy_(self._layout.real(i, value))
                packed.append(_bytes(flat))
        table = self._ranks.gather(torch.cat(packed), self._what)
        read = [_Reader(row, self._layout) for row in table]
        parts = [[reader.part() for _ in self._given] for reader in read]
        flags = [[part[0].tolist() for part in row] for row in parts]
        self._check(flags)
        totals: Grads = [None] * len(self._layout.where)
        for b, bucket in enumerate(self._layout.buckets):
            flats = {
                (r, p): parts[r][p][1][b] for r in range(len(parts)) for p in range(len(parts[r]))
            }
            out = torch.empty(bucket.length, dtype=bucket.dtype)
            self._add(bucket, flats, flags, out, 0)
            self._place(bucket, out.to(bucket.result), flags, totals)
        return totals

    def _finish_buckets(self) -> Grads:
        ranks, what = self._ranks, self._what
        flags: _Flags = [[] for _ in range(ranks.world)]
        for works, table in self._flags:
            ranks.wait(works, what)
            for r, row in enumerate(table.view(ranks.world, -1).tolist()):
                flags[r].append(row)
        if any(part[0] == _FAILED for row in flags for part in row):
            # Memory that messages are still on their way to is used again by the next exchange.
            for slices in self._slices:
                for works, _, _ in slices:
                    ranks.wait(works, what)
        self._check(flags)
        gathered = []
        for b, bucket in enumerate(self._layout.buckets):
            length = bucket.slice_length(ranks.world)
            flats = {}
            for p, slices in enumerate(self._slices):
                works, received, sent = slices[b]
                ranks.wait(works, what)
                for r in range(ranks.world):
                    source = sent if r == ranks.rank else received
                    flats[r, p] = source[r * length : (r + 1) * length]
            mine = torch.empty(length, dtype=bucket.dtype, device=ranks.device)
            self._add(bucket, flats, flags, mine, ranks.rank * length)
            out = torch.empty(length * ranks.world, dtype=bucket.result, device=ranks.device)
            mine = mine.to(bucket.result)
            gathered.append((ranks.gather_async(out, mine), out, mine))
        totals: Grads = [None] * len(self._layout.where)
        for bucket, (works, out, _) in zip(self._layout.buckets, gathered, strict=True):
            ranks.wait(works, what)
            self._place(bucket, out, flags, totals)
        return totals

    def _check(self, flags: _Flags) -> None:
        if any(part[0] == _FAILED for row in flags for part in row):
            self._ranks.raise_errors(self._what, self._error)

    def _add(
        self,
        bucket: _Bucket,
        flats: dict[tuple[int, int], Tensor],
        flags: _Flags,
        out: Tensor,
        first: int,
    ) -> None:
        """The fixed tree over the twelve groups, of elements `first` and on of a bucket.

        A part's sum stands at its first group's place; the others of the part are absent, and an
        absent operand is left out: so what is added is the tree.
        """
        columns: list[list[Tensor | None]] = []
        outs: list[Tensor | None] = []
        for present, begin, end in self._runs(bucket, flags):
            low, high = max(begin - first, 0), min(end - first, len(out))
            if low >= high:
                continue
            column: list[Tensor | None] = [None] * GROUPS
            for r, p in present:
                column[self._ranks.parts[r][p][0]] = flats[r, p][low:high]
            columns.append(column)
            outs.append(out[low:high])
        tree_sums(columns, outs=outs, spheres=self._spheres)

    def _runs(
        self, bucket: _Bucket, flags: _Flags
    ) -> Iterator[tuple[list[tuple[int, int]], int, int]]:
        """Neighbours in a bucket that the same parts have, as (parts, begin, end)."""
        parts = [(r, p) for r, row in enumerate(flags) for p in range(len(row))]

        def has(i: int) -> list[tuple[int, int]]:
            return [(r, p) for r, p in parts if flags[r][p][1 + i] == _PRESENT]

        for present, run in itertools.groupby(bucket.places, lambda place: has(place[0])):
            places = list(run)
            yield present, places[0][1], places[-1][1] + places[-1][2]

    def _place(self, bucket: _Bucket, out: Tensor, flags: _Flags, totals: Grads) -> None:
        for i, begin, size in bucket.places:
            if any(part[1 + i] == _PRESENT for row in flags for part in row):
                totals[i] = self._layout.shaped(i, out[begin : begin + size])


def part_sums(column: Sequence[Tensor | None], like: Tensor, ranks: Ranks) -> Grads:
    """The sums of a rank's parts, of one value for each leaf; of half types in float32."""
    half = like.dtype in _HALF
    values = [v.float() if half and v is not None else v for v in column]
    sums = []
    for first, last in ranks.own_parts:
        chosen = [v if first <= leaf % GROUPS < last else None for leaf, v in enumerate(values)]
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
    with torch.no_grad():
        exchange = Exchange(ranks, Layout(like), what, spheres)
        parts = [part_sums(c, t, ranks) for c, t in zip(columns, like, strict=True)]
        for p in range(len(ranks.own_parts)):
            exchange.give(p, [sums[p] for sums in parts])
        found = exchange.finish()
        return [
            None if total is None else total.to(t.device)
            for total, t in zip(found, like, strict=True)
        ]


def _bytes(values: Tensor) -> Tensor:
    return values.view(torch.uint8)


class _Reader:
    """Parts out of a rank's message of bytes."""

    def __init__(self, message: Tensor, layout: Layout) -> None:
        self._message, self._layout, self._at = message, layout, 0

    def part(self) -> tuple[Tensor, list[Tensor]]:
        flags = self._take(1 + len(self._layout.where), torch.uint8)
        flats = [self._take(bucket.length, bucket.dtype) for bucket in self._layout.buckets]
        return flags, flats

    def _take(self, count: int, dtype: torch.dtype) -> Tensor:
        size = count * dtype.itemsize
        piece = self._message[self._at : self._at + size].clone()  # at storage of its own: aligned
        self._at += size
        return piece.view(dtype)
