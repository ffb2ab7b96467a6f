"""All-reduce in the fixed tree: the same bits for every number of processes.

A ring all-reduce adds in an order that depends on the number of processes. Here the partial sums of
each rank (usually one or two *parts*, see reduction/partition.py) travel unreduced. Tensors are
packed into *buckets*, each cut into as many slices as there are ranks. Rank *r* gets everybody's
slice *r* (all-to-all), adds them in the fixed tree, and all get the totals (all-gather). With *N*
bytes of gradients and *p* parts, each of *W* ranks sends ``(p + 1) (W - 1) / W * N`` bytes; a ring
sends ``2 (W - 1) / W * N``. Small sums go to all ranks in one message, and every rank adds them.

The model's calls use `TreeAllReduce`, whose parts are sent while others are computed; metrics and
the gradient hook use `total_over_ranks`.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_spheres.distributed.checked_gather import CheckedGather
from torch_spheres.distributed.group import Ranks
from torch_spheres.errors import DeferredError, RankError
from torch_spheres.reduction.partition import Division
from torch_spheres.reduction.tree_sum import tree_sums
from torch_spheres.runtime.pool import SpherePool

__all__ = ["BucketLayout", "TreeAllReduce", "total_over_ranks"]

Grads = list[Tensor | None]
_Present = list[list[list[int]]]  # by tensor: the [rank, part]s that have a sum of it

_BUCKET = 16 << 20  # bytes of a bucket: longer messages are hardly faster
_SMALL = 1 << 20  # bytes that a rank sends in all, up to which one message to all is faster
_ALIGN = 32  # elements: 64 bytes of a half type
_HALF = (torch.bfloat16, torch.float16)
_SUMMED = (torch.float32, torch.float64)


class _Slot(NamedTuple):
    """Where a bucket has a tensor."""

    tensor: int
    begin: int
    elements: int


@dataclass
class _Bucket:
    """Tensors of one type, one after another."""

    dtype: torch.dtype  # of the partial sums; those of half types are float32
    result: torch.dtype
    slots: list[_Slot] = field(default_factory=list)
    length: int = 0

    def slice_length(self, world: int) -> int:
        """Elements of the slice that each rank adds."""
        return _aligned(-(-self.length // world))


def _aligned(elements: int) -> int:
    return -(-elements // _ALIGN) * _ALIGN


class BucketLayout:
    """Which bucket has which tensor, and where: the same for every number of ranks.

    Args:
        like: tensors of the shapes and types of the sums: float32, float64, complex or half types.

    Raises:
        TypeError: a tensor has another type.
    """

    def __init__(self, like: Sequence[Tensor]) -> None:
        self.shapes = [t.shape for t in like]
        self._complex = [t.is_complex() for t in like]
        self.buckets: list[_Bucket] = []
        latest: dict[torch.dtype, _Bucket] = {}
        for i, tensor in enumerate(like):
            t = torch.view_as_real(tensor) if tensor.is_complex() else tensor
            bucket = latest.get(t.dtype)
            if bucket is None or bucket.length * bucket.dtype.itemsize >= _BUCKET:
                dtype = torch.float32 if t.dtype in _HALF else t.dtype
                if dtype not in _SUMMED:
                    raise TypeError(f"gradients of {t.dtype} cannot be summed over processes")
                bucket = latest[t.dtype] = _Bucket(dtype, t.dtype)
                self.buckets.append(bucket)
            bucket.slots.append(_Slot(i, bucket.length, t.numel()))
            bucket.length += _aligned(t.numel())
        self._buffers: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self.bytes = sum(b.length * b.dtype.itemsize for b in self.buckets)

    def buffers(self, part: int, ranks: Ranks) -> list[tuple[Tensor, Tensor]]:
        """Memory to send and to receive a part, by bucket: allocated once, used in every step."""
        if part not in self._buffers:
            self._buffers[part] = []
            for bucket in self.buckets:
                length = bucket.slice_length(ranks.world) * ranks.world
                sent = torch.empty(length, dtype=bucket.dtype, device=ranks.device)
                self._buffers[part].append((sent, torch.empty_like(sent)))
        return self._buffers[part]

    def view(self, slot: _Slot, flat: Tensor) -> Tensor:
        """A slot of a bucket's memory `flat`, as its tensor."""
        own = flat[slot.begin : slot.begin + slot.elements]
        if not self._complex[slot.tensor]:
            return own.view(self.shapes[slot.tensor])
        return torch.view_as_complex(own.view(*self.shapes[slot.tensor], 2))


class TreeAllReduce:
    """One sum over all ranks: each rank adds its parts (`add_part`), and all get the total.

    Full buckets are sent in one order on all ranks, while later parts are still computed. At the
    end the ranks tell each other which tensors their parts have, and whether they have failed.

    Args:
        ranks: that take part.
        division: which parts each rank has.
        layout: of the tensors that are summed.
        what: what the sum is, for errors.
        spheres: the pool that shares the additions when there are many.
        deferred: nothing is sent before `finish`, since the ranks exchange other messages.

    Attributes:
        is_broken: whether a message could not be sent; then `finish` cannot be called.
    """

    def __init__(
        self,
        ranks: Ranks,
        division: Division,
        layout: BucketLayout,
        what: str,
        spheres: SpherePool | None = None,
        deferred: bool = False,
    ) -> None:
        self._ranks, self._layout, self._what = ranks, layout, what
        self._division, self._spheres = division, spheres
        parts = max(map(len, division.parts))
        self._is_small = layout.bytes * parts * (ranks.world - 1) <= _SMALL
        self._sends_early = not self._is_small and not deferred
        self._buffers = [layout.buffers(p, ranks) for p in range(parts)]
        self._has = [[False] * len(layout.shapes) for _ in range(parts)]  # by part and tensor
        self._lock = threading.Lock()
        # In the order in which they are sent: (part, bucket).
        self._messages = list(itertools.product(range(parts), range(len(layout.buckets))))
        self._filled: set[tuple[int, int]] = set()
        self._works: list[Any] = []  # of the messages that have been sent
        self._opening: CheckedGather | None = None
        self.is_broken = False

    # ---- sending ----

    @torch.no_grad()
    def add_part(self, part: int, columns: Sequence[Sequence[Tensor | None]]) -> None:
        """Adds a part of this rank's sums, and sends it; at most once for each part. Any thread.

        Args:
            part: its index among the rank's parts.
            columns: of each tensor its sum, or 12, 144 or 1728 values to be added in the tree;
                float32 for half types, None where there is no value.
        """
        for b, bucket in enumerate(self._layout.buckets):
            sent, _ = self._buffers[part][b]
            mine = [columns[slot.tensor] for slot in bucket.slots]
            outs = [self._layout.view(slot, sent) for slot in bucket.slots]
            for slot, column in zip(bucket.slots, mine, strict=True):
                self._has[part][slot.tensor] = any(v is not None for v in column)
            if any(v is not None and v.device != sent.device for c in mine for v in c):
                for out, total in zip(outs, tree_sums(mine), strict=True):
                    if total is not None:
                        out.copy_(total)
            else:
                tree_sums(mine, outs=outs)
            with self._lock:
                self._filled.add((part, b))
                if self._sends_early:
                    self._send()

    def _send(self) -> None:
        """Sends the buckets that are full, up to the first that is not."""
        ranks = self._ranks
        try:
            with ranks.sending(self._what):
                while len(self._works) < len(self._messages):
                    part, bucket = message = self._messages[len(self._works)]
                    if message not in self._filled:
                        return
                    if self._opening is None:  # finds out whether all ranks do the same
                        nothing = torch.empty(0, dtype=torch.uint8)
                        self._opening = CheckedGather(ranks, self._what, nothing)
                    sent, received = self._buffers[part][bucket]
                    self._works.append(ranks.scatter_async(received, sent))
        except RankError:
            self.is_broken = True
            raise

    # ---- the total ----

    def finish(self, caught: DeferredError) -> Grads:
        """The total over all ranks' parts, by tensor; None where no part has the tensor.

        Args:
            caught: of the work that computed the parts; its error is raised on all ranks.

        Raises:
            RankError: another rank has failed, or does not answer.
            BaseException: what was caught, once the others know.
        """
        ranks, layout = self._ranks, self._layout
        flags = torch.tensor([*itertools.chain.from_iterable(self._has)], dtype=torch.uint8)
        payload = flags
        if self._is_small:
            values = [
                self._buffers[p][b][0][: layout.buckets[b].length].cpu().view(torch.uint8)
                for p, b in self._messages
            ]
            payload = torch.cat([flags, *values])
        else:
            with self._lock:
                self._filled.update(self._messages)
                self._send()
            if self._opening is not None:
                self._opening.finish()
        # After an error too, messages have to arrive: the next sum uses the same memory.
        table = ranks.gather(payload, self._what, caught, pending=self._works)
        count = len(layout.shapes)
        has = table[:, : len(flags)].view(ranks.world, len(self._has), count)
        present = [has[:, :, i].nonzero().tolist() for i in range(count)]
        with torch.no_grad():
            if self._is_small:
                return self._unpacked(present, self._sum_all(present, table[:, len(flags) :]))
            return self._unpacked(present, self._sum_slices(present))

    def _sum_all(self, present: _Present, table: Tensor) -> list[Tensor]:
        """The sums of each bucket, from every rank's bytes."""
        buckets = self._layout.buckets
        partial: list[dict[tuple[int, int], Tensor]] = [{} for _ in buckets]
        begin = 0
        for p, b in self._messages:
            end = begin + buckets[b].length * buckets[b].dtype.itemsize
            for r, row in enumerate(table[:, begin:end]):
                partial[b][r, p] = row.clone().view(buckets[b].dtype)  # cloned for its alignment
            begin = end
        sums = [torch.empty(bucket.length, dtype=bucket.result) for bucket in buckets]
        for bucket, values, out in zip(buckets, partial, sums, strict=True):
            self._sum(bucket, values, present, out, 0)
        return sums

    def _sum_slices(self, present: _Present) -> list[Tensor]:
        """The sums of each bucket, of which each rank adds a slice."""
        ranks, what = self._ranks, self._what
        sums, gathered = [], []
        work_of = dict(zip(self._messages, self._works, strict=True))
        for b, bucket in enumerate(self._layout.buckets):
            length = bucket.slice_length(ranks.world)
            partial = {}
            for p, buffers in enumerate(self._buffers):
                ranks.wait([work_of[p, b]], what)
                sent, received = buffers[b]
                for r in range(ranks.world):
                    source = sent if r == ranks.rank else received
                    partial[r, p] = source[r * length : (r + 1) * length]
            out = torch.empty(length * ranks.world, dtype=bucket.result, device=ranks.device)
            mine = out.view(ranks.world, length)[ranks.rank]
            self._sum(bucket, partial, present, mine, ranks.rank * length)
            with ranks.sending(what):
                gathered.append(ranks.gather_async(out, mine))
            sums.append(out)
        ranks.wait(gathered, what)
        return sums

    def _sum(
        self,
        bucket: _Bucket,
        partial: dict[tuple[int, int], Tensor],
        present: _Present,
        out: Tensor,
        first: int,
    ) -> None:
        """Adds all ranks' parts of a bucket, from element `first` on, in the fixed tree into `out`.

        Tensors that the same parts have are added as one.
        """
        division = self._division
        sums = out if out.dtype == bucket.dtype else torch.empty_like(out, dtype=bucket.dtype)
        columns: list[list[Tensor | None]] = []
        outs: list[Tensor | None] = []
        for having, run in itertools.groupby(bucket.slots, lambda slot: present[slot.tensor]):
            slots = list(run)
            begin, end = slots[0].begin, slots[-1].begin + slots[-1].elements
            low, high = max(begin - first, 0), min(end - first, len(out))
            if low >= high:
                continue
            column: list[Tensor | None] = [None] * division.places
            for r, p in having:
                column[division.place(division.parts[r][p])] = partial[r, p][low:high]
            columns.append(column)
            outs.append(sums[low:high])
        tree_sums(columns, outs=outs, spheres=self._spheres)
        if sums is not out:
            out.copy_(sums)

    def _unpacked(self, present: _Present, sums: Sequence[Tensor]) -> Grads:
        """The tensors of the buckets' sums."""
        totals: Grads = [None] * len(present)
        for bucket, flat in zip(self._layout.buckets, sums, strict=True):
            for slot in bucket.slots:
                if present[slot.tensor]:
                    totals[slot.tensor] = self._layout.view(slot, flat)
        return totals


@torch.no_grad()
def total_over_ranks(
    columns: Sequence[Sequence[Tensor | None]],
    like: Sequence[Tensor],
    ranks: Ranks,
    spheres: SpherePool | None = None,
    what: str = "the sum of gradients",
) -> Grads:
    """Sums in the tree over all ranks' leaves.

    Args:
        columns: for each sum one value per leaf, of which the rank's own count.
        like: for each sum a tensor of its shape, type and device.
        ranks: that take part.
        spheres: as of `TreeAllReduce`.
        what: what the sum is, for errors.
    """
    if not columns:
        return []
    division = ranks.divide(len(columns[0]))
    reduce = TreeAllReduce(ranks, division, BucketLayout(like), what, spheres)
    wide = [[v.float() if v is not None and v.dtype in _HALF else v for v in c] for c in columns]
    for p, part in enumerate(division.parts[ranks.rank]):
        own = {*division.in_part(part)}
        reduce.add_part(p, [[v if k in own else None for k, v in enumerate(c)] for c in wide])
    found = reduce.finish(DeferredError())
    return [
        None if total is None else total.to(t.device) for total, t in zip(found, like, strict=True)
    ]
