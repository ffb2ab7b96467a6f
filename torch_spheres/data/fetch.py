"""`Fetcher`: loads a batch by torch's fetcher, on whatever thread calls it."""

from __future__ import annotations

import threading
from typing import Any

from torch_spheres import _compat
from torch_spheres.data.empty_slice import EmptySlice, without_rows
from torch_spheres.data.worker_info import LoadPosition, thread_shows
from torch_spheres.errors import StoppedError

__all__ = ["Fetcher"]


class Fetcher:
    """Torch's fetcher, with notes on errors, and positions for `sample_seed`."""

    def __init__(
        self, kind: int, auto_collation: bool, collate_fn: Any, drop_last: bool, dataset: Any
    ) -> None:
        self._dataset, self._collate_fn = dataset, collate_fn
        self._has_index_lists = kind == _compat.DatasetKind.Map and auto_collation
        self.fetcher: Any = _compat.DatasetKind.create_fetcher(
            kind, dataset, auto_collation, collate_fn, drop_last
        )

    def fetch(self, index: Any, position: LoadPosition) -> Any:
        """The batch, or the sample, of what the sampler gave."""
        with thread_shows(position=position):
            # Torch's fetcher prefers `__getitems__`, too.
            one_by_one = self._has_index_lists and not getattr(self._dataset, "__getitems__", None)
            samples = self._samples(index, position) if one_by_one else None
            try:
                batch = self.fetcher.fetch(index) if samples is None else self._collate_fn(samples)
                return without_rows(batch) if type(index) is EmptySlice else batch
            except StopIteration:
                raise
            except Exception as error:
                _add_note(error, f"batch {position.batch}")
                raise

    def _samples(self, index: Any, position: LoadPosition) -> list[Any]:
        samples = []
        for k, key in enumerate(index):
            if position.abandoned is not None and position.abandoned.is_set():
                raise StoppedError("nobody waits for this batch any more")
            position.seed_index = 1 + (k if position.rows is None else position.rows[k])
            try:
                samples.append(self._dataset[key])
            except Exception as error:
                _add_note(error, f"dataset[{key!r}], sample {k} of batch {position.batch}")
                raise
        position.seed_index = 0
        return samples


def _add_note(error: Exception, what: str) -> None:
    name = threading.current_thread().name
    where = f"in {name}" if name.startswith("loader worker ") else "in the caller's thread"
    error.add_note(f"while loading {what}, {where}")
