"""`BatchLog`: checksums of the batches that loaders have handed out, to compare between ranks.

Each rank takes its rows out of the whole batch's index list, so all ranks need the same lists: with
a sampler that shuffles by Python's or numpy's generators, some rows would be used twice and others
never. Loaders and samplers that share their batches log checksums of the lists here, and the next
call of a model compares them in a message that is sent anyway.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Sequence

__all__ = ["BatchLog", "EpochLog"]

_BACK = 16  # batches by which a rank may be ahead of another
_EPOCHS = 4  # that are compared: those that began last
_INTEGERS = 3 + _BACK  # of an epoch


class _Thread(threading.local):
    """An object for each thread; the system gives a finished thread's ident to later ones."""

    def __init__(self) -> None:
        self.mark = object()


_thread = _Thread()


class EpochLog:
    """One pass over a loader.

    Args:
        number: of the epoch, the same on all ranks, and not 0.
    """

    def __init__(self, number: int) -> None:
        self.number, self.count = number, 0
        self.digests: deque[int] = deque(maxlen=_BACK)  # item: of all lists up to that batch
        self.thread = _thread.mark  # that took the last batch

    def integers(self, is_latest: bool) -> list[int]:
        """`_INTEGERS` of them; `is_latest`: the loop's last batch is from this epoch."""
        unused = [-1] * (_BACK - len(self.digests))
        return [self.number, self.count, is_latest, *unused, *self.digests]


class BatchLog:
    """The batches of all loaders that share them with the same ranks."""

    def __init__(self) -> None:
        self._epochs: deque[EpochLog] = deque(maxlen=_EPOCHS)
        self._numbers = itertools.count(1)
        self._count = self._seen = 0  # batches
        self._latest: EpochLog | None = None  # of the last batch

    def begin_epoch(self, number: int | None = None) -> EpochLog:
        """A new epoch; `number` may be None where all ranks begin their epochs in one order."""
        epoch = EpochLog(next(self._numbers) if number is None else number)
        self._epochs.append(epoch)
        return epoch

    def add_batch(self, epoch: EpochLog, count: int, digest: int) -> None:
        """The loop gets batch `count` of an epoch, from 1; `digest` is of all lists up to it."""
        epoch.count, epoch.thread = count, _thread.mark
        epoch.digests.append(digest)
        if epoch not in self._epochs:
            self._epochs.append(epoch)
        self._count += 1
        self._latest = epoch

    def integers(self) -> list[int]:
        """The log for `compare`, always of one length; on the thread that calls the model."""
        # A thread of the user's own may fetch ahead of the loop, differently on each rank.
        latest = self._latest_here()
        found = [n for epoch in list(self._epochs) for n in epoch.integers(epoch is latest)]
        # Samplers have negative numbers: the ranks need not make equally many of them.
        number = 0 if latest is None else max(0, latest.number)
        return [number, *found, *[0] * (_EPOCHS * _INTEGERS - len(found))]

    def _latest_here(self) -> EpochLog | None:
        """The epoch of the last batch; None if there was none, or another thread took it."""
        latest = self._latest
        return None if latest is None or latest.thread is not _thread.mark else latest

    @property
    def latest(self) -> tuple[int, int]:
        """How many batches the last one's epoch has had, and the digest of all their lists.

        (-1, -1) if there was no batch, or another thread took it.
        """
        epoch = self._latest_here()
        return (-1, -1) if epoch is None else (epoch.count, epoch.digests[-1])

    def forget(self) -> None:
        """Forgets all epochs, so that a difference is an error only once."""
        self._latest = None
        self._epochs.clear()

    @property
    def has_new_batches(self) -> bool:
        """Whether batches were added since this was read last."""
        has_new, self._seen = self._count > self._seen, self._count
        return has_new

    @property
    def has_batches(self) -> bool:
        """Whether any batch was added."""
        return self._count > 0

    @staticmethod
    def compare(table: Sequence[Sequence[int]]) -> str | None:
        """What differs between the ranks, for an error; from every rank's `integers`."""
        by_rank = []
        for integers in table:
            epochs = [integers[i : i + _INTEGERS] for i in range(1, len(integers), _INTEGERS)]
            by_rank.append({epoch[0]: epoch[1:] for epoch in epochs if epoch[0]})
        latest = {integers[0] for integers in table}
        if len(latest) > 1 and 0 not in latest:
            return (
                "the ranks' last batches are of different epochs, or loaders: all have to take "
                "batches from the same ones, in the same order"
            )
        for number in sorted(set().union(*by_rank)):
            there = {r: epochs[number] for r, epochs in enumerate(by_rank) if number in epochs}
            if wrong := _compare_epoch(there):
                return wrong
        return None


def _compare_epoch(there: dict[int, Sequence[int]]) -> str | None:
    """What differs in an epoch between the ranks that have it: count, is_latest and digests."""
    counts = {rank: integers[0] for rank, integers in there.items()}
    least, most = min(counts.values()), max(counts.values())
    if most > least and all(integers[1] for integers in there.values()):
        shown = ", ".join(f"rank {rank} has had {count}" for rank, count in counts.items())
        return (
            f"the ranks are at different batches of an epoch ({shown}): one of them has skipped a "
            "step, or taken a batch more. All have to call the model for the same batches"
        )
    if most - least >= _BACK or least == 0:  # a rank has left the epoch, or not begun it
        return None
    # Those of the last batch that all ranks have had.
    digests = {rank: integers[-1 - (integers[0] - least)] for rank, integers in there.items()}
    if len({*digests.values()} - {-1}) > 1:
        ranks_of = {d: [r for r in digests if digests[r] == d] for d in digests.values()}
        shown = " and ".join(f"ranks {ranks}" for ranks in ranks_of.values())
        return (
            f"the index lists of batch {least - 1} of an epoch, or of one before it, differ "
            f"between {shown}, so that rows would be used twice and others never: shuffle by "
            "torch's generator (shuffle=True), or give the sampler one that is seeded alike on all "
            "ranks; Python's random and numpy.random are seeded by each process for itself"
        )
    return None
