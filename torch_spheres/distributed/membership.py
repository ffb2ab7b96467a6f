"""Process groups that come and go: who was made before there was one, or after it has gone."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch.distributed as dist

from torch_spheres.distributed.group import ProcessGroup, Ranks, find_ranks
from torch_spheres.runtime.stack_level import users_level

__all__ = ["Membership"]

_LAUNCHERS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # torchrun's, Open MPI's, MPICH's
_told_of_launcher: set[str] = set()


class Membership:
    """A model's, or a loader's, part in a process group, from call to call.

    Args:
        what: for errors and warnings: "the model".
        process_group: as the user has given it.
        ranks: that were found when this was made.

    Attributes:
        ranks: whom the last call was shared with.
    """

    def __init__(
        self, what: str, process_group: ProcessGroup | bool | None, ranks: Ranks | None
    ) -> None:
        self._what, self.ranks = what, ranks
        # (A group of the user's own that is gone is not to be guessed at.)
        self._by_default = process_group is None
        self._told = False

    def look(self, leaves: int) -> Ranks | None:
        """Whom this call is shared with; others than at the last one, if there is a new group.

        Raises:
            RuntimeError: the group was destroyed, and there is no new one.
            ValueError: the new one's size does not divide the leaves.
        """
        if self.ranks is None:
            if self._by_default:
                self._warn_if_alone()
        elif not self.ranks.is_there():
            if not self._by_default or not dist.is_initialized():
                raise RuntimeError(
                    f"the process group that {self._what} shares its batches by was destroyed "
                    "(destroy_process_group()): initialise a new one first, or make it anew with "
                    "process_group=False for this process alone"
                )
            self.ranks = find_ranks(None, leaves)
        return self.ranks

    def _warn_if_alone(self) -> None:
        if dist.is_available() and dist.is_initialized():
            if not self._told and dist.get_world_size() > 1:
                self._told = True
                warnings.warn(
                    f"{self._what} was made before torch.distributed was initialised, so that each "
                    f"of the {dist.get_world_size()} processes is alone with its batches: call "
                    "init_process_group() first, and make it afterwards; or say "
                    "process_group=False, if that is what you want",
                    UserWarning,
                    stacklevel=users_level(),
                )
            return
        for name in () if _told_of_launcher else _LAUNCHERS:
            world = os.environ.get(name, "1")
            if world.isdigit() and int(world) > 1:
                _told_of_launcher.add(name)
                warnings.warn(
                    f"this process was launched as one of {world} ({name} is {world}), but "
                    f"torch.distributed is not initialised, so that each trains alone: call "
                    "torch.distributed.init_process_group() before the model and the loader are "
                    "made; or say process_group=False, if that is what you want",
                    UserWarning,
                    stacklevel=users_level(),
                )
                return

    def __deepcopy__(self, memo: dict[int, Any]) -> Membership:
        return Membership(self._what, None if self._by_default else False, self.ranks)
