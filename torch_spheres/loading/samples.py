"""Samples of a map-style dataset, one after another, on whatever thread."""

from __future__ import annotations

import atexit
import copy
import threading
from collections.abc import Sequence
from typing import Any

from torch_spheres import _compat, _core
from torch_spheres._core import Topology
from torch_spheres.errors import StoppedError
from torch_spheres.loading.info import Position, at
from torch_spheres.loading.portions import NoRows, without_rows

__all__ = ["Copies", "Fetcher", "has_getitems", "load", "place_of_thread"]


# Before the spheres are stopped at the end of the program, which waits for what they are at.
_ending = threading.Event()
atexit.register(_ending.set)


def has_getitems(dataset: Any) -> bool:
    """Whether the dataset gives whole batches, which torch's loader prefers."""
    return bool(getattr(dataset, "__getitems__", None))


def place_of_thread() -> str:
    """For notes on errors."""
    sphere = _core.current_sphere()
    return "in the caller's thread" if sphere < 0 else f"on sphere {Topology.path_string(sphere)}"


def load(dataset: Any, indices: Sequence[Any], position: Position, first: int = 0) -> list[Any]:
    """``[dataset[i] for i in indices]``; the first of them is so far into its batch."""
    samples = []
    # The loop's own thread goes on to the end, in functions called at exit too.
    ended = [_ending] if _core.current_sphere() >= 0 else []
    if position.over is not None:
        ended.append(position.over)
    for place, index in enumerate(indices, first):
        if any(event.is_set() for event in ended):
            raise StoppedError("nobody waits for this batch any more")
        # (0 is the batch as a whole.)
        position.place = 1 + (place if position.places is None else position.places[place])
        try:
            samples.append(dataset[index])
        except Exception as error:
            error.add_note(
                f"while loading dataset[{index!r}], sample {place} of batch {position.batch}, "
                f"{place_of_thread()}"
            )
            raise
    position.place = 0
    return samples


class Copies:
    """A dataset for each thread: a copy for each sphere, made when it first loads, or one for all.

    Args:
        copied: what to copy; None: nothing is.
        shared: what is used otherwise.
    """

    def __init__(self, copied: Any, shared: Any) -> None:
        self._copied, self._shared = copied, shared
        self._lock = threading.Lock()
        self._of: dict[int, Any] = {}  # sphere

    def here(self) -> Any:
        """For the calling thread."""
        if self._copied is None:
            return self._shared
        sphere = _core.current_sphere()
        with self._lock:
            if sphere not in self._of:
                self._of[sphere] = copy.deepcopy(self._copied)
            return self._of[sphere]


class Fetcher:
    """torch's fetchers, with notes on errors, and positions for `sample_seed`."""

    def __init__(
        self, kind: int, dataset: Any, auto_collation: bool, collate_fn: Any, drop_last: bool
    ) -> None:
        self._dataset, self._collate_fn = dataset, collate_fn
        self._one_by_one = (
            kind == _compat.DatasetKind.Map and auto_collation and not has_getitems(dataset)
        )
        self.fetcher: Any = _compat.DatasetKind.create_fetcher(
            kind, dataset, auto_collation, collate_fn, drop_last
        )

    def fetch(self, index: Any, position: Position) -> Any:
        """The batch, or the sample, of what the sampler gave."""
        with at(position):
            samples = load(self._dataset, index, position) if self._one_by_one else None
            try:
                batch = self.fetcher.fetch(index) if samples is None else self._collate_fn(samples)
                return without_rows(batch) if type(index) is NoRows else batch
            except StopIteration:
                raise
            except Exception as error:
                error.add_note(f"while loading batch {position.batch}, {place_of_thread()}")
                raise
