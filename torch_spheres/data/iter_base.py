"""`SphereIterator`: what both iterators of a wrapped loader have in common.

Draws, sampler, warnings and length are those of torch's base iterator. This class adds resumption,
the rank's slice of each batch, and the figures of `LoaderStats`.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import DataLoader

from torch_spheres import _compat, _core
from torch_spheres.data.device_transfer import DeviceTransfer
from torch_spheres.data.fetch import Fetcher
from torch_spheres.data.loader_config import LoaderConfig
from torch_spheres.data.rank_slice import RankSlice, sync_epoch
from torch_spheres.data.resume import (
    EpochPosition,
    LoaderRandomState,
    LoaderState,
    required_options,
)
from torch_spheres.data.sampler import RankBatch
from torch_spheres.data.sampler_state import extend_digest
from torch_spheres.data.tensor_gather import can_gather
from torch_spheres.data.worker_info import install
from torch_spheres.errors import StoppedError

__all__ = ["SphereIterator"]


class SphereIterator(_compat.BaseIterator):  # type: ignore[misc]  # its type is known at run time
    """One pass over a wrapped loader, or with persistent workers several.

    It begins at `resumed`. Its `position` is that after the batch that was handed out last.
    """

    _collate_fn: Any
    _shared_seed: int | None
    _base_seed: int

    def __init__(self, config: LoaderConfig, resumed: LoaderState | None) -> None:
        install()
        loader, self._ranks = config.loader, config.ranks
        self._spheres, self._meter = config.spheres, config.meter
        self._in_order = loader.in_order or loader.num_workers == 0
        self._random_state = LoaderRandomState(loader)
        self._options = required_options(loader)
        self._iterable = bool(self._options["iterable"])
        self._rank_slice = None if config.ranks is None else RankSlice(config.ranks, config.shards)
        self._batch_rows: Sequence[int] | None = None  # of the last index list, if it was cut
        self._next_lock = threading.RLock()
        self.position = EpochPosition(self._random_state, self._in_order)
        self._start_epoch(fresh=True)
        self._after_base_seed: torch.Tensor | None = None  # state of the default generator
        self._last_next: float | None = None
        if resumed is None:
            super().__init__(loader)
        else:
            self._resume(loader, resumed)
        self.position.base_seed = self._base_seed  # which torch has drawn
        if self._rank_slice is not None and self._iterable:
            self._collate_fn = functools.partial(self._rank_slice.collate, self._collate_fn)
        options = self._dataset_kind, self._auto_collation, self._collate_fn, self._drop_last
        self._make_fetcher = functools.partial(Fetcher, *options)
        pin_for = self._pin_memory_device if self._pin_memory else None
        self._transfer = DeviceTransfer(config.device, pin_for)
        self._gathers = (
            not self._iterable
            and self._auto_collation
            and self._transfer.does_nothing
            and can_gather(self._dataset, self._collate_fn)
        )

    # ---- positions ----

    def _start_epoch(self, fresh: bool) -> None:
        self._index_digest = 0  # of all index lists so far, also those asked for ahead
        start = self._random_state.capture()
        self.position.state = LoaderState(
            **self._options, start=start, now=start, begun=True, fresh=fresh
        )

    def _resume(self, loader: DataLoader[Any], resumed: LoaderState) -> None:
        """Calls torch's `__init__`, with the draws of the epoch that is resumed."""
        if resumed.fresh:
            self._random_state.restore(resumed.start)
        if resumed.base_seed is None:  # of an epoch to come, which draws one as any other
            self._start_epoch(fresh=True)
            super().__init__(loader)
            return
        start = resumed.start["global"] if resumed.fresh else None
        with self._random_state.default_generator_at(start):
            super().__init__(loader)
            self._after_base_seed = torch.get_rng_state()
        self._base_seed = resumed.base_seed
        self.position.state = replace(resumed, begun=True)

    @contextlib.contextmanager
    def _sampler_at(self, resumed: LoaderState | None) -> Iterator[None]:
        """Moves the sampler to a saved position.

        The block may ask for further index lists: the default generator is still the epoch's.
        """
        if resumed is None or resumed.base_seed is None:
            yield
            return
        if not resumed.fresh:
            self._random_state.restore(resumed.start)
            self._sampler_iter = iter(self._index_sampler)
        if not resumed.begun:
            yield
            return
        state = self._after_base_seed if resumed.fresh else resumed.start["global"]
        with self._random_state.default_generator_at(state):
            skipped = 0 if resumed.iterable else resumed.tasks
            for _ in range(skipped):
                with contextlib.suppress(StopIteration):
                    self._next_index()
            if self._index_digest != resumed.digest:
                raise RuntimeError(
                    f"the sampler does not repeat the {skipped} batches of the saved epoch: resume "
                    "with the same data and epoch; a sampler with randomness of its own needs "
                    "state_dict and load_state_dict"
                )
            self._num_yielded = resumed.yielded
            yield
        # Others may have drawn from given generators as well.
        self._random_state.restore(resumed.now, generators_only=True)

    def save(self) -> LoaderState:
        """The state after the batch that was handed out last; see `EpochPosition.save`."""
        return self.position.save()

    # ---- batches ----

    def _next_index(self) -> Any:
        index = super()._next_index()
        if self._iterable:
            return index
        cut = index if isinstance(index, RankBatch) else None
        # The digest is of whole batches, so that a state fits any number of ranks.
        self._index_digest = extend_digest(self._index_digest, index if cut is None else cut.whole)
        if self._rank_slice is not None:
            index, self._batch_rows = self._rank_slice.select(index)
        else:
            self._batch_rows = None if cut is None else cut.rows
        return index

    def _running_core(self) -> _core.System | None:
        """The running spheres, to share work with; None: the caller does the work alone."""
        spheres = self._spheres
        # (Inside a work item the caller would wait for itself.)
        if spheres._forked or spheres._on_own_thread():
            return None
        try:
            spheres._ensure_started("a wrapped loader")
        except StoppedError:
            return None
        return spheres._core

    def _rows_of(self, index: Any) -> int:
        """Samples that the sampler asks for; 0 if unknown."""
        if self._iterable:
            return 0
        if not self._auto_collation:
            return 1
        return len(index) if hasattr(index, "__len__") else 0

    def _advance(self, task: int, digest: int, next_worker: int = 0) -> None:
        """Moves the position behind the batch of a task, which the loop is about to get."""
        state = self.position.state
        state.tasks, state.yielded = task + 1, state.yielded + 1
        state.digest, state.next_worker = digest, next_worker

    def _log_batch(self, task: int, digest: int) -> None:
        """Logs a batch that has been loaded for the ranks' comparison."""
        if self._rank_slice is not None:
            self._rank_slice.log_batch(task, None if self._iterable else digest)

    # ---- torch's interface ----

    def __next__(self) -> Any:
        if not self._next_lock.acquire(blocking=False):
            raise RuntimeError(
                "another thread is in next() of this iterator; give each thread an iterator of its "
                "own, or a lock to hold meanwhile"
            )
        try:
            # First: a warning that is turned into an error must not lose a batch.
            if (text := self._meter.next_warning()) is not None:
                warnings.warn(text, UserWarning, stacklevel=2)
            begin = time.perf_counter()
            try:
                return super().__next__()
            finally:
                end = time.perf_counter()
                since = begin if self._last_next is None else self._last_next
                self._last_next = end
                self._meter.count_wait(end - begin, end - since, end)
        finally:
            self._next_lock.release()

    def _reset(self, loader: Any, first_iter: bool = False) -> None:
        if not first_iter:
            config = loader._sphere_config()
            if config.ranks is not self._ranks:
                raise RuntimeError(
                    "the process group is another one than when the persistent workers began; "
                    "wrap the loader anew"
                )
            sync_epoch(config, None)
            if self._rank_slice is not None:
                self._rank_slice.begin_epoch()
        super()._reset(loader, first_iter)
        self.position.finished = False
        self._last_next = None
