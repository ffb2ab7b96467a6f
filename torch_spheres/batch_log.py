"""Which batches this process's loaders have handed out, to be compared between ranks.

Each rank cuts its own rows out of the whole batch's index list, so the lists have to be the same on
all of them: a sampler that shuffles by Python's or numpy's generators, unseeded or seeded by rank,
would have rows used twice and others never. Loaders that share their batches keep checksums of the
lists here, and the next call of a model compares them, in a message that is sent anyway.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import deque
from collections.abc import Sequence

__all__ = ["BatchLog", "EpochLog"]

_BACK = 16  # batches by which a rank may be ahead of another
_EPOCHS = 3  # that are compared at a time: of the loaders that handed out a batch last
_PLACES = 3 + _BACK


class EpochLog:
    """One pass over a loader.

    Args:
        number: of it, the same on all ranks, and not 0.
    """

    def __init__(self, number: int) -> None:
        self.number, self.count = number, 0
        self.digests: deque[int] = deque(maxlen=_BACK)  # of all lists up to each of the last
        self.thread = 0  # that asked for the last one
        self.turn = 0  # of the log, when that was

    def numbers(self) -> list[int]:
        """`_PLACES` integers."""
        is_here = self.thread == threading.get_ident()
        found = [*self.digests]
        return [self.number, self.count, is_here, *[-1] * (_BACK - len(found)), *found]


class BatchLog:
    """Of all loaders that share their batches with the same ranks."""

    def __init__(self) -> None:
        self._epochs: weakref.WeakSet[EpochLog] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._numbers, self._turns = itertools.count(1), itertools.count(1)
        self._seen = 0
        self._latest = (0, -1)  # the thread that got the last batch, and the digest up to that

    def begin(self, number: int | None = None) -> EpochLog:
        """A new epoch, of that number; None: all ranks begin it together, and so in one order."""
        epoch = EpochLog(next(self._numbers) if number is None else number)
        with self._lock:
            self._epochs.add(epoch)
        return epoch

    def handed_out(self, epoch: EpochLog, count: int, digest: int) -> None:
        """The loop gets batch `count` of an epoch, counted from 1; `digest` is of all up to it."""
        epoch.count, epoch.thread, epoch.turn = count, threading.get_ident(), next(self._turns)
        epoch.digests.append(digest)
        self._latest = epoch.thread, digest

    def numbers(self) -> list[int]:
        """For the ranks' comparison; always as many. On the thread that calls the model."""
        with self._lock:
            begun = [epoch for epoch in self._epochs if epoch.turn > 0]
        latest = sorted(begun, key=lambda epoch: epoch.turn)[-_EPOCHS:]
        found = [n for epoch in latest for n in epoch.numbers()]
        return [*found, *[0] * (_EPOCHS * _PLACES - len(found))]

    @property
    def latest(self) -> int:
        """Of the index lists of its epoch up to the last batch; -1: another thread has got that."""
        thread, digest = self._latest
        return digest if thread == threading.get_ident() else -1

    def forget(self) -> None:
        """What has been found to differ is not said again when another epoch begins."""
        self._latest = (0, -1)

    @property
    def moved(self) -> bool:
        """Whether batches were handed out since this was asked for last."""
        with self._lock:
            latest = max((epoch.turn for epoch in self._epochs), default=0)
        moved, self._seen = latest > self._seen, latest
        return moved

    @staticmethod
    def compare(table: Sequence[Sequence[int]]) -> str | None:
        """What is wrong, if anything: from every rank's `numbers`."""
        by_rank = []
        for numbers in table:
            epochs = [numbers[i : i + _PLACES] for i in range(0, len(numbers), _PLACES)]
            by_rank.append({epoch[0]: epoch[1:] for epoch in epochs if epoch[0]})
        for number in sorted(set().union(*by_rank)):
            there = {
                rank: epochs[number] for rank, epochs in enumerate(by_rank) if number in epochs
            }
            if wrong := _compare(there):
                return wrong
        return None


def _compare(there: dict[int, Sequence[int]]) -> str | None:
    counts = {rank: numbers[0] for rank, numbers in there.items()}
    least, most = min(counts.values()), max(counts.values())
    # (A thread of the user's own may fetch batches ahead of the loop, on each rank as it likes.)
    in_the_loop = all(numbers[1] for numbers in there.values())
    if most - least >= _BACK or (in_the_loop and most > least):
        shown = ", ".join(f"rank {rank} has had {count}" for rank, count in counts.items())
        return (
            f"the ranks are at different batches of an epoch ({shown}): one of them has skipped a "
            "step, or taken a batch more. All have to call the model for the same batches"
        )
    digests = {rank: numbers[-1 - (numbers[0] - least)] for rank, numbers in there.items()}
    if len({*digests.values()} - {-1}) > 1:
        kinds = {
            digest: [r for r, d in digests.items() if d == digest] for digest in digests.values()
        }
        shown = " and ".join(f"ranks {ranks}" for ranks in kinds.values())
        return (
            f"the index lists of batch {least - 1} of an epoch, or of one before it, differ "
            f"between {shown}, so that rows would be used twice and others never: shuffle by "
            "torch's generator (shuffle=True), or give the sampler one that is seeded alike on all "
            "ranks; Python's random and numpy.random are seeded by each process for itself"
        )
    return None
