"""What a logical worker has to know to go on in the middle of an epoch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch_spheres.loading.samples import Fetcher
from torch_spheres.loading.streams import numpy_state

__all__ = ["FAILED", "Snapshot", "has_position"]

FAILED = "failed"


def has_position(value: Any) -> bool:
    """Whether it can save where it is, as torchdata has it."""
    return callable(getattr(value, "state_dict", None)) and callable(
        getattr(value, "load_state_dict", None)
    )


@dataclass
class Snapshot:
    """After a task: random streams, and how far an iterable dataset has come."""

    fetched: int
    """Tasks that the worker has done in the epoch."""
    streams: dict[str, Any] | None
    holder: str
    """Whose `progress` is the state: the dataset's ``"iterator"``, the ``"dataset"``, or ``""``;
    `FAILED`: there should be one, and `progress` says what its ``state_dict()`` raised."""
    progress: Any = None

    @staticmethod
    def of(rng: Any, fetcher: Any, fetched: int) -> Snapshot:
        """On the worker's thread."""
        snapshot = Snapshot(fetched, None, "")
        if rng is not None:
            snapshot.streams = {
                "torch": rng.torch_generator.get_state(),
                "random": rng.random_generator.getstate(),
                "numpy": numpy_state(rng.numpy_generator),
            }
        iterator = getattr(fetcher, "dataset_iter", None)
        if iterator is None:  # map-style: the sampler's position is all there is
            return snapshot
        for holder, value in (("iterator", iterator), ("dataset", fetcher.dataset)):
            if has_position(value):
                try:
                    snapshot.holder, snapshot.progress = holder, copy.deepcopy(value.state_dict())
                except Exception as error:  # noqa: BLE001
                    # Whoever asks for the loader's state is told; nobody else needs it.
                    snapshot.holder, snapshot.progress = (
                        FAILED,
                        f"{type(value).__name__}: {error!r}",
                    )
                break
        return snapshot

    def restore(self, dataset: Any, make: Callable[[Any], Fetcher], samples: int) -> Fetcher:
        """What `make` makes of the dataset, where it was after the last task.

        By its own state, or else by dropping what each task took: so many samples.
        """
        if self.holder == "dataset":
            dataset.load_state_dict(copy.deepcopy(self.progress))
        fetcher = make(dataset)
        iterator: Any = getattr(fetcher.fetcher, "dataset_iter", None)
        if self.holder == "iterator":
            iterator.load_state_dict(copy.deepcopy(self.progress))
        elif self.holder == "" and iterator is not None:
            for _ in range(self.fetched * samples):
                next(iterator, None)
        return fetcher

    def restore_streams(self, rng: Any) -> None:
        """Last, because what was fetched once more has drawn from them."""
        if self.streams is None or rng is None:
            return
        rng.torch_generator.set_state(self.streams["torch"])
        rng.random_generator.setstate(self.streams["random"])
        rng.numpy_generator.set_state(self.streams["numpy"])

    def streams_only(self) -> Snapshot:
        """For a worker that has not gone on with its epoch when the next one begins."""
        return Snapshot(0, self.streams, "")
