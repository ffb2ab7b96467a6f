"""Why a process of a group has ended: what it says to the others before it is gone."""

from __future__ import annotations

import atexit
import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch_spheres.runtime.process_wide import is_on

if TYPE_CHECKING:
    from torch_spheres.distributed.group import Ranks

__all__ = ["leave_last_words"]


@functools.cache
def leave_last_words(groups: Callable[[], list[Ranks]]) -> None:
    """Has the others told why this process ends: by which exception, or by itself; once.

    Args:
        groups: returns those that the process is in when it ends.
    """
    if not is_on("TORCH_SPHERES_EXIT_HOOKS"):
        return
    before, said = sys.excepthook, False

    def say(text: str) -> None:
        for ranks in groups():
            if ranks.is_there():
                ranks.say("ends", text)

    def hook(kind: Any, error: BaseException, traceback: Any) -> None:
        nonlocal said
        said = True
        say(f"{type(error).__name__}: {error}")
        before(kind, error, traceback)

    def at_exit() -> None:
        if not said:
            say("it has exited (sys.exit(), or the end of its program)")

    sys.excepthook = hook
    atexit.register(at_exit)
