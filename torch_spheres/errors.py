"""The exceptions of torch_spheres, and a holder for an exception that has to wait."""

from __future__ import annotations

from torch_spheres._core import StoppedError

__all__ = ["Caught", "RankError", "StoppedError"]


class RankError(RuntimeError):
    """Another process has failed, has ended, or does not take part in an exchange between ranks.

    Attributes:
        ranks: the ranks, in the process group, that the error is about.
    """

    def __init__(self, message: str, ranks: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.ranks = ranks


class Caught:
    """Holds an exception until all ranks know of it.

    ``with Caught() as caught:`` catches the block's `Exception`, if there is one.
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
        """Raises the exception, if there is one, and no longer holds it."""
        # The traceback refers to frames that may refer to this object, which would be a cycle.
        error, self.error = self.error, None
        try:
            if error is not None:
                raise error
        finally:
            del error
