"""The processes that save or load a checkpoint together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from torch_spheres.errors import RankError
from torch_spheres.ranks import ranks_of

__all__ = ["Company"]

T = TypeVar("T")


class Company:
    """The ranks that save or load together; a process by itself is one of one."""

    def __init__(self, process_group: Any, what: str) -> None:
        self._group, self._what = process_group, what
        self.rank, self.world = 0, 1
        if process_group is not False and dist.is_available() and dist.is_initialized():
            self.rank, self.world = dist.get_rank(process_group), dist.get_world_size(process_group)
        elif process_group:
            raise ValueError(f"process_group={process_group!r} without torch.distributed")
        if self.rank < 0:
            raise ValueError("this process is not in its process_group")

    def meet(self, value: T, error: BaseException | None) -> list[T]:
        """Every rank's value; raises if a rank has an error, once all know. All leave together."""
        told = "" if error is None else f"{type(error).__name__}: {error}"
        found: list[Any] = [(told, value)] * self.world
        try:
            if self.world > 1:
                # (Not by its name, which may differ: folders are mounted anywhere.)
                kind = f"{self._what.split()[0]} a checkpoint"
                found = ranks_of(self._group).objects((told, value), kind)
        except RankError as lost:
            if error is not None:
                raise error from lost
            raise RankError(f"{self._what} failed: {lost}", lost.ranks) from lost
        if error is not None:
            raise error
        if failed := [rank for rank, (text, _) in enumerate(found) if text]:
            texts = "; ".join(f"rank {rank} of {self.world}: {found[rank][0]}" for rank in failed)
            raise RankError(f"{self._what} failed on {texts}", tuple(failed))
        return [value for _, value in found]

    def need_same(self, values: Sequence[tuple[str, ...]], otherwise: str) -> None:
        """Raises RankError unless all ranks have told the same."""
        if others := [rank for rank, value in enumerate(values) if value != values[0]]:
            texts = "; ".join(
                f"rank {rank}: {' '.join(value)}" for rank, value in enumerate(values)
            )
            raise RankError(f"{self._what}: {otherwise} ({texts})", tuple(others))
