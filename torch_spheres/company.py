"""The processes that save or load a checkpoint together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch_spheres.errors import RankError
from torch_spheres.ranks import ranks_of, this_rank

__all__ = ["Company"]

S = TypeVar("S")
T = TypeVar("T")


class Company:
    """The ranks that save or load together; a process by itself is one of one."""

    def __init__(self, process_group: Any, what: str) -> None:
        self._group, self._what = process_group, what
        self.rank, self.world = this_rank(process_group)

    def together(self, work: Callable[[], S], tell: Callable[[S | None], T]) -> tuple[S, list[T]]:
        """What `work` returns here, and what all ranks tell of theirs. All leave together.

        Raises:
            BaseException: what `work` raised, once all know.
            RankError: another rank's `work` raised, or a rank is gone.
        """
        # The error is in no variable of a frame that its traceback owns when it leaves: that would
        # be a cycle, and keep the state that was saved or loaded.
        try:
            value = work()
        except BaseException as error:
            try:
                self._meet(f"{type(error).__name__}: {error}", tell(None))
            except RankError as lost:
                raise error from lost
            raise
        told = self._meet("", tell(value))
        if failed := [rank for rank, (text, _) in enumerate(told) if text]:
            texts = "; ".join(f"rank {rank} of {self.world}: {told[rank][0]}" for rank in failed)
            raise RankError(f"{self._what} failed on {texts}", tuple(failed))
        return value, [mark for _, mark in told]

    def _meet(self, failure: str, mark: T) -> list[tuple[str, T]]:
        """Every rank's failure, empty if it has none, and mark."""
        if self.world == 1:
            return [(failure, mark)]
        try:
            # (Not by its name, which may differ: folders are mounted anywhere.)
            kind = f"{self._what.split()[0]} a checkpoint"
            return ranks_of(self._group).objects((failure, mark), kind)
        except RankError as lost:
            raise RankError(f"{self._what} failed: {lost}", lost.ranks) from lost

    def need_same(self, values: Sequence[tuple[str, ...]], otherwise: str) -> None:
        """Raises RankError unless all ranks have told the same."""
        if others := [rank for rank, value in enumerate(values) if value != values[0]]:
            texts = "; ".join(
                f"rank {rank}: {' '.join(value)}" for rank, value in enumerate(values)
            )
            raise RankError(f"{self._what}: {otherwise} ({texts})", tuple(others))
