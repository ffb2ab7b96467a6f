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

from torch_spheres.distributed.group import Ranks
from torch_spheres.distributed.handshake import CheckedGather
from torch_spheres.errors import DeferredError, RankError
from torch_spheres.reduction.partition import Division
from torch_spheres.reduction.tree_sum import tree_sums
from torch_spheres.runtime.pool import SpherePool

__all__ = ["BucketLayout", "TreeAllReduce", "total_over_ranks"]

Grads = list[Tensor | None]
_Having = list[list[list[int]]]  # by tensor: the [rank, part]s that have it

_BUCKET = 16 << 20  # bytes of a bucket: large enough that its messages are worth their while
_SMALL = 1 << 20  # bytes that a rank sends in all: less goes in one message to everybody
_ALIGN = 32  # elements: 64 bytes of a half type
_HALF = (torch.bfloat16, torch.float16)
_SUMMED = (torch.float32, torch.float64)


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


class BucketLayout:
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
        for i, tensor in enumerate(like):
            t = torch.view_as_real(tensor) if tensor.is_complex() else tensor
            bucket = open_.get(t.dtype)
            if bucket is None or bucket.length * bucket.dtype.itemsize >= _BUCKET:
                sums = torch.float32 if t.dtype in _HALF else t.dtype
                if sums not in _SUMMED:
                    raise TypeError(f"gradients of {t.dtype} cannot be summed over processes")
                bucket = open_[t.dtype] = _Bucket(sums, t.dtype)
                self.buckets.append(bucket)
            bucket.places.append((i, bucket.length, t.numel()))
            bucket.length += -(-t.numel() // _ALIGN) * _ALIGN
        self._buffers: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self.bytes = sum(b.length * b.dtype.itemsize for b in self.buckets)

    def buffers(self, part: int, ranks: Ranks) -> list[tuple[Tensor, Tensor]]:
        """For what is sent and received of a part, by bucket: made once, and used in every step."""
        if part not in self._buffers:
            self._buffers[part] = []
            for bucket in self.buckets:
                length = bucket.slice_length(ranks.world) * ranks.world
                sent = torch.empty(length, dtype=bucket.dtype, device=ranks.device)
                self._buffers[part].append((sent, torch.empty_like(sent)))
        return self._buffers[part]

    def shaped(self, i: int, flat: Tensor) -> Tensor:
        """What a bucket holds of tensor `i`, as that tensor."""
        if not self.complex[i]:
            return flat.view(self.shapes[i])
        return torch.view_as_complex(flat.view(*self.shapes[i], 2))


class TreeAllReduce:
    """One sum over all ranks: each gives its parts, and all get the total.

    A part's buckets are sent one after another, each while the next is being added, in the same
    order on all ranks. At the end all tell each other which tensors their parts have, and whether
    they have failed.

    Args:
        ranks: who takes part.
        division: which parts each of them has.
        layout: of what is summed.
        what: for errors: the name of the meeting.
        spheres: who shares the additions when there are many.
        late: nothing is sent before the end: until then the ranks talk of something else.
    """

    def __init__(
        self,
        ranks: Ranks,
        division: Division,
        layout: BucketLayout,
        what: str,
        spheres: SpherePool | None = None,
        late: bool = False,
    ) -> None:
        self._is_late = late
        self._ranks, self._layout, self._what = ranks, layout, what
        self._division, self._spheres = division, spheres
        parts = max(map(len, division.parts))
        self._is_small = layout.bytes * parts * (ranks.world - 1) <= _SMALL
        self._buffers = [layout.buffers(p, ranks) for p in range(parts)]
        self._has = [[False] * len(layout.shapes) for _ in range(parts)]  # by part and tensor
        self._lock = threading.Lock()
        # What is sent at once, in this order: (part, bucket).
        self._units = [(p, b) for p in range(parts) for b in range(len(layout.buckets))]
        self._added: set[tuple[int, int]] = set()
        self._works: list[list[Any]] = []  # by unit, of those that have been sent
        self._begin: CheckedGather | None = None
        self.is_broken = False  # a message could not be sent: there will be no more of them

    # ---- giving ----

    @torch.no_grad()
    def give(self, part: int, columns: Sequence[Sequence[Tensor | None]]) -> None:
        """A part's sums. Any thread; at most once for each part, whose sums are None without.

        Args:
            part: its number among this rank's.
            columns: of each tensor: its value, or 12, 144 or 1728, which are added in the tree on
                the way into the message. In float32 for half types.
        """
        for b, bucket in enumerate(self._layout.buckets):
            sent, _ = self._buffers[part][b]
            mine, outs = [], []
            for i, begin, size in bucket.places:
                mine.append(columns[i])
                outs.append(self._layout.shaped(i, sent[begin : begin + size]))
                self._has[part][i] = any(v is not None for v in columns[i])
            if any(v is not None and v.device != sent.device for c in mine for v in c):
                for out, total in zip(outs, tree_sums(mine), strict=True):
                    if total is not None:
                        out.copy_(total)
            else:
                tree_sums(mine, outs=outs)
            with self._lock:
                self._added.add((part, b))
                if not self._is_small and not self._is_late:
                    self._send()

    def _send(self) -> None:
        """Sends what has been added, up to the first bucket that has not."""
        ranks = self._ranks
        try:
            with ranks.sending(self._what):
                while len(self._works) < len(self._units):
                    part, bucket = unit = self._units[len(self._works)]
                    if unit not in self._added:
                        return
                    if self._begin is None:  # so that ranks that do something else find out
                        self._begin = CheckedGather(
                            ranks, self._what, torch.empty(0, dtype=torch.uint8)
                        )
                    sent, received = self._buffers[part][bucket]
                    self._works.append(ranks.scatter_async(received, sent))
        except RankError:
            self.is_broken = True
            raise

    # ---- getting ----

    def finish(self, caught: DeferredError) -> Grads:
        """The total over all ranks' parts; None where all are absent.

        Args:
            caught: with an error this rank has no sums to give, and nobody will have a total.

        Raises:
            RankError: another rank has failed, or does not answer.
            BaseException: what was caught, once the others know.
        """
        ranks, what, layout = self._ranks, self._what, self._layout
        flags = [*itertools.chain.from_iterable(self._has)]
        told = torch.tensor(flags, dtype=torch.uint8)
        if self._is_small:  # all in one message to everybody
            values = [
                self._buffers[p][b][0][: layout.buckets[b].length].cpu().view(torch.uint8)
                for p, b in self._units
            ]
            told = torch.cat([told, *values])
        else:
            with self._lock:
                self._added.update(self._units)
                self._send()
            if self._begin is not None:
                self._begin.finish()
        # Memory that messages are still on their way to is used by the next call.
        pending = [work for works in self._works for work in works]
        table = ranks.gather(told, what, caught, pending)
        count = len(layout.shapes)
        there = table[:, : len(flags)].view(ranks.world, len(self._has), count)
        having = [there[:, :, i].nonzero().tolist() for i in range(count)]
        with torch.no_grad():
            if self._is_small:
                return self._total(having, self._add_all(having, table[:, len(flags) :]))
            return self._total(having, self._add_slices(having))

    def _add_all(self, having: _Having, table: Tensor) -> list[Tensor]:
        """The sums of each bucket, from every rank's bytes."""
        flats: list[dict[tuple[int, int], Tensor]] = [{} for _ in self._layout.buckets]
        at = 0
        for p, b in self._units:
            bucket = self._layout.buckets[b]
            end = at + bucket.length * bucket.dtype.itemsize
            for r, row in enumerate(table[:, at:end]):
                flats[b][r, p] = row.clone().view(bucket.dtype)  # aligned
            at = end
        sums = []
        for bucket, values in zip(self._layout.buckets, flats, strict=True):
            sums.append(torch.empty(bucket.length, dtype=bucket.result))
            self._add(bucket, values, having, sums[-1], 0)
        return sums

    def _add_slices(self, having: _Having) -> list[Tensor]:
        """The sums of each bucket, of which each rank adds a slice."""
        ranks, what = self._ranks, self._what
        sums, gathered = [], []
        works_of = dict(zip(self._units, self._works, strict=True))
        for b, bucket in enumerate(self._layout.buckets):
            length = bucket.slice_length(ranks.world)
            flats = {}
            for p, buffers in enumerate(self._buffers):
                ranks.wait(works_of[p, b], what)
                sent, received = buffers[b]
                for r in range(ranks.world):
                    source = sent if r == ranks.rank else received
                    flats[r, p] = source[r * length : (r + 1) * length]
            out = torch.empty(length * ranks.world, dtype=bucket.result, device=ranks.device)
            mine = out.view(ranks.world, length)[ranks.rank]
            self._add(bucket, flats, having, mine, ranks.rank * length)
            with ranks.sending(what):
                gathered.append(ranks.gather_async(out, mine))
            sums.append(out)
        for works in gathered:
            ranks.wait(works, what)
        return sums

    def _add(
        self,
        bucket: _Bucket,
        flats: dict[tuple[int, int], Tensor],
        having: _Having,
        out: Tensor,
        first: int,
    ) -> None:
        """The fixed tree over all ranks' parts, of elements `first` and on of a bucket."""
        division = self._division
        sums = out if out.dtype == bucket.dtype else torch.empty_like(out, dtype=bucket.dtype)
        columns: list[list[Tensor | None]] = []
        outs: list[Tensor | None] = []
        for present, run in itertools.groupby(bucket.places, lambda place: having[place[0]]):
            places = list(run)
            begin, end = places[0][1], places[-1][1] + places[-1][2]
            low, high = max(begin - first, 0), min(end - first, len(out))
            if low >= high:
                continue
            column: list[Tensor | None] = [None] * division.places
            for r, p in present:
                column[division.place(division.parts[r][p])] = flats[r, p][low:high]
            columns.append(column)
            outs.append(sums[low:high])
        tree_sums(columns, outs=outs, spheres=self._spheres)
        if sums is not out:
            out.copy_(sums)

    def _total(self, having: _Having, sums: Sequence[Tensor]) -> Grads:
        totals: Grads = [None] * len(having)
        for bucket, flat in zip(self._layout.buckets, sums, strict=True):
            for i, begin, size in bucket.places:
                if having[i]:
                    totals[i] = self._layout.shaped(i, flat[begin : begin + size])
        return totals


@torch.no_grad()
def total_over_ranks(
    columns: Sequence[Sequence[Tensor | None]],
    like: Sequence[Tensor],
    ranks: Ranks,
    spheres: SpherePool | None = None,
    what: str = "the sum of gradients",
) -> Grads:
    """In the tree over all ranks' leaves: one value for each leaf, and a tensor like the sum."""
    if not columns:
        return []
    division = ranks.divide(len(columns[0]))
    exchange = TreeAllReduce(ranks, division, BucketLayout(like), what, spheres)
    wide = [[v.float() if v is not None and v.dtype in _HALF else v for v in c] for c in columns]
    for p, part in enumerate(division.parts[ranks.rank]):
        own = {*division.in_part(part)}
        exchange.give(p, [[v if k in own else None for k, v in enumerate(c)] for c in wide])
    found = exchange.finish(DeferredError())
    return [
        None if total is None else total.to(t.device) for total, t in zip(found, like, strict=True)
    ]
