"""Whether this process was forked from one with threads, which torch believes to have here too.

A parallel region of OpenMP waits for ever in such a process, for threads that the parent had. The
package imports this module at once, so that it sees all forks that come later.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

__all__ = ["came_from_threads"]


class _Fork:
    parent_has_threads = False
    came_from_threads = False

    @classmethod
    def before(cls) -> None:
        with contextlib.suppress(OSError):  # no Linux
            cls.parent_has_threads = len([*Path("/proc/self/task").iterdir()]) > 1

    @classmethod
    def after_in_child(cls) -> None:
        cls.came_from_threads |= cls.parent_has_threads


os.register_at_fork(before=_Fork.before, after_in_child=_Fork.after_in_child)


def came_from_threads() -> bool:
    """Whether it was."""
    return _Fork.came_from_threads
