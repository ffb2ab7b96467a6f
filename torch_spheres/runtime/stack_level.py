"""Finds the line of the user's program that a warning is about."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

__all__ = ["users_level"]

_NOT_USERS = (str(Path(torch.__file__ or "").parent), str(Path(__file__).parents[1]))


def users_level() -> int:
    """The `stacklevel` of the nearest frame that is neither in torch nor in this package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_USERS):
        level, frame = level + 1, frame.f_back
    return level
