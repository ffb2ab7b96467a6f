"""Errors of torch_spheres."""

from __future__ import annotations

from torch_spheres._core import StoppedError

__all__ = ["Caught", "RankError", "StoppedError"]


class RankError(RuntimeError):
    """Another process of the training has failed, died, or does not come to a meeting.

    Attributes:
        ranks: those that it is about, in the process group.
    """

    def __init__(self, message: str, ranks: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.ranks = ranks


class Caught:
    """An exception that is raised once all ranks know of it.

    ``with Caught() as caught:`` keeps the block's. It is let go when it is raised: its traceback
    owns the frames, and what these hold would be a cycle.
    """

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error

    def __enter__(self) -> Caught:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> bool:
        if isinstance(error, Exception):
            self.error = error
        return isinstance(error, Exception)

    def raise_if_any(self) -> None:
        """Raises the exception, if there is one."""
        error, self.error = self.error, None
        try:
            if error is not None:
                raise error
        finally:
            del error
