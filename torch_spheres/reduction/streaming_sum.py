"""Gradients folded into the fixed tree while shards still run, so that few are alive at a time.

A shard's gradients take as much memory as the weights. Keeping those of all shards until the end
would cost 12, 144 or 1728 times that; here a finished shard is added as soon as its place in the
tree allows, and a shard that would bring one set too many waits until there is room.

With shards started in the order of the tree (`tree_order`) and at most *c* of them running, at most
*c* + 4, *c* + 7 or *c* + 10 sets are alive for 12, 144 or 1728 shards: while the last quad of a
node is on its way, the sum of the first two and three finished leaves wait, and on each level above
up to three sums. (No evaluation order of this tree needs less than 4, 7, 10 in all, for one thread:
it is the tree's Ershov number.)

A shard's gradients are only read, since nothing tells whether somebody else holds them: a custom
`autograd.Function` may keep what it returns, or return memory of an array of its own. So the sum of
leaves goes into new tensors, and what they replace is let go in portions: each addition under way
takes `_PORTION` bytes, or the largest parameter, beside the sets above. Sums of sums are made in
place.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard

import torch
from torch import Tensor

from torch_spheres import _core
from torch_spheres.reduction.partition import Part, run_of, tree_order
from torch_spheres.reduction.tree_sum import depth_of, tree_sums
from torch_spheres.runtime.pool import SpherePool
from torch_spheres.runtime.trace_hooks import gradients_taken, here_and_now

__all__ = ["GradientFold", "rounded"]

_KISSING = _core.KISSING
_HALF = (torch.bfloat16, torch.float16)
_PORTION = 4 << 20  # bytes that are added before their summands are let go

Grads = list[Tensor | None]  # one shard's, or a partial sum's; the same parameters in each


@dataclass(slots=True)
class _Set:
    """A shard's gradients, or a partial sum, which nobody but the fold can see."""

    grads: Grads
    is_sum: bool  # made here: may be written to
    made: tuple[int, int] = field(default_factory=here_and_now)  # for a trace


class _Node:
    """An inner sphere's sum: the twelve places, and those still to come."""

    def __init__(self, parent: _Node | None, place: int) -> None:
        self.parent, self.place = parent, place
        self.bottom = True  # its children are leaves
        self.range = 0, _KISSING  # of its places, those that are wanted
        self.values: list[_Set | None] = [None] * _KISSING
        self.pending = [0] * _KISSING  # shards below each place that have not been folded yet
        # (Not the children: parent and child would be a cycle, which lives until it is collected.)

    def done(self, begin: int, end: int) -> bool:
        return not any(self.pending[begin:end])


class GradientFold:
    """Takes shards' gradients in any order, from any thread; gives their sum in the fixed tree.

    Args:
        leaves: 1, 12, 144 or 1728.
        shards: which of them will come; the others are absent.
        concurrency: how many may run at once.
        parts: with several processes: the complete subtrees whose sums are wanted, instead of the
            total.
        emit: gets ``(index of the part, the twelve values of the sphere above it)``, of which those
            in the part may be there and have to be added, on the thread that has completed it.
        spheres: who shares the work of `finish`; their trace shows who took what from whom.
    """

    def __init__(
        self,
        leaves: int,
        shards: Sequence[int],
        concurrency: int,
        parts: Sequence[Part] | None = None,
        emit: Callable[[int, list[Grads | None]], None] | None = None,
        spheres: SpherePool | None = None,
    ) -> None:
        self._emit, self._spheres = emit, spheres
        self._emitted: set[int] = set()
        self._depth = depth_of(leaves)
        self.limit = concurrency + 1 + 3 * max(1, self._depth)
        coming, order = set(shards), tree_order(leaves)
        self._order = [k for k in order if k in coming]
        self._changed = threading.Condition()
        self._next = 0
        self._admitted = 0
        self._alive = 0  # sets: of running shards and of partial sums
        self.peak = 0
        self._failed = False
        self._total: Grads | None = None
        self._leaf_nodes: dict[int, tuple[_Node, int]] = {}
        wanted = [(0, leaves)] if parts is None else parts
        self._roots = [_Node(None, 0) for _ in wanted]
        planted: dict[tuple[_Node, int], _Node] = {}
        for root, (first, last) in zip(self._roots, wanted, strict=True):
            begin, end, each = run_of((first, last))
            root.range = begin, end
            for k in order[first:last]:
                if k in coming:
                    self._plant(k, root, each, planted)

    def _plant(
        self, shard: int, root: _Node, each: int, planted: dict[tuple[_Node, int], _Node]
    ) -> None:
        """Puts a shard under its part's root, whose children have `each` leaves."""
        node, rest = root, shard // max(1, _KISSING**self._depth // (_KISSING * each))
        while each > 1:
            each //= _KISSING
            node.bottom = False
            place, rest = rest % _KISSING, rest // _KISSING
            node.pending[place] += 1
            child = planted.get((node, place))
            if child is None:
                child = planted[node, place] = _Node(node, place)
            node = child
        node.pending[rest] += 1
        self._leaf_nodes[shard] = (node, rest)

    # ---- shards ----

    def begin(self) -> int | None:
        """The shard to run next; waits while there is no room. None: another one has failed.

        Strictly in order: whoever waits then has only earlier ones before it, which go on and make
        room, down to the few sums that the limit allows for.
        """
        with self._changed:
            rank = self._next
            self._next += 1
            self._changed.wait_for(
                lambda: self._failed or (self._alive < self.limit and self._admitted == rank)
            )
            if self._failed:
                return None
            self._admitted += 1
            self._changed.notify_all()
            self._alive += 1
            self.peak = max(self.peak, self._alive)
            return self._order[rank]

    def fail(self) -> None:
        """A shard failed: lets go of those who wait for it."""
        with self._changed:
            self._failed = True
            self._changed.notify_all()

    def add(self, shard: int, grads: Grads) -> None:
        """Takes the gradients of a shard that has run, out of the list, which is empty then."""
        mine: Grads = [g.float() if g is not None and g.dtype in _HALF else g for g in grads]
        grads.clear()  # the caller's frame would keep them alive while they are folded
        node, place = self._leaf_nodes[shard]
        if self._depth == 0:
            self._total = mine
            return
        with self._changed:
            node.values[place] = _Set(mine, is_sum=False)
            node.pending[place] = 0
            del mine  # here: others may add it, and say that there is room
        self._fold(node, place)

    def _fold(self, node: _Node, place: int) -> None:
        """Adds what can be added now that `place` of `node` is complete, and up the tree."""
        while True:
            # Whoever completes a range takes its values out under the lock, and so adds it alone.
            quad = place // 4 * 4
            ranges = [(quad, quad + 4), (0, 8)]
            if not node.bottom:  # a set more or less on every level counts
                ranges.insert(0, (place // 2 * 2, place // 2 * 2 + 2))
            for begin, end in ranges:
                self._add_range(node, begin, end)
            parent = node.parent
            if parent is None:
                # In one process the last additions are finish()'s, which has all threads for them.
                if self._emit is not None:
                    self._emit_part(node)
                return
            if not self._add_range(node, 0, _KISSING, up=True):
                return
            node, place = parent, node.place

    def _add_range(self, node: _Node, begin: int, end: int, up: bool = False) -> bool:
        """Adds the finished values in a range into its first place, or into the parent's."""
        with self._changed:
            if not node.done(begin, end) or (node.parent is None and not _inside(node, begin, end)):
                return False
            if up and node.parent is not None and node.parent.values[node.place] is not None:
                return False  # somebody else did it
            count = sum(v is not None for v in node.values[begin:end])
            if count < (1 if up else 2):  # (none: another thread has taken them)
                return False
            sets: list[_Set | None] = [None] * _KISSING
            sets[begin:end] = node.values[begin:end]
            node.values[begin:end] = [None] * (end - begin)
            # Nobody may add around this range while it is being added.
            node.pending[begin] += 1
        self._tell_trace(sets)
        total = _sum(sets)
        del sets  # before anybody is told that there is room
        with self._changed:
            node.pending[begin] -= 1
            if up:
                assert node.parent is not None
                node.parent.values[node.place] = total
                node.parent.pending[node.place] = 0
            else:
                node.values[begin] = total
            del total  # it is not ours any more
            self._alive -= count - 1
            self._changed.notify_all()
        return True

    def _emit_part(self, root: _Node) -> None:
        """Gives away a part, if all of it is there."""
        part, (first, last) = self._roots.index(root), root.range
        with self._changed:
            if part in self._emitted or not root.done(first, last):
                return
            self._emitted.add(part)
            values: list[Grads | None] = [None] * _KISSING
            self._tell_trace(root.values[first:last])
            values[first:last] = [None if s is None else s.grads for s in root.values[first:last]]
            root.values[first:last] = [None] * (last - first)
        present = sum(v is not None for v in values)
        assert self._emit is not None
        self._emit(part, values)
        del values
        with self._changed:
            self._alive -= present
            self._changed.notify_all()

    def finish(self) -> Grads:
        """The sum, once all shards have been added. A parameter without a gradient has None."""
        if self._depth > 0:
            root = self._roots[0]
            self._tell_trace(root.values)
            sets, root.values = root.values, []
            self._total = _sum(sets, self._spheres).grads
        total, self._total = self._total, None
        assert total is not None
        return total

    def _tell_trace(self, sets: Sequence[_Set | None]) -> None:
        """The calling thread is about to add them."""
        if self._spheres is not None:
            gradients_taken(self._spheres, [s.made for s in sets if s is not None])


def _sum(sets: list[_Set | None], spheres: SpherePool | None = None) -> _Set:
    """The twelve's sum, which takes their gradients out of them."""
    present = [s for s in sets if s is not None]
    if len(present) == 1:
        return replace(present[0], made=here_and_now())
    totals: Grads = []
    for first, last in _portions(present):
        columns = [[None if s is None else s.grads[i] for s in sets] for i in range(first, last)]
        outs = [_writable(present, i) for i in range(first, last)]
        totals += tree_sums(columns, outs=outs, spheres=spheres)
        for s in present:
            s.grads[first:last] = [None] * (last - first)
        del columns, outs
    return _Set(totals, is_sum=True)


def _portions(sets: Sequence[_Set]) -> Iterator[tuple[int, int]]:
    """Ranges of parameters that are added in one go."""
    begin, size, count = 0, 0, len(sets[0].grads)
    for i in range(count):
        column = (s.grads[i] for s in sets)
        size += max((t.nbytes for t in column if _is_dense(t)), default=0)
        if size >= _PORTION or i + 1 == count:
            yield begin, i + 1
            begin, size = i + 1, 0


def _writable(sets: Sequence[_Set], i: int) -> Tensor | None:
    """A partial sum of parameter `i`, in whose memory the sum is made."""
    mine = (s.grads[i] for s in sets if s.is_sum)
    return next((t for t in mine if _is_dense(t) and t.is_contiguous()), None)


def _is_dense(tensor: Tensor | None) -> TypeGuard[Tensor]:
    return tensor is not None and tensor.layout is torch.strided


def _inside(root: _Node, begin: int, end: int) -> bool:
    """Whether a range of a root's places may be added already: a part's last sum waits."""
    first, last = root.range
    return first <= begin and end <= last and not root.done(first, last)


def rounded(grads: Grads, like: Sequence[Any]) -> Grads:
    """Sums in the parameters' own types: the half types, summed in float32, are rounded once."""
    return [
        g if g is None or g.dtype == p.dtype else g.to(p.dtype)
        for g, p in zip(grads, like, strict=True)
    ]
