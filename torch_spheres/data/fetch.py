"""torch's fetchers, on whatever thread."""

from __future__ import annotations

import threading
from typing import Any

from torch_spheres import _compat
from torch_spheres.data.rank_slice import NoRows, without_rows
from torch_spheres.data.worker_info import Position, shown
from torch_spheres.errors import StoppedError

__all__ = ["Fetcher"]


class Fetcher:
    """torch's fetchers, with notes on errors, and positions for `sample_seed`."""

    def __init__(
        self, kind: int, auto_collation: bool, collate_fn: Any, drop_last: bool, dataset: Any
    ) -> None:
        self._dataset, self._collate_fn = dataset, collate_fn
        self._lists = kind == _compat.DatasetKind.Map and auto_collation
        self.fetcher: Any = _compat.DatasetKind.create_fetcher(
            kind, dataset, auto_collation, collate_fn, drop_last
        )

    def fetch(self, index: Any, position: Position) -> Any:
        """The batch, or the sample, of what the sampler gave."""
        with shown(position=position):
            # torch's fetcher prefers datasets that give whole batches, too.
            one_by_one = self._lists and not getattr(self._dataset, "__getitems__", None)
            samples = self._samples(index, position) if one_by_one else None
            try:
                batch = self.fetcher.fetch(index) if samples is None else self._collate_fn(samples)
                return without_rows(batch) if type(index) is NoRows else batch
            except StopIteration:
                raise
            except Exception as error:
                error.add_note(f"while loading batch {position.batch}, {_place_of_thread()}")
                raise

    def _samples(self, index: Any, position: Position) -> list[Any]:
        samples = []
        for place, row in enumerate(index):
            if position.over is not None and position.over.is_set():
                raise StoppedError("nobody waits for this batch any more")
            # (0 is the batch as a whole.)
            position.place = 1 + (place if position.places is None else position.places[place])
            try:
                samples.append(self._dataset[row])
            except Exception as error:
                error.add_note(
                    f"while loading dataset[{row!r}], sample {place} of batch {position.batch}, "
                    f"{_place_of_thread()}"
                )
                raise
        position.place = 0
        return samples


def _place_of_thread() -> str:
    """For notes on errors."""
    name = threading.current_thread().name
    return f"in {name}" if name.startswith("loader worker ") else "in the caller's thread"
