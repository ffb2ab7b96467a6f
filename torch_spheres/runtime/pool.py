"""`SpherePool`: the hierarchy of worker threads, and the work, barriers and messages given to it.

`KissingSpheres` (spheres.py) is this pool and what can be seen of it. The packages in between are
given either, and know nothing of displays; those that need to hear of a pool's life register with
it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch_spheres._core import NativeFunction, Work
from torch_spheres.runtime.arguments import as_index, as_timeout, native_items, python_items
from torch_spheres.runtime.sphere_threads import SphereThreads

__all__ = ["SpherePool"]

T = TypeVar("T")
R = TypeVar("R")


class SpherePool(SphereThreads):
    """The base of `KissingSpheres`, whose arguments and errors these are."""

    # ---- work ----

    def distribute_work(self, items: Iterable[T], fn: Callable[[T], Any] | NativeFunction) -> Work:
        """Calls ``fn(item)`` for every item, on the leaves; does not wait.

        The first exception ends the batch, whose other items are not run; the call that waits for
        the batch raises the same object, with a note of its item and sphere.

        Args:
            items: any objects, read before this method returns. For a `NativeFunction`: integers.
            fn: a callable, whose results are dropped (see `map`), or a `NativeFunction`, which runs
                without the GIL.

        Returns:
            A handle with ``wait(timeout=None)`` and ``done()``. `SpherePool.wait` waits for all.

        Raises:
            TypeError: `fn` is not callable, `items` not iterable, or an item for a `NativeFunction`
                not an integer.
            OverflowError: an item for a `NativeFunction` does not fit 64 bits.
            RuntimeError: called from inside a work item while 64 batches are in flight; elsewhere
                this method waits until there are fewer.
            StoppedError: the spheres were stopped.
        """
        if isinstance(fn, NativeFunction):
            numbers = native_items(items)
            self._ensure_started("distribute_work()")
            return self._core.submit_native(fn, numbers)
        objects = python_items(items, fn)
        self._ensure_started("distribute_work()")
        return self._core.submit(fn, objects, collect=False)

    def map(self, fn: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """Computes ``[fn(item) for item in items]`` on the leaves.

        Args:
            fn: called with each item.
            items: any objects, read before the first call.

        Returns:
            The results, in the order of the items.

        Raises:
            Exception: that of the first item that failed, with a note of the item and the sphere.
            KeyboardInterrupt: items that run finish in the background, the others are not run.
            TypeError: `fn` is not callable or `items` not iterable.
            RuntimeError: called from inside a work item, where it might wait for itself.
            StoppedError: the spheres were stopped.
        """
        objects = python_items(items, fn)
        self._ensure_started("map()")
        self._core.require_outside("map()")
        work = self._core.submit(fn, objects, collect=True)
        try:
            work.wait(None)
        except BaseException:
            self._core.cancel(work)  # does nothing to a batch that is finished
            del work  # the batch owns the error, whose traceback owns this frame
            raise
        results: list[R] = work.results
        return results

    def wait(self, timeout: float | None = None) -> None:
        """Waits until all work that was given to `distribute_work` is done.

        Args:
            timeout: seconds; None waits for ever. Ctrl-C is answered at once either way.

        Raises:
            TypeError: `timeout` is not a number.
            ValueError: `timeout` is negative.
            Exception: that of the first item that failed; each exception is raised once.
            TimeoutError: there is work left. The work goes on; call `wait` again.
            StoppedError: the spheres were stopped with items that had not begun.
            RuntimeError: called from inside a work item, or in a forked child.
        """
        self._core.wait(as_timeout(timeout))

    # ---- barriers ----

    def barrier(self, level: int, timeout: float | None = None) -> None:
        """Waits until all spheres of a level have finished the work they were given before.

        A sphere that arrives stands still (state WAITING) until the last one has. Work that is
        submitted after the call runs after the barrier, so the barrier opens even if other threads
        never stop submitting.

        Args:
            level: 0 (the root) to ``levels - 1`` (the leaves).
            timeout: seconds; None waits for ever.

        Raises:
            TypeError: `level` is not an integer, or `timeout` not a number.
            ValueError: there is no such level, or `timeout` is negative.
            Exception: that of a work item that fails meanwhile, which opens the barrier.
            StoppedError: the spheres were stopped.
            TimeoutError: not all arrived in time; the spheres go on when all have.
            RuntimeError: called from inside a work item, or in a forked child.
        """
        level = as_index("level", level, 0, self.levels - 1)
        self._ensure_started("barrier()")
        with self._claim_all_leaves("barrier()", as_timeout(timeout)) as left:
            self._core.barrier(level, left)

    def epoch(self, timeout: float | None = None) -> int:
        """Ends an epoch: a barrier over all spheres, reported up the tree to the root.

        Args:
            timeout: seconds; None waits for ever.

        Returns:
            The number of epochs ended so far, this one included.

        Raises:
            TypeError: `timeout` is not a number.
            ValueError: `timeout` is negative.
            Exception: that of a work item that fails meanwhile.
            StoppedError: the spheres were stopped.
            TimeoutError: not all arrived in time; the spheres go on when all have.
            RuntimeError: called from inside a work item, or in a forked child.
        """
        self._ensure_started("epoch()")
        with self._claim_all_leaves("epoch()", as_timeout(timeout)) as left:
            return self._core.epoch(left)

    # ---- messages ----

    def send(self, source: int, target: int, value: object) -> None:
        """Puts a value into a sphere's mailbox, along an edge: to a parent, child or sibling.

        Args:
            source: id of the sphere in whose name the value is sent.
            target: id of the sphere whose mailbox gets the value.
            value: any object.

        Raises:
            TypeError: an id is not an integer.
            ValueError: there is no such sphere, or no edge between the two.
            OverflowError: 128 messages wait there already; nothing was sent.
        """
        self._core.send(self._as_id("source", source), self._as_id("target", target), value)

    def receive(self, sphere: int, timeout: float | None = None) -> Any:
        """Takes the oldest value out of a sphere's mailbox; waits for one.

        Args:
            sphere: id of the sphere.
            timeout: seconds; None waits for ever, 0 does not wait.

        Returns:
            The value that `send` was given.

        Raises:
            TypeError: `sphere` is not an integer, or `timeout` not a number.
            ValueError: there is no such sphere, or `timeout` is negative.
            TimeoutError: no value came in time.
            StoppedError: the mailbox was empty and the spheres were stopped.
        """
        return self._core.receive(self._as_id("sphere", sphere), as_timeout(timeout))

    def _as_id(self, name: str, value: Any) -> int:
        return as_index(f"{name}, a sphere's id,", value, 0, self.total_spheres - 1)
