"""Processes that share a batch, and how they talk. Who has which rows: see division.py."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import pickle
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from torch_spheres import _compat
from torch_spheres.distributed.batch_log import BatchLog
from torch_spheres.distributed.failures import leave_last_words
from torch_spheres.distributed.handshake import Meeting
from torch_spheres.distributed.p2p import Swap, Works
from torch_spheres.errors import Caught, RankError
from torch_spheres.reduction.partition import Division, divide, tree_leaves, way_out

__all__ = ["ProcessGroup", "Ranks", "draw_alone", "find_ranks", "this_rank"]

ProcessGroup = Any  # torch's class is not there in builds without torch.distributed
_LOOK = datetime.timedelta(milliseconds=100)  # between two looks for Ctrl-C
_LARGE = 256 << 10  # bytes of a message from which on what it takes is its length
_TAGS = 1 << 20  # of messages that may be under way at once
_ROLL_CALL = 3.0  # seconds in which a rank that waits as we do says so


def this_rank(process_group: ProcessGroup | bool | None) -> tuple[int, int]:
    """The rank of this process in a group, and how many there are; alone, 0 of 1.

    Args:
        process_group: None: torch's default group, if there is one. False: no other process.

    Raises:
        TypeError: it is no process group.
        ValueError: this process is not in it, or there are no groups without torch.distributed.
    """
    if process_group is False:
        return 0, 1
    if not dist.is_available() or not dist.is_initialized():
        if process_group is not None:
            raise ValueError(
                f"process_group={process_group!r} without torch.distributed: call "
                "torch.distributed.init_process_group() first"
            )
        return 0, 1
    if process_group == dist.GroupMember.NON_GROUP_MEMBER:  # what new_group() gives to others
        raise ValueError("this process is not in its process_group")
    if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            "process_group must be a torch.distributed.ProcessGroup, None for the default one, or "
            f"False for none, got {process_group!r}"
        )
    return dist.get_rank(process_group), dist.get_world_size(process_group)


def find_ranks(process_group: ProcessGroup | bool | None, shards: int = 0) -> Ranks | None:
    """The ranks that a batch is divided over; None if this process has it alone.

    Args:
        process_group: as of `this_rank`.
        shards: of a batch, which the ranks share evenly: as many as the hierarchy has leaves, or
            fewer; 0: any number of ranks will do.

    Raises:
        TypeError: it is no process group.
        ValueError: this process is not in it, or its size does not divide the shards.
    """
    _, world = this_rank(process_group)
    if world == 1:
        return None
    if shards % world:  # (nothing divides 0 unevenly)
        what = "leaves" if tree_leaves(shards) == shards else "shards"
        raise ValueError(
            f"{world} processes cannot share the {what} ({shards}) evenly: "
            f"{way_out(world, shards)}, or choose so many by process_group="
        )
    # One for all parts of a program: they talk in the same order on all ranks.
    group = dist.group.WORLD if process_group is None else process_group
    known = _live.get(group)
    if known is None:
        known = _live[group] = Ranks(process_group)
    return known


def draw_alone() -> None:
    """A loader of this process alone begins an epoch, which draws from the default generator."""
    for ranks in list(_live.values()):
        ranks.draws_alone, ranks.loads_portions = True, False


class Ranks:
    """One process among those that share a batch, and how they talk.

    Every method that talks is called by all ranks, in the same order; none waits for ever: not
    longer than the group's timeout, and Ctrl-C is answered.
    """

    def __init__(self, group: ProcessGroup | None) -> None:
        self.group = group
        _compat.require(_compat.RANKS)
        self.rank, self.world = this_rank(group)
        self._is_gloo, self.device = _backend_of(group)
        self.told = self.told_of_lists = False  # warnings, once
        self.batches = BatchLog()  # that loaders have handed out
        self.draws_alone = False  # a loader of this process alone, since an epoch began
        self.loads_portions = False  # whether the last batch was this rank's part of one
        self._loads_for = 0  # leaves of the loader that handed it out
        self.models = itertools.count(1)  # that share their batches
        self.samplers = itertools.count(1)
        self.sent = 0  # bytes of tensors that this rank has sent to others
        self._whole = weakref.ref(dist.group.WORLD if group is None else group)
        name = getattr(self._whole(), "group_name", "")
        _made[name] += 1  # (a later group may have the name, and the store, of an earlier one)
        self._name = f"torch_spheres/{name}/{_made[name]}"
        self._meetings = itertools.count()
        self._swaps = 0
        self._works = Works()
        self._parted: tuple[str, tuple[int, ...]] | None = None
        leave_last_words(_live_ranks)

    def loaded(self, leaves: int) -> None:
        """A loader that divides over so many leaves has handed out this rank's part of a batch."""
        global _latest
        self.loads_portions, self._loads_for = True, leaves
        _latest = weakref.ref(self)

    @staticmethod
    def take_latest_loader() -> tuple[Ranks, int] | None:
        """Who shared the last batch, and over how many leaves; None: there was none since."""
        global _latest
        ranks, _latest = None if _latest is None else _latest(), None
        return None if ranks is None or not ranks.is_there() else (ranks, ranks._loads_for)

    def is_there(self) -> bool:
        """Whether the group has not been destroyed."""
        if self.group is None:
            return dist.is_initialized() and dist.group.WORLD is self._whole()
        try:
            return dist.get_rank(self.group) >= 0
        except (ValueError, RuntimeError):
            return False

    def divide(self, shards: int) -> Division:
        """Which of so many shards each rank owns."""
        return divide(self.world, shards)

    # ---- talk ----

    def gather_async(self, out: Tensor, given: Tensor) -> list[Any]:
        """Every rank's `given`, one after another, in `out`; to be waited for.

        `given` may be its own place in `out`.
        """
        self.sent += given.nbytes * (self.world - 1)
        if self._is_gloo and given.nbytes >= _LARGE:
            # Twice as fast as gloo's own, which takes what it has to one rank after another.
            slices = out.view(self.world, -1)
            if slices[self.rank].data_ptr() != given.data_ptr():
                slices[self.rank].copy_(given)
            return [self._swap([given] * self.world, slices)]
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        return [self._works.hold(gather(out, given, group=self.group, async_op=True))]

    def scatter_async(self, out: Tensor, given: Tensor) -> list[Any]:
        """Part *r* of `given` to rank *r*; `out` has what each rank had for this one.

        (But for its own part, which may be left where it is.)
        """
        self.sent += given.nbytes // self.world * (self.world - 1)
        if self._is_gloo and given.nbytes >= _LARGE * self.world:
            return [self._swap(given.view(self.world, -1), out.view(self.world, -1))]
        work = dist.all_to_all_single(out, given, group=self.group, async_op=True)
        return [self._works.hold(work)]

    def _swap(self, sent: Sequence[Tensor] | Tensor, received: Sequence[Tensor] | Tensor) -> Swap:
        """One message to each of the others, and one from each."""
        self._swaps = (self._swaps + 1) % _TAGS  # a tag of its own: several may be under way
        where: dict[str, Any] = {"group": self.group, "tag": self._swaps}
        # Beginning with the next rank: not all send to the same at once.
        others = [(self.rank + step) % self.world for step in range(1, self.world)]
        works = [dist.irecv(received[r], group_src=r, **where) for r in others]
        return Swap(works + [dist.isend(sent[r], group_dst=r, **where) for r in others])

    def wait(self, works: Sequence[Any], what: str) -> None:
        """Until they are done.

        Raises:
            RankError: another rank failed them.
        """
        number, told = next(self._meetings), False
        for work in works:
            while self._is_gloo and not _ends_soon(work):
                if not told:  # so that a rank whose wait fails knows who waits as it does
                    told = True
                    self.say("waits", str(number))
            try:
                work.wait()
            except RuntimeError as error:
                self._explain(error, what, number)

    def gather(self, values: Tensor, what: str) -> Tensor:
        """Every rank's values, of one shape: a row for each rank, on the CPU."""
        given = values.detach().cpu().contiguous()
        rows = Meeting(self, what, given.reshape(-1).view(torch.uint8)).finish()
        sizes = [len(row) for row in rows]
        if len({*sizes}) > 1:
            self.part(what, [f"{what} of {size} bytes" for size in sizes])
        # Copied to where memory is aligned for every type.
        return torch.stack(rows).view(given.dtype).view(self.world, *given.shape)

    def need_together(self) -> None:
        """Before anything is said: once apart, messages would meet the wrong ones.

        Raises:
            RankError: the ranks have done different things.
        """
        if self._parted is not None:
            text, ranks = self._parted
            raise RankError(f"{text} (said before)", ranks)

    def part(self, what: str, texts: list[str]) -> NoReturn:
        """The ranks are about to do different things, each what its text says.

        Raises:
            RankError: always.
        """
        others = tuple(r for r, text in enumerate(texts) if text != texts[self.rank])
        told = "; ".join(f"rank {r}: {text}" for r, text in enumerate(texts))
        text = (
            f"{what} failed: the ranks are about to do different things ({told}). All have to call "
            "the models, their backward passes, loaders and checkpoints in the same order"
        )
        self._parted = text, others
        raise RankError(text, others)

    @contextlib.contextmanager
    def explaining(self, what: str) -> Iterator[None]:
        """A block in which messages are sent: a connection may be gone by then."""
        try:
            yield
        except RankError:
            raise
        except RuntimeError as error:
            self._explain(error, what, next(self._meetings))

    def objects(self, value: Any, what: str) -> list[Any]:
        """Every rank's value, pickled; for what is said seldom."""
        mine = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        rows = Meeting(self, what, mine).finish()
        with (
            warnings.catch_warnings()
        ):  # (torch's tree specs warn of themselves when they are read)
            warnings.simplefilter("ignore", FutureWarning)
            return [pickle.loads(row.numpy().data) for row in rows]  # from our own ranks

    def broadcast(self, tensors: Sequence[Tensor], what: str) -> None:
        """Rank 0's values, into everybody's tensors."""
        self.need_together()
        for tensor in tensors:
            with torch.no_grad():
                sent = tensor.detach().to(self.device).contiguous()
                with self.explaining(what):
                    work = dist.broadcast(sent, group=self.group, async_op=True, group_src=0)
                self.wait([self._works.hold(work)], what)
                if self.rank > 0:
                    tensor.copy_(sent)

    def meet(self, what: str, values: Sequence[int], caught: Caught | None = None) -> Tensor:
        """Every rank's numbers, one row each, unless one of them has an error.

        Raises:
            RankError: another rank has.
            BaseException: this rank has, once the others know.
        """
        caught = caught or Caught()
        told = torch.tensor([caught.error is not None, *values], dtype=torch.int64)
        rows = self.gather(told, what)
        if rows[:, 0].any():
            self.raise_errors(what, caught)
        return rows[:, 1:]

    def raise_errors(self, what: str, caught: Caught) -> NoReturn:
        """When all know that one of them has an error: they learn which.

        Raises:
            RankError: another rank has one.
            BaseException: this rank's own.
        """
        described = None
        if caught.error is not None:
            described = f"{type(caught.error).__name__}: {caught.error}"
        errors = dict(enumerate(self.objects(described, what)))
        failed = {r: text for r, text in errors.items() if text is not None}
        caught.raise_if_any()
        texts = "; ".join(f"rank {r} of {self.world}: {text}" for r, text in failed.items())
        raise RankError(f"{what} failed on {texts}", tuple(failed))

    # ---- when it goes wrong ----

    def say(self, what: str, text: str) -> None:
        """Leaves a text for those who wait for this rank: "waits" for which meeting, or "ends"."""
        with contextlib.suppress(RuntimeError):  # a store that is gone: the wait will fail too
            _compat.default_store().set(f"{self._name}/{what}/{self.rank}", text)

    def _said(self, what: str, rank: int) -> str:
        store, key = _compat.default_store(), f"{self._name}/{what}/{rank}"
        return str(store.get(key), "utf-8") if store.check([key]) else ""

    def _explain(self, error: RuntimeError, what: str, number: int) -> NoReturn:
        """Raises RankError with who is missing."""
        self.say("waits", str(number))
        others = [r for r in range(self.world) if r != self.rank]
        missing = [r for r in others if not self._waits(number, r)]
        who = "rank" if len(missing) == 1 else "ranks"
        names = ", ".join(map(str, missing))
        absent = f": {who} {names} of {self.world} did not come to it" if missing else ""
        causes = []
        with contextlib.suppress(RuntimeError):
            causes = [f"rank {r}: {text}" for r in missing if (text := self._said("ends", r))]
        because = f" ({'; '.join(causes)})" if causes else ", having died, hung or gone elsewhere"
        raise RankError(
            f"{what} failed on rank {self.rank}{absent}{because if missing else ''}; "
            f"torch says: {str(error).strip().splitlines()[0]}",
            tuple(missing),
        ) from error

    def _waits(self, number: int, rank: int) -> bool:
        end = time.monotonic() + _ROLL_CALL
        with contextlib.suppress(RuntimeError):
            while time.monotonic() < end:
                if int(self._said("waits", rank) or -1) >= number:
                    return True
                if self._said("ends", rank):
                    return False
                time.sleep(0.05)
        return False


def _ends_soon(work: Any) -> bool:
    """Whether it is done or has failed within a moment, in which Ctrl-C is not answered."""
    try:
        work.wait(_LOOK)
    except RuntimeError:  # that it took too long, or that it has failed
        return bool(work.is_completed())
    return True


_latest: weakref.ref[Ranks] | None = None  # whose batch a loader has handed out last
_made: Counter[str] = Counter()  # by the group's name
_live: weakref.WeakKeyDictionary[Any, Ranks] = weakref.WeakKeyDictionary()  # by group


def _live_ranks() -> list[Ranks]:
    return list(_live.values())


def _backend_of(group: ProcessGroup | None) -> tuple[bool, torch.device]:
    """Whether messages go by gloo, and where they have to be: on the CPU if it has a way there."""
    backends = dict(each.split(":") for each in dist.get_backend_config(group).split(","))
    if "cpu" not in backends:
        return False, torch.device("cuda")
    return backends["cpu"] == "gloo", torch.device("cpu")
