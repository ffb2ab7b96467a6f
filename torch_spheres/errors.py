"""Errors of torch_spheres."""

from torch_spheres._core import StoppedError

__all__ = ["RankError", "StoppedError"]


class RankError(RuntimeError):
    """Another process of the training has failed, died, or does not come to a meeting.

    Attributes:
        ranks: those that it is about, in the process group.
    """

    def __init__(self, message: str, ranks: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.ranks = ranks
