"""Errors of torch_spheres."""

from __future__ import annotations

from torch_spheres._core import StoppedError

__all__ = ["DeferredError", "RankError", "StoppedError"]


class RankError(RuntimeError):
    """Another process of the training has failed, died, or does something else than this one.

    Args:
        message: what has happened.
        ranks: the processes that it is about, by their ranks in the process group.

    Attributes:
        ranks: as given.
    """

    def __init__(self, message: str, ranks: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.ranks = ranks


class DeferredError:
    """Context that catches an exception, to be raised when all ranks know of it.

    Raising it drops it: its traceback refers to frames, which would refer to it in a cycle.

    Attributes:
        error: what was caught; None if nothing was.
    """

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error

    def __enter__(self) -> DeferredError:
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
