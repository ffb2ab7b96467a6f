"""`Ranks`: the processes that share each batch, and what they tell each other.

Loaders, models, metrics and checkpoints get it from `find_ranks`. Which rank has which rows is in
reduction/partition.py.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torch_spheres import _compat
from torch_spheres.distributed.batch_log import BatchLog
from torch_spheres.distributed.checked_gather import CheckedGather, gather_objects
from torch_spheres.distributed.failures import RollCall, leave_last_words
from torch_spheres.distributed.transport import ProcessGroup, Transport
from torch_spheres.errors import DeferredError
from torch_spheres.reduction.partition import Division, divide, tree_leaves, way_out

__all__ = ["ProcessGroup", "Ranks", "find_ranks", "note_local_epoch", "this_rank"]


def this_rank(process_group: ProcessGroup | bool | None) -> tuple[int, int]:
    """The rank of this process in a group, and the group's size; (0, 1) for a process alone.

    Args:
        process_group: None: torch's default group, if there is one. False: no other process.

    Raises:
        TypeError: `process_group` is no process group.
        ValueError: this process is not in it, or torch.distributed is not initialised.
    """
    if process_group is False:
        return 0, 1
    if not dist.is_available() or not dist.is_initialized():
        if process_group is not None:
            raise ValueError(
                f"process_group={process_group!r} without torch.distributed: call "
                "torch.distributed.init_process_group() first"
            )
        return 0, 1
    if process_group == dist.GroupMember.NON_GROUP_MEMBER:  # what new_group() gives to others
        raise ValueError("this process is not in its process_group")
    if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            "process_group must be a torch.distributed.ProcessGroup, None for the default one, or "
            f"False for none, got {process_group!r}"
        )
    return dist.get_rank(process_group), dist.get_world_size(process_group)


def find_ranks(process_group: ProcessGroup | bool | None, shards: int = 0) -> Ranks | None:
    """The ranks that share each batch; None if this process has batches alone.

    All parts of a program get the same object for a group: they send in one order on all ranks.

    Args:
        process_group: as of `this_rank`.
        shards: of a batch, which the ranks share evenly: as many as the hierarchy has leaves, or
            fewer; 0: any number of ranks will do.

    Raises:
        TypeError: `process_group` is no process group.
        ValueError: this process is not in it, or its size does not divide the shards.
    """
    _, world = this_rank(process_group)
    if world == 1:
        return None
    if shards % world:  # (nothing divides 0 unevenly)
        what = "leaves" if tree_leaves(shards) == shards else "shards"
        raise ValueError(
            f"{world} processes cannot share the {what} ({shards}) evenly: "
            f"{way_out(world, shards)}, or choose so many by process_group="
        )
    group = dist.group.WORLD if process_group is None else process_group
    with _finding:  # two threads' models have to find the same one
        known = _by_group.get(group)
        if known is None:
            for other, ranks in list(_by_group.items()):
                if not ranks.exists():  # it holds its group, which would never go
                    del _by_group[other]
            known = _by_group[group] = Ranks(process_group)
    return known


def note_local_epoch() -> None:
    """Notes that a loader of this process alone begins an epoch.

    It draws a seed from torch's default generator, whose state may then differ between ranks.
    """
    for ranks in list(_by_group.values()):
        ranks.drew_alone, ranks.has_own_rows = True, False


class Ranks(Transport):
    """The ranks of one process group; all call each method that sends, in the same order.

    Attributes:
        batches: that loaders have handed out in this process.
        drew_alone: whether a loader of this process alone has begun an epoch since the last
            epoch of all ranks.
        has_own_rows: whether the last batch that a loader handed out was this rank's part of one.
        models: numbers for models that share their batches, the same on all ranks.
        samplers: numbers for samplers.
        has_warned_of_rng: whether the ranks' random states were warned of.
        has_warned_of_lists: whether the datasets' lists were warned of.
    """

    def __init__(self, group: ProcessGroup | None) -> None:
        _compat.require(_compat.RANKS)
        rank, world = this_rank(group)
        self._torch_group = weakref.ref(dist.group.WORLD if group is None else group)
        name = getattr(self._torch_group(), "group_name", "")
        _made[name] += 1  # a later group may have the name, and the store, of an earlier one
        super().__init__(group, rank, world, f"torch_spheres/{name}/{_made[name]}")
        self.batches = BatchLog()
        self.drew_alone = self.has_own_rows = False
        self._loader_shards = 0  # of the loader that handed out the last batch
        self.models, self.samplers = itertools.count(1), itertools.count(1)
        self.has_warned_of_rng = self.has_warned_of_lists = False
        leave_last_words(_live_roll_calls)

    def exists(self) -> bool:
        """Whether the process group has not been destroyed."""
        if self.group is None:
            return dist.is_initialized() and dist.group.WORLD is self._torch_group()
        try:
            return dist.get_rank(self.group) >= 0
        except (ValueError, RuntimeError):
            return False

    def divide(self, shards: int) -> Division:
        """Which of so many shards each rank owns."""
        return divide(self.world, shards)

    # ---- the loader of the last batch ----

    def note_batch(self, shards: int) -> None:
        """A loader that divides batches into so many shards has handed out this rank's rows."""
        global _latest
        self.has_own_rows, self._loader_shards = True, shards
        _latest = weakref.ref(self)

    @staticmethod
    def take_latest_loader() -> tuple[Ranks, int] | None:
        """The ranks and shards of the last loader's batch; None if there was none since."""
        global _latest
        ranks, _latest = None if _latest is None else _latest(), None
        return None if ranks is None or not ranks.exists() else (ranks, ranks._loader_shards)

    # ---- blocking collectives ----

    def gather(
        self,
        values: Tensor,
        what: str,
        caught: DeferredError | None = None,
        pending: Sequence[Any] = (),
    ) -> Tensor:
        """Every rank's values, of one shape: a row for each rank, on the CPU.

        Args:
            values: of any type.
            what: what they are, for errors.
            caught: as of `CheckedGather`.
            pending: as of `CheckedGather.finish`.

        Raises:
            RankError: another rank has failed, is lost, or does something else.
            BaseException: what was caught, once the others know.
        """
        given = values.detach().cpu().contiguous()
        payload = given.reshape(-1).view(torch.uint8)
        rows = CheckedGather(self, what, payload, caught).finish(pending)
        sizes = [len(row) for row in rows]
        if len({*sizes}) > 1:
            self.raise_divergence(what, [f"{what} of {size} bytes" for size in sizes])
        # Cloned, since memory has to be aligned for the type.
        table = torch.stack([row.clone().view(given.dtype) for row in rows])
        return table.view(self.world, *given.shape)

    def meet(self, what: str, values: Sequence[int], caught: DeferredError | None = None) -> Tensor:
        """Every rank's integers, as `gather` has them: int64 of shape (ranks, values)."""
        return self.gather(torch.tensor([*values], dtype=torch.int64), what, caught)

    def objects(self, value: Any, what: str) -> list[Any]:
        """Every rank's value, pickled, by rank; slower than `gather`."""
        return gather_objects(self, value, what)

    @torch.no_grad()
    def broadcast(self, tensors: Sequence[Tensor], what: str) -> None:
        """Copies rank 0's values into everybody's tensors.

        Raises:
            RankError: another rank is lost.
        """
        self.raise_if_diverged()
        for tensor in tensors:
            sent = tensor.detach().to(self.device).contiguous()
            with self.sending(what):
                work = self.broadcast_async(sent)
            self.wait([work], what)
            if self.rank > 0:
                tensor.copy_(sent)


_latest: weakref.ref[Ranks] | None = None  # the loader's that handed out the last batch
_made: Counter[str] = Counter()  # how many there were of each group's name
_finding = threading.Lock()
_by_group: weakref.WeakKeyDictionary[Any, Ranks] = weakref.WeakKeyDictionary()


def _live_roll_calls() -> list[RollCall]:
    return [ranks.roll_call for ranks in list(_by_group.values()) if ranks.exists()]
