"""Adds shards' gradients in the fixed tree while other shards still run, so that few are alive.

A shard's gradients take as much memory as the weights, and those of all shards 12, 144 or 1728
times that. `StreamingSum`, which `training` uses, adds a finished shard as soon as its place in the
tree allows, and has a shard wait that would bring one set of gradients too many.

With shards started in the order of the tree (`tree_order`) and at most *c* of them running, at most
*c* + 4, *c* + 7 or *c* + 10 sets are alive for 12, 144 or 1728 shards: while the last quad of a
node is computed, the sum of the first two quads and three finished leaves wait, and on each level
above up to three sums. The tree's Ershov number is 4, 7 or 10: with one thread no order of
evaluation needs fewer.

A shard's gradients are only read, because others may hold them: a custom `autograd.Function` may
keep what it returns, or return memory of an array. So the sum of leaves goes into new tensors, and
its summands are released in chunks: each addition takes `_CHUNK_BYTES`, or the size of the largest
parameter, beside the sets above. Sums of sums are made in place.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard

import torch
from torch import Tensor

from torch_spheres import _core
from torch_spheres.reduction.partition import Part, children_of, tree_order
from torch_spheres.reduction.tree_sum import depth_of, tree_sums
from torch_spheres.runtime.pool import SpherePool
from torch_spheres.runtime.trace_hooks import gradients_taken, here_and_now

__all__ = ["StreamingSum", "rounded"]

_KISSING = _core.KISSING
_HALF = (torch.bfloat16, torch.float16)
_CHUNK_BYTES = 4 << 20  # are added before their summands are released

Grads = list[Tensor | None]
"""A shard's gradients or a partial sum, a tensor for each parameter; None: no gradient."""


@dataclass(slots=True)
class _Summand:
    """A shard's gradients or a partial sum; only a `StreamingSum` holds it."""

    grads: Grads
    is_sum: bool  # a partial sum, whose memory may be reused
    made: tuple[int, int] = field(default_factory=here_and_now)  # for a trace


class _Node:
    """An inner node of the tree; its twelve places are its children.

    A node refers to its parent only: with the children there would be reference cycles.
    """

    def __init__(self, parent: _Node | None, place: int) -> None:
        self.parent, self.place = parent, place
        self.has_leaves = True  # its children are leaves
        self.wanted = 0, _KISSING  # the range of places whose sum is wanted
        self.values: list[_Summand | None] = [None] * _KISSING
        self.pending = [0] * _KISSING  # by place, shards at or below it that are not added yet

    def is_complete(self, begin: int, end: int) -> bool:
        """Whether all shards below a range of places have been added to its values."""
        return not any(self.pending[begin:end])

    def is_ready(self, begin: int, end: int) -> bool:
        """Whether the values of a range may be added now."""
        complete = self.is_complete(begin, end)
        if self.parent is not None or not complete:
            return complete
        # finish(), or the caller of `emit`, makes the last additions of a root.
        first, last = self.wanted
        return first <= begin and end <= last and not self.is_complete(first, last)


class StreamingSum:
    """Adds shards' gradients, which come in any order from any thread, in the fixed tree.

    For each shard call `begin`, run the shard that it returns, and call `add`; at the end `finish`.

    Args:
        tree_size: leaves of the tree: 1, 12, 144 or 1728.
        leaves: those that will be added; the others are absent.
        concurrency: how many shards may run at once.
        parts: with several processes: the complete subtrees whose sums are wanted, instead of the
            total.
        emit: is called with each part's index and the twelve values of the node above it, of which
            those in the part are still to be added, on the thread that completes the part.
        spheres: the pool that shares the work of `finish`, and whose trace shows the gradients.

    Attributes:
        limit: sets of gradients, running shards' included, that may be alive at once.
        peak: the most that were.
    """

    def __init__(
        self,
        tree_size: int,
        leaves: Sequence[int],
        concurrency: int,
        parts: Sequence[Part] | None = None,
        emit: Callable[[int, list[Grads | None]], None] | None = None,
        spheres: SpherePool | None = None,
    ) -> None:
        self._emit, self._spheres = emit, spheres
        self._emitted: set[int] = set()
        self._depth = depth_of(tree_size)
        self.limit = concurrency + 1 + 3 * max(1, self._depth)
        coming, order = set(leaves), tree_order(tree_size)
        self._order = [k for k in order if k in coming]
        self._changed = threading.Condition()
        self._next = 0  # rank in `_order` for the next call of begin()
        self._admitted = 0  # shards that begin() has returned
        self._alive = 0  # sets of gradients: of running shards and partial sums
        self.peak = 0
        self._failed = False
        self._total: Grads | None = None
        self._leaf_nodes: dict[int, tuple[_Node, int]] = {}
        wanted = [(0, tree_size)] if parts is None else parts
        self._roots = [_Node(None, 0) for _ in wanted]
        nodes: dict[tuple[_Node, int], _Node] = {}
        for root, (first, last) in zip(self._roots, wanted, strict=True):
            begin, end, each = children_of((first, last))
            root.wanted = begin, end
            for k in order[first:last]:
                if k in coming:
                    self._add_leaf(k, root, each, nodes)

    def _add_leaf(
        self, shard: int, root: _Node, each: int, nodes: dict[tuple[_Node, int], _Node]
    ) -> None:
        """Makes the nodes from a part's root, whose children have `each` leaves, to a shard."""
        node, rest = root, shard // max(1, _KISSING**self._depth // (_KISSING * each))
        while each > 1:
            each //= _KISSING
            node.has_leaves = False
            place, rest = rest % _KISSING, rest // _KISSING
            node.pending[place] += 1
            child = nodes.get((node, place))
            if child is None:
                child = nodes[node, place] = _Node(node, place)
            node = child
        node.pending[rest] += 1
        self._leaf_nodes[shard] = (node, rest)

    # ---- shards ----

    def begin(self) -> int | None:
        """Waits until there is room for a shard's gradients; returns its leaf.

        Shards begin strictly in the order of the tree. So only earlier shards are running while a
        shard waits, and these can always be added until few enough sums are left.

        Returns:
            The leaf, or None if another shard has failed.
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
        """Reports that a shard has failed; `begin` then returns None to all threads."""
        with self._changed:
            self._failed = True
            self._changed.notify_all()

    def add(self, shard: int, grads: Grads) -> None:
        """Adds the gradients of a shard that has run; empties the list."""
        mine: Grads = [g.float() if g is not None and g.dtype in _HALF else g for g in grads]
        grads.clear()  # the caller's frame would keep them alive during the additions
        node, place = self._leaf_nodes[shard]
        if self._depth == 0:
            self._total = mine
            return
        with self._changed:
            node.values[place] = _Summand(mine, is_sum=False)
            node.pending[place] = 0
            del mine  # under the lock: another thread may release it, and let a shard begin
        self._add_ready(node, place)

    def _add_ready(self, node: _Node, place: int) -> None:
        """Adds all that can be added, up the tree, now that `place` of `node` is complete."""
        while True:
            # The thread that takes a range's values out, under the lock, is the one that adds them.
            quad = place // 4 * 4
            ranges = [(quad, quad + 4), (0, 8)]
            if not node.has_leaves:  # pairs of sums too: a set on every level counts
                ranges.insert(0, (place // 2 * 2, place // 2 * 2 + 2))
            for begin, end in ranges:
                self._add_range(node, begin, end)
            parent = node.parent
            if parent is None:
                # Without parts finish() makes the last additions, on all threads.
                if self._emit is not None:
                    self._emit_part(node)
                return
            if not self._add_range(node, 0, _KISSING, up=True):
                return
            node, place = parent, node.place

    def _add_range(self, node: _Node, begin: int, end: int, up: bool = False) -> bool:
        """Adds the values of a range if all are there, into its first place or the parent's.

        Returns:
            Whether this thread added them.
        """
        with self._changed:
            if not node.is_ready(begin, end):
                return False
            if up and node.parent is not None and node.parent.values[node.place] is not None:
                return False  # another thread did it
            count = sum(v is not None for v in node.values[begin:end])
            if count < (1 if up else 2):  # 0: another thread has taken them
                return False
            sets: list[_Summand | None] = [None] * _KISSING
            sets[begin:end] = node.values[begin:end]
            node.values[begin:end] = [None] * (end - begin)
            # So that no other thread adds a larger range meanwhile.
            node.pending[begin] += 1
        self._record_arrows(sets)
        total = _sum(sets)
        del sets  # before a waiting shard is told that there is room
        with self._changed:
            node.pending[begin] -= 1
            if up:
                assert node.parent is not None
                node.parent.values[node.place] = total
                node.parent.pending[node.place] = 0
            else:
                node.values[begin] = total
            del total  # another thread may release it from now on
            self._alive -= count - 1
            self._changed.notify_all()
        return True

    def _emit_part(self, root: _Node) -> None:
        """Calls `emit` with a part that is complete."""
        part, (first, last) = self._roots.index(root), root.wanted
        with self._changed:
            if part in self._emitted or not root.is_complete(first, last):
                return
            self._emitted.add(part)
            values: list[Grads | None] = [None] * _KISSING
            self._record_arrows(root.values[first:last])
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
        """Returns the sum, once all shards have been added."""
        if self._depth > 0:
            root = self._roots[0]
            self._record_arrows(root.values)
            sets, root.values = root.values, []
            self._total = _sum(sets, self._spheres).grads
        total, self._total = self._total, None
        assert total is not None
        return total

    def _record_arrows(self, sets: Sequence[_Summand | None]) -> None:
        """Has a trace show that the calling thread takes the gradients, to add them."""
        if self._spheres is not None:
            gradients_taken(self._spheres, [s.made for s in sets if s is not None])


def _sum(sets: list[_Summand | None], spheres: SpherePool | None = None) -> _Summand:
    """Returns the sum of twelve children, and releases their gradients."""
    present = [s for s in sets if s is not None]
    if len(present) == 1:
        return replace(present[0], made=here_and_now())
    totals: Grads = []
    for first, last in _chunks(present):
        columns = [[None if s is None else s.grads[i] for s in sets] for i in range(first, last)]
        outs = [_reusable(present, i) for i in range(first, last)]
        totals += tree_sums(columns, outs=outs, spheres=spheres)
        for s in present:
            s.grads[first:last] = [None] * (last - first)
        del columns, outs
    return _Summand(totals, is_sum=True)


def _chunks(sets: Sequence[_Summand]) -> Iterator[tuple[int, int]]:
    """Ranges of parameters that are added before their summands are released."""
    begin, size, count = 0, 0, len(sets[0].grads)
    for i in range(count):
        column = (s.grads[i] for s in sets)
        size += max((t.nbytes for t in column if _is_dense(t)), default=0)
        if size >= _CHUNK_BYTES or i + 1 == count:
            yield begin, i + 1
            begin, size = i + 1, 0


def _reusable(sets: Sequence[_Summand], i: int) -> Tensor | None:
    """The memory for the sum of parameter `i`: that of a partial sum, or None for new memory."""
    mine = (s.grads[i] for s in sets if s.is_sum)
    return next((t for t in mine if _is_dense(t) and t.is_contiguous()), None)


def _is_dense(tensor: Tensor | None) -> TypeGuard[Tensor]:
    return tensor is not None and tensor.layout is torch.strided


def rounded(grads: Grads, like: Sequence[Any]) -> Grads:
    """Returns gradients in their parameters' dtypes: rounds sums of half types from float32."""
    return [
        g if g is None or g.dtype == p.dtype else g.to(p.dtype)
        for g, p in zip(grads, like, strict=True)
    ]
