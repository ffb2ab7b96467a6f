"""Which rank is lost, and why: what processes leave in the group's store for those that wait.

`Transport` asks a `RollCall` when a message fails; `group.Ranks` calls `leave_last_words`.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import sys
import time
from collections.abc import Callable
from typing import Any

from torch_spheres import _compat
from torch_spheres.errors import RankError
from torch_spheres.runtime.process_wide import is_on

__all__ = ["RollCall", "leave_last_words"]

_ROLL_CALL = 3.0  # seconds in which another rank that waits too has said so


class RollCall:
    """What the ranks of one group say of themselves in torch's default store.

    Args:
        name: prefix of the keys, the same on all ranks and of this group alone.
        rank: of this process.
        world: number of ranks.
    """

    def __init__(self, name: str, rank: int, world: int) -> None:
        self._name, self._rank, self._world = name, rank, world

    def say_waiting(self, number: int) -> None:
        """Says that this rank waits for the collective of that number."""
        self._say("waits", str(number))

    def say_ended(self, why: str) -> None:
        """Says why this process ends."""
        self._say("ends", why)

    def explained(self, error: RuntimeError, what: str, number: int) -> RankError:
        """The RankError for torch's `error`: which ranks did not come to `what`, and why."""
        self.say_waiting(number)
        missing = [r for r in range(self._world) if r != self._rank and not self._waits(r, number)]
        who = "rank" if len(missing) == 1 else "ranks"
        names = ", ".join(map(str, missing))
        absent = f": {who} {names} of {self._world} did not come to it" if missing else ""
        causes = []
        with contextlib.suppress(RuntimeError):
            causes = [f"rank {r}: {text}" for r in missing if (text := self._said("ends", r))]
        because = f" ({'; '.join(causes)})" if causes else ", having died, hung or gone elsewhere"
        return RankError(
            f"{what} failed on rank {self._rank}{absent}{because if missing else ''}; "
            f"torch says: {str(error).strip().splitlines()[0]}",
            tuple(missing),
        )

    def _say(self, what: str, text: str) -> None:
        with contextlib.suppress(RuntimeError):  # the store is gone: the wait will fail too
            _compat.default_store().set(f"{self._name}/{what}/{self._rank}", text)

    def _said(self, what: str, rank: int) -> str:
        store, key = _compat.default_store(), f"{self._name}/{what}/{rank}"
        return str(store.get(key), "utf-8") if store.check([key]) else ""

    def _waits(self, rank: int, number: int) -> bool:
        """Whether a rank says in time that it waits for collective `number`."""
        end = time.monotonic() + _ROLL_CALL
        with contextlib.suppress(RuntimeError):
            while time.monotonic() < end:
                if int(self._said("waits", rank) or -1) >= number:
                    return True
                if self._said("ends", rank):
                    return False
                time.sleep(0.05)
        return False


@functools.cache
def leave_last_words(live: Callable[[], list[RollCall]]) -> None:
    """Installs hooks, once, that tell other ranks why this process ends: an exception, or an exit.

    Args:
        live: returns the roll calls of the groups that the process is in when it ends.
    """
    if not is_on("TORCH_SPHERES_EXIT_HOOKS"):
        return
    before, has_said = sys.excepthook, False

    def say(text: str) -> None:
        for roll_call in live():
            roll_call.say_ended(text)

    def hook(kind: Any, error: BaseException, traceback: Any) -> None:
        nonlocal has_said
        has_said = True
        say(f"{type(error).__name__}: {error}")
        before(kind, error, traceback)

    def at_exit() -> None:
        if not has_said:
            say("it has exited (sys.exit(), or the end of its program)")

    sys.excepthook = hook
    atexit.register(at_exit)
