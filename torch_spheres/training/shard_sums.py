"""Sums over all shards of a batch, for layers that need them in the middle of a shard.

A layer that looks at the whole batch (batch norm, see sync_batch_norm.py) gives its shard's values
and waits for those of all others. So the shards of such a call all run at once: each is a work item
on a leaf of its own, and one that waits lets others have its turn to compute (`System::pause`), so
that `concurrency` holds. The last one to come adds the values in the fixed tree, over the ranks
too, and wakes the others.

What wakes them otherwise: another shard's error, the end of a shard that does not come, Ctrl-C, and
``stop()``. The ranks talk in the order of the layers, and once more when all shards have ended, so
that a rank whose shard has failed tells those that wait for it in a layer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from torch_spheres import _core
from torch_spheres.distributed.group import Ranks
from torch_spheres.distributed.handshake import CheckedGather
from torch_spheres.errors import DeferredError, StoppedError
from torch_spheres.reduction.tree_sum import tree_sums
from torch_spheres.runtime.caller_context import default_context
from torch_spheres.runtime.pool import SpherePool

__all__ = ["ShardSums", "Total", "shard_sums_here"]

T = TypeVar("T")
Total = Callable[[Mapping[int, Tensor]], Tensor]
"""The sum in the tree of one float64 tensor for each shard, over all ranks."""

Direction = Literal["forward", "backward"]
Key = tuple[int, Direction]
_DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")
_WHAT = "the sum over all shards inside of a layer"
_SUM, _END = range(2)  # what a rank has come for
_HEAD = 3  # numbers in front of a rank's sums: one of these, the layer's, the direction's
_here = threading.local()


class _AnotherFailed(Exception):  # noqa: N818 - never seen by users
    """Ends a shard that cannot go on, since another one has failed or has not come."""


class _Sum:
    """One sum: who has come to it, and what came of it."""

    def __init__(self) -> None:
        self.values: dict[int, Any] = {}  # by leaf
        self.waiting: list[int] = []  # spheres
        self.key: Key | None = None
        self.result: Any = None


class ShardSums:
    """The sums of one pass of a call's shards: its forward, or its backward.

    Args:
        spheres: who runs the shards.
        module: the user's, whose layers' names stand in errors.
        places: leaves of the tree.
        count: shards of this process.
        ranks: who has the others.
    """

    def __init__(
        self,
        spheres: SpherePool,
        module: nn.Module,
        places: int,
        count: int,
        ranks: Ranks | None,
    ) -> None:
        self._spheres, self._module, self._ranks = spheres, module, ranks
        self._places, self._count = places, count
        self._lock = threading.Lock()
        self._sum = _Sum()
        self._ended = 0
        self._failed = threading.Event()
        self._is_apart = False  # the ranks know of an error, or cannot be told

    def map(
        self, run: Callable[[Callable[[int], Any]], list[Any]], fn: Callable[[int], T]
    ) -> list[T]:
        """Has `run` run the shards ``fn(k)``; one such pass at a time on these spheres.

        Two would wait for each other's leaves, and a barrier for leaves that wait for others there.
        """
        results: list[T] = []
        with self._spheres._all_leaves:
            with DeferredError() as caught:
                try:
                    results = run(lambda k: self._run(fn, k))
                except BaseException:
                    self._fail()
                    raise
            if self._ranks is not None and not self._is_apart:
                self._exchange(_END, None, [], caught)
            caught.raise_if_any()
        return results

    def _run(self, fn: Callable[[int], T], k: int) -> T | None:
        _here.sums = self
        try:
            result = fn(k)
            self._end_shard()
        except _AnotherFailed:
            return None  # the other's error is the call's
        except BaseException:
            self._fail()
            raise
        finally:
            _here.sums = None
        return result

    def _fail(self) -> None:
        """Wakes those who wait."""
        with self._lock:
            self._failed.set()
            waiting, self._sum.waiting = self._sum.waiting, []
        self._call_back(waiting)

    def _call_back(self, waiting: list[int]) -> None:
        for sphere in waiting:
            self._spheres._resume_item(sphere)

    def _end_shard(self) -> None:
        with self._lock:
            self._ended += 1
            if self._failed.is_set() or self._sum.key is None:
                return
            self._failed.set()  # before the lock is let go: what follows from it is no other error
            key = self._sum.key
        raise RuntimeError(self._not_all_come(key))

    # ---- in a shard ----

    def reduce(
        self,
        leaf: int,
        layer: int,
        direction: Direction,
        values: Any,
        combine: Callable[[Mapping[int, Any], Total], T],
    ) -> T:
        """What `combine` makes of all shards' values, the same object for all of them.

        Args:
            leaf: the shard's.
            layer: its number among the module's ``modules()``.
            direction: of the layer's pass.
            values: of this shard.
            combine: called once, with this process's values by leaf, and a function that adds
                tensors over all ranks.

        Raises:
            RuntimeError: the shards do not all come to the same layer.
            RankError: nor do the ranks, or one has failed.
            StoppedError: the spheres are being stopped.
        """
        key = layer, direction
        with self._lock:
            if self._failed.is_set():
                raise _AnotherFailed
            if self._ended:
                self._failed.set()
                raise RuntimeError(self._not_all_come(key))
            mine = self._sum
            if mine.key is None:
                mine.key = key
            elif mine.key != key:
                self._failed.set()
                raise RuntimeError(
                    f"the shards go different ways: one is at {self._name(mine.key)}, another at "
                    f"{self._name(key)}, and each waits there for the whole batch's statistics. "
                    "Every shard has to pass the same converted batch norms in the same order"
                )
            mine.values[leaf] = values
            if is_last := len(mine.values) == self._count:
                self._sum = _Sum()
            else:
                mine.waiting.append(_core.current_sphere())
        if not is_last:
            found: T = self._wait(mine)
            return found
        try:
            with default_context(), torch.no_grad():
                result = combine(mine.values, lambda v: self._total(key, v))
        except BaseException:
            with self._lock:
                self._failed.set()
            self._call_back(mine.waiting)
            raise
        mine.result = result
        self._call_back(mine.waiting)
        return result

    def _wait(self, mine: _Sum) -> Any:
        while mine.result is None and not self._failed.is_set():
            try:
                self._spheres._pause_item()
            except StoppedError:
                if self._failed.is_set():
                    break
                raise StoppedError(
                    "the spheres were stopped while shards waited for each other in "
                    f"{self._name(mine.key)}"
                ) from None
        if mine.result is None:
            raise _AnotherFailed
        return mine.result

    # ---- over the ranks ----

    def _total(self, key: Key, values: Mapping[int, Tensor]) -> Tensor:
        column = [values.get(k) for k in range(self._places)]
        if self._ranks is not None:
            division = self._ranks.divide(self._places)
            parts: list[Tensor | None] = []
            for part in division.parts[self._ranks.rank]:
                own = {*division.in_part(part)}
                mine = [v if k in own else None for k, v in enumerate(column)]
                parts += tree_sums([mine])
            (like,) = {v.shape for v in values.values()}
            table = self._exchange(_SUM, key, parts)
            column = [None] * division.places
            for theirs, row in zip(division.parts, table, strict=True):
                size = 1 + like.numel()
                for p, part in enumerate(theirs):
                    told = row[p * size : (p + 1) * size]
                    if told[0]:
                        column[division.place(part)] = told[1:].clone()
        (total,) = tree_sums([column])
        assert total is not None
        return total

    def _exchange(
        self,
        status: int,
        key: Key | None,
        parts: list[Tensor | None],
        caught: DeferredError | None = None,
    ) -> list[Tensor]:
        """Every rank's sums, by rank: of each part whether it is there, and its numbers.

        Raises:
            RankError: one of them has failed, or has come for something else.
            BaseException: this one has, once the others know.
        """
        ranks = self._ranks
        assert ranks is not None
        length = next((len(p) for p in parts if p is not None), 0)
        nothing = torch.zeros(1 + length, dtype=torch.float64)
        one = torch.ones(1, dtype=torch.float64)
        where = (-1, 0) if key is None else (key[0], _DIRECTIONS.index(key[1]))
        head = torch.tensor([status, *where], dtype=torch.float64)
        told = [head, *(nothing if p is None else torch.cat([one, p]) for p in parts)]
        try:
            payload = torch.cat(told).view(torch.uint8)
            rows = CheckedGather(ranks, _WHAT, payload, caught).finish()
            table = [row.clone().view(torch.float64) for row in rows]
            heads = [tuple(map(int, row[:_HEAD].tolist())) for row in table]
            if len({*heads}) > 1:
                ranks.raise_divergence(_WHAT, [self._purpose(head) for head in heads])
        except BaseException:
            self._is_apart = True
            raise
        return [row[_HEAD:] for row in table]

    # ---- for errors ----

    def _purpose(self, head: tuple[int, ...]) -> str:
        status, layer, direction = head
        if status == _SUM:
            return f"at {self._name((layer, _DIRECTIONS[direction]))}"
        return "its shards have ended"

    def _name(self, key: Key | None) -> str:
        assert key is not None
        layer, direction = key
        name = [name for name, _ in self._module.named_modules()][layer]
        return f"the {direction} of {name or 'the module'!r}"

    def _not_all_come(self, key: Key) -> str:
        return (
            f"a shard has ended without coming to {self._name(key)}, where others wait for the "
            "whole batch's statistics. Every shard has to pass the same converted batch norms as "
            "often: the forward must not depend on the rows in that"
        )


def shard_sums_here() -> ShardSums | None:
    """Those of the shard that the calling thread runs, where shards wait for each other."""
    found: ShardSums | None = getattr(_here, "sums", None)
    return found
