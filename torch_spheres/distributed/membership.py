"""`Membership`: the ranks that a model, a loader or a hook shares each call with.

Process groups come and go: one may be initialised after the model was made, or destroyed before.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch.distributed as dist

from torch_spheres.distributed.group import ProcessGroup, Ranks, find_ranks
from torch_spheres.runtime.stack_level import users_level

__all__ = ["Membership"]

_LAUNCHERS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # torchrun's, Open MPI's, MPICH's
_warned_of_launchers: set[str] = set()


class Membership:
    """The ranks of one owner, looked up anew at each call.

    Args:
        what: the owner, for errors and warnings: "the model".
        process_group: as the user has given it.
        ranks: found when the owner was made.

    Attributes:
        ranks: of the last call.
    """

    def __init__(
        self, what: str, process_group: ProcessGroup | bool | None, ranks: Ranks | None
    ) -> None:
        self._what, self.ranks = what, ranks
        # Only the default group has an obvious successor.
        self._by_default = process_group is None
        self._has_warned = False

    def current_ranks(self, leaves: int) -> Ranks | None:
        """The ranks of this call: of a new default group, if the last one was destroyed.

        Raises:
            RuntimeError: the group was destroyed, and there is no new one.
            ValueError: the new group's size does not divide the leaves.
        """
        if self.ranks is None:
            if self._by_default:
                self._warn_if_alone()
        elif not self.ranks.exists():
            if not self._by_default or not dist.is_initialized():
                raise RuntimeError(
                    f"the process group that {self._what} shares its batches by was destroyed "
                    "(destroy_process_group()): initialise a new one first, or make it anew with "
                    "process_group=False for this process alone"
                )
            self.ranks = find_ranks(None, leaves)
        return self.ranks

    def _warn_if_alone(self) -> None:
        """Warns, once, of several processes that do not share their batches."""
        if dist.is_available() and dist.is_initialized():
            if not self._has_warned and dist.get_world_size() > 1:
                self._has_warned = True
                _warn(
                    f"{self._what} was made before torch.distributed was initialised, so that each "
                    f"of the {dist.get_world_size()} processes is alone with its batches: call "
                    "init_process_group() first, and make it afterwards"
                )
            return
        for name in () if _warned_of_launchers else _LAUNCHERS:
            world = os.environ.get(name, "1")
            if world.isdigit() and int(world) > 1:
                _warned_of_launchers.add(name)
                _warn(
                    f"this process was launched as one of {world} ({name} is {world}), but "
                    f"torch.distributed is not initialised, so that each trains alone: call "
                    "torch.distributed.init_process_group() before the model and the loader are "
                    "made"
                )
                return

    def __deepcopy__(self, memo: dict[int, Any]) -> Membership:
        return Membership(self._what, None if self._by_default else False, self.ranks)


def _warn(text: str) -> None:
    text += "; or say process_group=False, if that is what you want"
    warnings.warn(text, UserWarning, stacklevel=users_level())
