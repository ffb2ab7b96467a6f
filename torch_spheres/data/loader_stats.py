"""`LoaderStats`: what a wrapped loader has done, who waited, and what to change.

The loader has a `Meter`, to which its iterators and workers report.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor

from torch_spheres import _compat
from torch_spheres.runtime.thread_hooks import has_gil

__all__ = ["CALLS_KEPT", "Call", "LoaderStats", "Meter"]

CALLS_KEPT = 10_000
"""Calls of ``next()`` that a `Meter` remembers one by one."""


class Call(NamedTuple):
    """One ``next()`` of the loop. Times are in seconds."""

    ended: float
    """When, on the clock of ``time.perf_counter()``."""
    waited: float
    """How long it took."""
    since: float
    """From the end of the previous call to the end of this one; an epoch's first: as `waited`."""
    ready: int | None
    """Batches that stood ready. None: there was no batch, as at the end of an epoch."""


@dataclass(frozen=True, slots=True)
class LoaderStats:
    """A wrapped loader's figures since it was made, or (``after - before``) between two moments.

    Times are in seconds.
    """

    batches: int
    """Batches handed to the loop."""
    samples: int
    """Rows asked of the sampler for them; 0 where the loader does not know (iterable datasets)."""
    bytes: int
    """Bytes of the tensors in them."""
    waited: float
    """Time that the loop spent in ``next()``. High: loading is what takes the time."""
    worked: float
    """Time that threads spent loading, added up over them (the caller's, if it loaded itself)."""
    computed: float
    """Of `worked`, time on a core. Far less than it: threads waited, for a disk or for the GIL."""
    elapsed: float
    """Time between the first ``next()`` and the last, of each epoch, added up."""
    queue_depth: float
    """Batches that stood ready when the loop asked for one, on average. 0: the loop had to wait."""
    workers: int
    """Logical workers that load ahead of the loop; 0: the loop's own thread loads."""
    way: str
    """How batches were loaded last: ``"gather"`` (rows copied in C++), ``"spheres"`` (samples in
    threads), ``"caller"`` (the loop's own thread), ``"process"`` (the loader's own processes).
    """

    origin: int = 0
    """Number of the loader in this process."""

    def __sub__(self, before: LoaderStats) -> LoaderStats:
        """What the loader did between two moments.

        Args:
            before: the earlier figures of the same loader.

        Returns:
            Differences of counts and times; `queue_depth` is the average between the two, and
            `workers` and `way` are the later figures'.

        Raises:
            ValueError: the two are of different loaders, or in the wrong order.
        """
        if not isinstance(before, LoaderStats):
            return NotImplemented
        if self.origin != before.origin:
            raise ValueError(
                f"the figures are of different loaders, number {self.origin} and {before.origin}"
            )
        if self.batches < before.batches or self.elapsed < before.elapsed:
            raise ValueError(
                f"the figures to take away, after {before.batches} batches, are later than the "
                f"others, after {self.batches}: write later - earlier"
            )
        between = {name: getattr(self, name) - getattr(before, name) for name in _SUMS}
        ready = self.queue_depth * self.batches - before.queue_depth * before.batches
        depth = max(0.0, ready / between["batches"]) if between["batches"] else 0.0
        return replace(self, **between, queue_depth=depth)

    @property
    def waiting(self) -> float:
        """Share of the elapsed time, 0 to 1, that the loop waited."""
        return min(1.0, self.waited / self.elapsed) if self.elapsed > 0 else 0.0

    @property
    def cores(self) -> float:
        """Cores that loading kept busy while the loop ran, on average."""
        return self.computed / self.elapsed if self.elapsed > 0 else 0.0

    @property
    def advice(self) -> str | None:
        """One line on what to change, when the loop mostly waits; None when it does not."""
        if self.batches < _ENOUGH_BATCHES or self.waiting < _MOSTLY or self.way == "gather":
            return None
        share = f"the loop waited for data {self.waiting:.0%} of the time"
        if self.way != "process":
            if self.workers == 0:
                way_out = "give the DataLoader num_workers=, so that threads load ahead of it"
                return f"{share}; {way_out}"
            if self.python_bound:
                return self.of_the_gil
        return f"{share}; more num_workers may help"

    @property
    def of_the_gil(self) -> str:
        """The `advice` of a loader that is `python_bound`."""
        return (
            f"the loop waited for data {self.waiting:.0%} of the time, and {self.workers} logical "
            f"workers kept {self.cores:.1f} cores busy: the dataset runs in Python, one thread at "
            'a time (the GIL). Use wrap(loader, workers="process"), or let the dataset work in '
            "calls that release the GIL (Pillow, OpenCV, numpy, torch)"
        )

    @property
    def python_bound(self) -> bool:
        """Whether the GIL held the workers back: several wanted to run, and one core was busy."""
        wanted = self.worked / self.elapsed if self.elapsed > 0 else 0.0
        return has_gil() and self.workers > 1 and wanted > 1.5 and 0.7 < self.cores < 1.3

    def __str__(self) -> str:
        per_second = f", {self.samples / self.elapsed:,.0f} samples/s" if self.elapsed else ""
        line = (
            f"{self.batches} batches ({self.bytes / 2**20:,.1f} MiB) by {self.way}{per_second}; "
            f"waited {self.waited:.3f} s of {self.elapsed:.3f} s, loading took {self.worked:.3f} s "
            f"({self.computed:.3f} s on a core), {self.queue_depth:.1f} batches ready"
        )
        return line if self.advice is None else f"{line}\n{self.advice}"


# Fields of `LoaderStats` that are sums.
_SUMS = ("batches", "samples", "bytes", "waited", "worked", "computed", "elapsed")
_origins = itertools.count(1)
_ENOUGH_BATCHES = 8
_FEW_BATCHES = 3  # are enough for a loss as large as the GIL's
_ENOUGH_SECONDS = 1.0
_MOSTLY = 0.5


class Meter:
    """Counts for the `LoaderStats` of one loader, and holds its warnings; for any thread.

    `count_samples` is called with the rows of each batch.
    """

    def __init__(self, workers: int, count_samples: Callable[[int], None] | None = None) -> None:
        self._lock = threading.Lock()
        self._workers = workers
        self._count_samples = count_samples
        self._origin = next(_origins)
        self.way = "caller"
        self._warned_of_gil = False
        self._warnings: list[str] = []  # that `next_warning` has not returned yet
        self._known: set[str] = set()
        # ``ready``: batches that stood ready, added up.
        self._sums: dict[str, Any] = dict.fromkeys((*_SUMS, "ready"), 0)
        self._calls: deque[Call] = deque(maxlen=CALLS_KEPT)
        self._thread = threading.local()  # threads may share a loader

    def count_batch(self, batch: Any, samples: int, ready: int, size: int | None = None) -> None:
        """Counts a batch that the loop gets, of `size` bytes; `ready`: batches that stood ready."""
        if size is None:
            try:
                leaves = _compat.pytree.tree_leaves(batch)
                size = sum(x.nbytes for x in leaves if isinstance(x, Tensor) and not x.is_sparse)
            except RecursionError:  # a batch may hold itself
                size = 0
        self._thread.ready = ready
        if self._count_samples is not None:
            self._count_samples(samples)
        with self._lock:
            sums = self._sums
            sums["batches"] += 1
            sums["samples"] += samples
            sums["bytes"] += size
            sums["ready"] += ready

    def count_wait(self, seconds: float, elapsed: float, ended: float) -> None:
        """Counts a call of ``next()``: `waited`, `since` and `ended` of a `Call`."""
        ready = self._thread.__dict__.pop("ready", None)  # from `count_batch`, of this same call
        with self._lock:
            self._sums["waited"] += seconds
            self._sums["elapsed"] += elapsed
            self._calls.append(Call(ended, seconds, elapsed, ready))

    def calls(self) -> tuple[Call, ...]:
        """The last `CALLS_KEPT` calls, oldest first."""
        with self._lock:
            return tuple(self._calls)

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Counts the block as time in which the calling thread loads."""
        begin, computed = time.perf_counter(), time.thread_time()
        try:
            yield
        finally:
            self.count_work(time.perf_counter() - begin, time.thread_time() - computed)

    def count_work(self, seconds: float, computed: float) -> None:
        """Counts time in which a thread has loaded; `computed`: the part of it on a core."""
        with self._lock:
            self._sums["worked"] += seconds
            self._sums["computed"] += computed

    def count_work_since(self, begin: float) -> None:
        """Counts time on a core since ``time.perf_counter()`` was `begin`."""
        # (Asking for the thread's own time can take as long as gathering a batch.)
        seconds = time.perf_counter() - begin
        self.count_work(seconds, seconds)

    def add_warning(self, text: str) -> None:
        """Has `next_warning` return a text, once."""
        with self._lock:
            if text not in self._known:
                self._known.add(text)
                self._warnings.append(text)

    def next_warning(self) -> str | None:
        """A warning that was not returned yet: an added one, or that the GIL is the bottleneck."""
        with self._lock:
            if self._warnings:
                return self._warnings.pop()
        if self._warned_of_gil or self._sums["elapsed"] < _ENOUGH_SECONDS:
            return None
        now = self.snapshot()
        self._warned_of_gil = (
            now.python_bound and now.waiting >= _MOSTLY and now.batches >= _FEW_BATCHES
        )
        return now.of_the_gil if self._warned_of_gil else None

    def snapshot(self) -> LoaderStats:
        """The figures so far."""
        with self._lock:
            sums = dict(self._sums)
        return LoaderStats(
            **{name: sums[name] for name in _SUMS},
            queue_depth=sums["ready"] / max(1, sums["batches"]),
            workers=self._workers,
            way=self.way,
            origin=self._origin,
        )
