"""`ShardSums`: sums over all shards of a batch inside a layer, for sync_batch_norm.py.

A layer that needs the whole batch passes its shard's values to `reduce` and waits for those of all
others. So all shards of such a call run at once, each as a work item on its own leaf. A waiting
shard gives up its turn to compute (`System::pause`), so that `concurrency` holds. The last shard to
arrive adds the values in the fixed tree, over the ranks too, and wakes the others. They also wake
at another shard's error, when a shard ends without arriving, at Ctrl-C and at ``stop()``.

The ranks exchange sums in the order of the layers, and once more when all shards have ended: so a
rank whose shard has failed tells those that wait for it in a layer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from torch_spheres import _core
from torch_spheres.distributed.checked_gather import CheckedGather
from torch_spheres.distributed.group import Ranks
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
_HEAD = 3  # numbers before a rank's sums: status, layer, direction
_thread = threading.local()


class _OtherShardFailed(Exception):  # noqa: N818 - users never see it
    """Ends a shard that waits for another one, which has failed or has ended."""


class _Sum:
    """One sum over all shards."""

    def __init__(self) -> None:
        self.values: dict[int, Any] = {}  # by leaf, of shards that have arrived
        self.waiting: list[int] = []  # numbers of the spheres that wait
        self.key: Key | None = None
        self.result: Any = None


class ShardSums:
    """The sums of one pass of a call's shards: its forward, or its backward.

    Args:
        spheres: run the shards.
        module: the user's, for the names of layers in errors.
        places: number of leaves of the tree.
        count: number of shards of this process.
        ranks: have the other shards; None if there are no others.
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
        self._is_broken = False  # the ranks know of an error, or cannot be reached

    def map(
        self, run: Callable[[Callable[[int], Any]], list[Any]], fn: Callable[[int], T]
    ) -> list[T]:
        """Calls `run` to run the shards ``fn(k)``, in one such pass at a time on these spheres.

        Two passes would wait for each other's leaves, and a barrier for leaves that wait here.
        """
        results: list[T] = []
        with self._spheres._all_leaves:
            with DeferredError() as caught:
                try:
                    results = run(lambda k: self._run(fn, k))
                except BaseException:
                    self._fail()
                    raise
            if self._ranks is not None and not self._is_broken:
                self._exchange(_END, None, [], caught)
            caught.raise_if_any()
        return results

    def _run(self, fn: Callable[[int], T], k: int) -> T | None:
        _thread.sums = self
        try:
            result = fn(k)
            self._end_shard()
        except _OtherShardFailed:
            return None  # the call raises the other shard's error
        except BaseException:
            self._fail()
            raise
        finally:
            _thread.sums = None
        return result

    def _fail(self) -> None:
        """Wakes the shards that wait."""
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
            self._failed.set()  # under the lock, so that only one shard raises the error
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
        """Combines all shards' values; returns the same object to all shards.

        Args:
            leaf: of the shard.
            layer: number of the layer in the module's ``modules()``.
            direction: of the pass.
            values: of this shard.
            combine: called once, with this process's values by leaf, and a function that adds
                tensors over all ranks.

        Raises:
            RuntimeError: the shards do not all reach the same layer.
            RankError: the ranks do not all reach the same layer, or one has failed.
            StoppedError: the spheres are being stopped.
        """
        key = layer, direction
        with self._lock:
            if self._failed.is_set():
                raise _OtherShardFailed
            if self._ended:
                self._failed.set()
                raise RuntimeError(self._not_all_come(key))
            current = self._sum
            if current.key is None:
                current.key = key
            elif current.key != key:
                self._failed.set()
                raise RuntimeError(
                    f"the shards go different ways: one is at {self._name(current.key)}, another "
                    f"at {self._name(key)}, and each waits there for the whole batch's statistics. "
                    "Every shard has to pass the same converted batch norms in the same order"
                )
            current.values[leaf] = values
            if is_last := len(current.values) == self._count:
                self._sum = _Sum()
            else:
                current.waiting.append(_core.current_sphere())
        if not is_last:
            found: T = self._wait(current)
            return found
        try:
            with default_context(), torch.no_grad():
                result = combine(current.values, lambda v: self._total(key, v))
        except BaseException:
            with self._lock:
                self._failed.set()
            self._call_back(current.waiting)
            raise
        current.result = result
        self._call_back(current.waiting)
        return result

    def _wait(self, current: _Sum) -> Any:
        while current.result is None and not self._failed.is_set():
            try:
                self._spheres._pause_item()
            except StoppedError:
                if self._failed.is_set():
                    break
                raise StoppedError(
                    "the spheres were stopped while shards waited for each other in "
                    f"{self._name(current.key)}"
                ) from None
        if current.result is None:
            raise _OtherShardFailed
        return current.result

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
                    sent = row[p * size : (p + 1) * size]
                    if sent[0]:
                        column[division.place(part)] = sent[1:].clone()
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
        """Every rank's sums, by rank: for each part 1 if it is there, else 0, and its numbers.

        Raises:
            RankError: another rank has failed, or is at another layer.
            BaseException: what this rank has caught, after the others know of it.
        """
        ranks = self._ranks
        assert ranks is not None
        length = next((len(p) for p in parts if p is not None), 0)
        nothing = torch.zeros(1 + length, dtype=torch.float64)
        one = torch.ones(1, dtype=torch.float64)
        where = (-1, 0) if key is None else (key[0], _DIRECTIONS.index(key[1]))
        head = torch.tensor([status, *where], dtype=torch.float64)
        message = [head, *(nothing if p is None else torch.cat([one, p]) for p in parts)]
        try:
            payload = torch.cat(message).view(torch.uint8)
            rows = CheckedGather(ranks, _WHAT, payload, caught).finish()
            table = [row.clone().view(torch.float64) for row in rows]
            heads = [tuple(map(int, row[:_HEAD].tolist())) for row in table]
            if len({*heads}) > 1:
                ranks.raise_divergence(_WHAT, [self._purpose(head) for head in heads])
        except BaseException:
            self._is_broken = True
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
    """The sums of the calling thread's shard; None if its shards do not wait for each other."""
    found: ShardSums | None = getattr(_thread, "sums", None)
    return found
