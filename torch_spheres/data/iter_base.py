"""What both iterators of a wrapped loader have in common."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from torch_spheres import _compat, _core
from torch_spheres.data.device_transfer import Transfer
from torch_spheres.data.fetch import Fetcher
from torch_spheres.data.rank_slice import Portions, collate_own, same_epoch
from torch_spheres.data.resume import Bookmark, Progress, Sources, shape_of
from torch_spheres.data.sampler import digest
from torch_spheres.data.tensor_gather import gathers
from torch_spheres.data.worker_info import install
from torch_spheres.errors import StoppedError

if TYPE_CHECKING:
    from torch_spheres.data.loader import SphereLoader

__all__ = ["SphereIterator"]


class SphereIterator(_compat.BaseIterator):  # type: ignore[misc]  # known when it runs
    """Draws, sampler, warnings and length are torch's; how to come back to a position is ours."""

    _collate_fn: Any
    _shared_seed: int | None

    def __init__(self, loader: SphereLoader[Any], resumed: Progress | None) -> None:
        install()
        self._spheres = loader.spheres
        self._meter = loader._meter
        self._in_order = loader.in_order or loader.num_workers == 0
        self._sources = Sources(loader)
        self._shape = shape_of(loader)
        self._iterable = bool(self._shape["iterable"])
        ranks = loader._membership.ranks
        self._portions = None if ranks is None else Portions(ranks, loader.spheres.leaves)
        self._places: Sequence[int] | None = None  # of the index list that was cut last
        self._in_use = threading.RLock()
        self.mark = Bookmark(self._sources, self._in_order)
        self._ranks, self._epoch_log = ranks, None if ranks is None else ranks.batches.begin()
        self._begin_counting(fresh=True)
        self._after_base_seed: torch.Tensor | None = None
        self._last_next: float | None = None
        if resumed is None:
            super().__init__(loader)
        else:
            self._come_back(loader, resumed)
        if self._portions is not None and self._iterable:
            self._collate_fn = functools.partial(collate_own, self._collate_fn, self._portions)
        self._make_fetcher = functools.partial(
            Fetcher,
            self._dataset_kind,
            self._auto_collation,
            self._collate_fn,
            self._drop_last,
        )
        pins_for = self._pin_memory_device if self._pin_memory else None
        self._sender = Transfer(loader._sphere_device, pins_for)
        self._gathers = (
            not self._iterable
            and self._auto_collation
            and self._sender.does_nothing
            and gathers(self._dataset, self._collate_fn)
        )

    # ---- positions ----

    def _begin_counting(self, fresh: bool) -> None:
        self._pulled = 0  # digest of all index lists so far, also those asked for ahead
        start = self._sources.capture()
        # After the batch that was handed out last.
        self.mark.at = Progress(**self._shape, start=start, now=start, begun=True, fresh=fresh)

    def _come_back(self, loader: SphereLoader[Any], resumed: Progress) -> None:
        """Torch's own __init__, with the draws of the epoch that is resumed."""
        if resumed.fresh:
            self._sources.restore(resumed.start)
        if resumed.base_seed is None:  # of an epoch to come: it draws one as any other
            self._begin_counting(fresh=True)
            super().__init__(loader)
            return
        with self._sources.repeating(resumed.start["global"] if resumed.fresh else None):
            super().__init__(loader)
            self._after_base_seed = torch.get_rng_state()
        self._base_seed = resumed.base_seed
        self.mark.at = replace(resumed, begun=True)

    @contextlib.contextmanager
    def _skipping(self, resumed: Progress | None) -> Iterator[None]:
        """A block in which the sampler stands where it stood; its first draws may come in it."""
        if resumed is None or resumed.base_seed is None:
            yield
            return
        if not resumed.fresh:
            self._sources.restore(resumed.start)
            self._sampler_iter = iter(self._index_sampler)
        if not resumed.begun:
            yield
            return
        state = self._after_base_seed if resumed.fresh else resumed.start["global"]
        with self._sources.repeating(state):
            skipped = 0 if resumed.iterable else resumed.tasks
            for _ in range(skipped):
                with contextlib.suppress(StopIteration):
                    self._next_index()
            if self._pulled != resumed.digest:
                raise RuntimeError(
                    f"the sampler does not repeat the {skipped} batches of the saved epoch: resume "
                    "with the same data and epoch; a sampler with randomness of its own needs "
                    "state_dict and load_state_dict"
                )
            self._num_yielded = resumed.yielded
            yield
        # Given generators, from which others may have drawn as well.
        self._sources.restore(resumed.now, sampler=False)

    def _next_index(self) -> Any:
        index = super()._next_index()
        if self._iterable:
            return index
        # (Of all ranks, also where a SphereBatchSampler has cut it: states go from one to another.)
        whole = getattr(self._index_sampler, "_whole", None)
        self._pulled = digest(self._pulled, index if whole is None else whole)
        if self._portions is not None:
            index, self._places = self._portions.of(index)
        else:  # a SphereBatchSampler may have cut it
            self._places = getattr(self._index_sampler, "_places", None)
        return index

    def _running_core(self) -> _core.System | None:
        """For work that the caller shares with the spheres; None: it does that alone."""
        spheres = self._spheres
        # (Inside a work item it would wait for itself.)
        if spheres._forked or spheres._on_own_thread():
            return None
        try:
            spheres._ensure_started("a wrapped loader")
        except StoppedError:
            return None
        return spheres._core

    def _size_of(self, index: Any) -> int:
        if self._iterable:
            return 0
        if not self._auto_collation:
            return 1
        return len(index) if hasattr(index, "__len__") else 0

    def _handed_out(self, task: int, digest: int, next_worker: int = 0) -> None:
        """The batch of an index list is about to be the loop's."""
        self.mark.at.tasks, self.mark.at.yielded = task + 1, self.mark.at.yielded + 1
        self.mark.at.digest, self.mark.at.next_worker = digest, next_worker

    def _tell_ranks(self, task: int, digest: int) -> None:
        """A batch has been loaded, and is about to be the loop's: for the ranks' comparison."""
        if self._ranks is not None and self._epoch_log is not None:
            self._ranks.loaded(self._spheres.leaves)
            assert self._portions is not None
            if self._iterable:  # without index lists: what was read is what can be compared
                digest = self._portions.digest_of_samples(task)
            self._ranks.batches.handed_out(self._epoch_log, task + 1, digest)

    def progress(self) -> Progress:
        """After the batch that was handed out last; see `Bookmark.progress`."""
        return self.mark.progress()

    @property
    def finished(self) -> bool:
        """Whether all of the epoch was handed out."""
        return self.mark.finished

    @finished.setter
    def finished(self, value: bool) -> None:
        self.mark.finished = value

    @property
    def _base_seed(self) -> int:
        """Torch sets it."""
        return self.mark.base_seed

    @_base_seed.setter
    def _base_seed(self, value: int) -> None:
        self.mark.base_seed = value

    # ---- torch's interface ----

    def __next__(self) -> Any:
        if not self._in_use.acquire(blocking=False):
            raise RuntimeError(
                "another thread is in next() of this iterator; give each thread an iterator of its "
                "own, or a lock to hold meanwhile"
            )
        try:
            # First: as an error, a warning must not lose a batch.
            if (news := self._meter.news()) is not None:
                warnings.warn(news, UserWarning, stacklevel=2)
            begin = time.perf_counter()
            try:
                return super().__next__()
            finally:
                end = time.perf_counter()
                since = begin if self._last_next is None else self._last_next
                self._last_next = end
                self._meter.waited(end - begin, end - since, end)
        finally:
            self._in_use.release()

    def _reset(self, loader: Any, first_iter: bool = False) -> None:
        if not first_iter:
            if loader._membership.look(loader.spheres.leaves) is not self._ranks:
                raise RuntimeError(
                    "the process group is another one than when the persistent workers began; "
                    "wrap the loader anew"
                )
            same_epoch(loader, None)
            self._epoch_log = None if self._ranks is None else self._ranks.batches.begin()
        super()._reset(loader, first_iter)
        self.finished = False
        self._last_next = None
