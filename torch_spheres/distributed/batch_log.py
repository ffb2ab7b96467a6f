"""Which batches this process's loaders have handed out, to be compared between ranks.

Each rank cuts its own rows out of the whole batch's index list, so the lists have to be the same on
all of them: a sampler that shuffles by Python's or numpy's generators, unseeded or seeded by rank,
would have rows used twice and others never. Loaders that share their batches keep checksums of the
lists here, and the next call of a model compares them, in a message that is sent anyway.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Sequence

__all__ = ["BatchLog", "EpochLog"]

_BACK = 16  # batches by which a rank may be ahead of another
_EPOCHS = 4  # that are compared at a time: those that began last
_PLACES = 3 + _BACK


class _Thread(threading.local):
    """A thread's mark: idents are given again to later threads."""

    def __init__(self) -> None:
        self.mark = object()


_thread = _Thread()


def _this_thread() -> object:
    return _thread.mark


class EpochLog:
    """One pass over a loader.

    Args:
        number: of it, the same on all ranks, and not 0.
    """

    def __init__(self, number: int) -> None:
        self.number, self.count = number, 0
        self.digests: deque[int] = deque(maxlen=_BACK)  # of all lists up to each of the last
        self.thread = _this_thread()  # that asked for the last one

    def numbers(self, is_latest: bool) -> list[int]:
        """`_PLACES` integers; `is_latest`: the loop's last batch was from it."""
        found = [*self.digests]
        return [self.number, self.count, is_latest, *[-1] * (_BACK - len(found)), *found]


class BatchLog:
    """Of all loaders that share their batches with the same ranks."""

    def __init__(self) -> None:
        self._epochs: deque[EpochLog] = deque(maxlen=_EPOCHS)
        self._numbers = itertools.count(1)
        self._turn = self._seen = 0  # batches
        self._latest: EpochLog | None = None  # from which the last batch was

    def begin(self, number: int | None = None) -> EpochLog:
        """A new epoch, of that number; None: all ranks begin it together, and so in one order."""
        epoch = EpochLog(next(self._numbers) if number is None else number)
        self._epochs.append(epoch)
        return epoch

    def handed_out(self, epoch: EpochLog, count: int, digest: int) -> None:
        """The loop gets batch `count` of an epoch, counted from 1; `digest` is of all up to it."""
        epoch.count, epoch.thread = count, _this_thread()
        epoch.digests.append(digest)
        if epoch not in self._epochs:
            self._epochs.append(epoch)
        self._turn += 1
        self._latest = epoch

    def numbers(self) -> list[int]:
        """For the ranks' comparison; always as many. On the thread that calls the model."""
        # (A thread of the user's own may fetch ahead of the loop, on each rank as it likes.)
        latest = self._latest
        if latest is not None and latest.thread is not _this_thread():
            latest = None
        found = [n for epoch in list(self._epochs) for n in epoch.numbers(epoch is latest)]
        # (Nor do all ranks have to make as many samplers, which have negative numbers.)
        number = 0 if latest is None else max(0, latest.number)
        return [number, *found, *[0] * (_EPOCHS * _PLACES - len(found))]

    @property
    def latest(self) -> tuple[int, int]:
        """How many batches the last one's epoch has had, and the digest of all up to that.

        (-1, -1): there was none, or another thread has got it.
        """
        epoch = self._latest
        if epoch is None or epoch.thread is not _this_thread():
            return -1, -1
        return epoch.count, epoch.digests[-1]

    def forget(self) -> None:
        """What has been found to differ is not said again of other epochs."""
        self._latest = None
        self._epochs.clear()

    @property
    def moved(self) -> bool:
        """Whether batches were handed out since this was asked for last."""
        moved, self._seen = self._turn > self._seen, self._turn
        return moved

    @property
    def ever(self) -> bool:
        """Whether any batch has been handed out."""
        return self._turn > 0

    @staticmethod
    def compare(table: Sequence[Sequence[int]]) -> str | None:
        """What is wrong, if anything: from every rank's `numbers`."""
        by_rank = []
        for numbers in table:
            epochs = [numbers[i : i + _PLACES] for i in range(1, len(numbers), _PLACES)]
            by_rank.append({epoch[0]: epoch[1:] for epoch in epochs if epoch[0]})
        latest = {numbers[0] for numbers in table}
        if len(latest) > 1 and 0 not in latest:
            return (
                "the ranks' last batches are of different epochs, or loaders: all have to take "
                "batches from the same ones, in the same order"
            )
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
    if most > least and all(numbers[1] for numbers in there.values()):
        shown = ", ".join(f"rank {rank} has had {count}" for rank, count in counts.items())
        return (
            f"the ranks are at different batches of an epoch ({shown}): one of them has skipped a "
            "step, or taken a batch more. All have to call the model for the same batches"
        )
    if most - least >= _BACK or least == 0:  # one has left the epoch, or not begun it
        return None
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
