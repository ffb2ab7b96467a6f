"""`Transport`: asynchronous collectives between the ranks of a process group, and waiting for them.

`group.Ranks` is one; `CheckedGather` and the tree all-reduce send by it. No wait is for ever: it
ends after the group's timeout, and Ctrl-C is answered.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from torch_spheres.distributed.failures import RollCall
from torch_spheres.distributed.p2p import P2PWork, WorkKeeper
from torch_spheres.errors import RankError

__all__ = ["ProcessGroup", "Transport"]

ProcessGroup = Any  # builds without torch.distributed lack torch's class
_POLL = datetime.timedelta(milliseconds=100)  # how often a wait lets Python answer Ctrl-C
_LARGE = 256 << 10  # bytes from which on the time of a message grows with its length
_TAGS = 1 << 20  # tags of point-to-point messages, which may be under way at once


class Transport:
    """Asynchronous collectives of one process group.

    All ranks call every method that sends, in the same order.

    Attributes:
        device: where tensors have to be to be sent.
        sent: bytes of tensors that this rank has sent to others.
    """

    def __init__(self, group: ProcessGroup | None, rank: int, world: int, name: str) -> None:
        self.group, self.rank, self.world = group, rank, world
        self._is_gloo, self.device = _backend_of(group)
        self.sent = 0
        self.roll_call = RollCall(name, rank, world)
        self._wait_numbers = itertools.count()  # the same on all ranks, for the roll call
        self._last_tag = 0
        self._works = WorkKeeper()
        self._divergence: tuple[str, tuple[int, ...]] | None = None

    # ---- collectives ----

    def gather_async(self, out: Tensor, given: Tensor) -> Any:
        """All-gathers `given` into `out`, by rank; returns a work for `wait`.

        `given` may be this rank's own slice of `out`.
        """
        self.sent += given.nbytes * (self.world - 1)
        if self._is_gloo and given.nbytes >= _LARGE:
            # Twice as fast as gloo's own, which sends to one rank after another.
            slices = out.view(self.world, -1)
            if slices[self.rank].data_ptr() != given.data_ptr():
                slices[self.rank].copy_(given)
            return self._exchange([given] * self.world, slices)
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        return self._works.keep(gather(out, given, group=self.group, async_op=True))

    def scatter_async(self, out: Tensor, given: Tensor) -> Any:
        """All-to-all: slice *r* of `given` goes to rank *r*; `out` gets every rank's slice for us.

        This rank's own slice may be left out of `out`. Returns a work for `wait`.
        """
        self.sent += given.nbytes // self.world * (self.world - 1)
        if self._is_gloo and given.nbytes >= _LARGE * self.world:
            return self._exchange(given.view(self.world, -1), out.view(self.world, -1))
        work = dist.all_to_all_single(out, given, group=self.group, async_op=True)
        return self._works.keep(work)

    def broadcast_async(self, tensor: Tensor) -> Any:
        """Broadcasts rank 0's `tensor` into everybody's; returns a work for `wait`."""
        work = dist.broadcast(tensor, group=self.group, async_op=True, group_src=0)
        return self._works.keep(work)

    def _exchange(
        self, sent: Sequence[Tensor] | Tensor, received: Sequence[Tensor] | Tensor
    ) -> P2PWork:
        """Sends one message to each other rank, and receives one from each."""
        self._last_tag = (self._last_tag + 1) % _TAGS  # several exchanges may be under way
        where: dict[str, Any] = {"group": self.group, "tag": self._last_tag}
        # Each rank begins with the next one, so that not all send to the same at once.
        others = [(self.rank + step) % self.world for step in range(1, self.world)]
        works = [dist.irecv(received[r], group_src=r, **where) for r in others]
        return P2PWork(works + [dist.isend(sent[r], group_dst=r, **where) for r in others])

    # ---- waiting, and what goes wrong ----

    def wait(self, works: Sequence[Any], what: str) -> None:
        """Waits until the works are done; `what` names them in errors.

        Raises:
            RankError: another rank has died or does not come.
        """
        number, has_said = next(self._wait_numbers), False
        for work in works:
            while self._is_gloo and not _ends_soon(work):
                if not has_said:  # a rank whose wait fails looks who waits as it does
                    has_said = True
                    self.roll_call.say_waiting(number)
            try:
                work.wait()
            except RuntimeError as error:
                raise self.roll_call.explained(error, what, number) from error

    @contextlib.contextmanager
    def sending(self, what: str) -> Iterator[None]:
        """Context in which messages are sent; a broken connection is a RankError there."""
        try:
            yield
        except RankError:
            raise
        except RuntimeError as error:
            number = next(self._wait_numbers)
            raise self.roll_call.explained(error, what, number) from error

    def raise_divergence(self, what: str, actions: Sequence[str]) -> NoReturn:
        """Raises, on all ranks, that they are about to do different things: `actions`, by rank.

        Raises:
            RankError: always; and from now on whenever something is about to be sent, since
                messages of ranks that have diverged would meet the wrong ones.
        """
        others = tuple(r for r, action in enumerate(actions) if action != actions[self.rank])
        shown = "; ".join(f"rank {r}: {action}" for r, action in enumerate(actions))
        text = (
            f"{what} failed: the ranks are about to do different things ({shown}). All have to "
            "call the models, their backward passes, loaders and checkpoints in the same order"
        )
        self._divergence = text, others
        raise RankError(text, others)

    def raise_if_diverged(self) -> None:
        """Raises the RankError of an earlier `raise_divergence` again."""
        if self._divergence is not None:
            text, ranks = self._divergence
            raise RankError(f"{text} (said before)", ranks)


def _ends_soon(work: Any) -> bool:
    """Waits a moment, in which Ctrl-C is not answered; whether the work has ended or failed."""
    try:
        work.wait(_POLL)
    except RuntimeError:  # it takes longer, or has failed
        return bool(work.is_completed())
    return True


def _backend_of(group: ProcessGroup | None) -> tuple[bool, torch.device]:
    """Whether gloo sends, and the device of tensors: the CPU if a backend of the group has it."""
    backends = dict(each.split(":") for each in dist.get_backend_config(group).split(","))
    if "cpu" not in backends:
        return False, torch.device("cuda")
    return backends["cpu"] == "gloo", torch.device("cpu")
