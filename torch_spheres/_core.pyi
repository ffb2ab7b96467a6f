"""
The C++ runtime of torch_spheres; use it through the package's Python classes.
"""

from __future__ import annotations
import collections.abc
import enum
import typing

__all__: list[str] = [
    "Gather",
    "HeldTeam",
    "KISSING",
    "MAX_LEVELS",
    "NativeFunction",
    "SphereStats",
    "State",
    "StoppedError",
    "SumJob",
    "System",
    "TRACE_LABELS",
    "Topology",
    "TraceRecord",
    "TraceTrack",
    "Work",
    "active_isa",
    "current_sphere",
    "item_time_edges",
    "join_dropped",
    "keep_freed_memory",
    "read_tensors_by",
    "row_numbers",
    "set_thread_hooks",
]

class Topology:
    """
    The shape of the hierarchy: arithmetic on the numbers of spheres, without threads.

    Spheres are numbered from 0, level by level: 0 is the root, 1 to 12 are its children, and level
    *l* has 12^*l* spheres. The leaves, which are the last level, run the work: item *k* belongs to
    the leaf whose path from the root is *k* in base 12, least significant digit first.

    Args:
        levels: 1 to 4, the root's included.

    Attributes:
        levels: as given.
        total: spheres of all levels: 1, 13, 157 or 1885.
        leaves: spheres of the last level: 1, 12, 144 or 1728.

    Raises:
        ValueError: another number of levels. The methods raise it for a sphere, a level, a group
            or an item that there is not.
    """
    @staticmethod
    def child(
        sphere: typing.SupportsInt | typing.SupportsIndex,
        group: typing.SupportsInt | typing.SupportsIndex,
    ) -> int:
        """
        A sphere's child of a group, 0 to 11, as if the sphere were no leaf.
        """
    @staticmethod
    def count(level: typing.SupportsInt | typing.SupportsIndex) -> int:
        """
        How many spheres a level has: 1, 12, 144 or 1728 for level 0, 1, 2 or 3.
        """
    @staticmethod
    def first(level: typing.SupportsInt | typing.SupportsIndex) -> int:
        """
        The first sphere of a level, which is also how many there are above it.
        """
    @staticmethod
    def group(sphere: typing.SupportsInt | typing.SupportsIndex) -> int:
        """
        A sphere's symmetry group, its index among the siblings: 0 to 11; -1 for the root.
        """
    @staticmethod
    def has_edge(
        a: typing.SupportsInt | typing.SupportsIndex, b: typing.SupportsInt | typing.SupportsIndex
    ) -> bool:
        """
        Whether two spheres touch: parent and child, or siblings. Messages go along edges.
        """
    @staticmethod
    def level(sphere: typing.SupportsInt | typing.SupportsIndex) -> int:
        """
        The level that a sphere is on: 0 for the root, up to 3.
        """
    @staticmethod
    def offset(sphere: typing.SupportsInt | typing.SupportsIndex) -> int:
        """
        The smallest work item of a sphere's subtree, whose items are that one and all that differ from it by a multiple of 12^level.
        """
    @staticmethod
    def parent(sphere: typing.SupportsInt | typing.SupportsIndex) -> int:
        """
        A sphere's parent; -1 for the root.
        """
    @staticmethod
    def path(sphere: typing.SupportsInt | typing.SupportsIndex) -> list[int]:
        """
        The groups on the way from the root to a sphere, as ``[1, 7]``; none for the root.
        """
    @staticmethod
    def path_string(sphere: typing.SupportsInt | typing.SupportsIndex) -> str:
        """
        The path as text: ``"1.7"``, or ``"root"``.
        """
    def __init__(self, levels: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def contains(self, sphere: typing.SupportsInt | typing.SupportsIndex) -> bool:
        """
        Whether there is such a sphere; any integer may be asked for.
        """
    def is_leaf(self, sphere: typing.SupportsInt | typing.SupportsIndex) -> bool:
        """
        Whether a sphere is on the last level.
        """
    def leaf_of_item(self, item: typing.SupportsInt | typing.SupportsIndex) -> int:
        """
        The leaf that owns a work item, numbered from 0 in its batch; others may steal it.
        """
    @property
    def leaves(self) -> int: ...
    @property
    def levels(self) -> int: ...
    @property
    def total(self) -> int: ...

class State(enum.Enum):
    """
    What a sphere's thread is doing; at any moment it is in one of these states.

    Attributes:
        READY: awake between any two of the other states, looking for what to do.
        PROCESSING: running work items.
        IDLE: asleep, with nothing to do.
        WAITING: asleep at a barrier, or in a work item that waits for those of other spheres.
        ACCUMULATING: summing gradients.
        TERMINATING: ended by `KissingSpheres.stop`, or not started yet.
    """

    ACCUMULATING = ...
    IDLE = ...
    PROCESSING = ...
    READY = ...
    TERMINATING = ...
    WAITING = ...

class SphereStats:
    """
    One sphere's figures at one moment.
    """
    @property
    def id(self) -> int: ...
    @property
    def item_time_counts(self) -> tuple[int, ...]: ...
    @property
    def item_time_ns(self) -> int: ...
    @property
    def items_given(self) -> int: ...
    @property
    def items_run(self) -> int: ...
    @property
    def items_stolen(self) -> int: ...
    @property
    def messages_received(self) -> int: ...
    @property
    def messages_sent(self) -> int: ...
    @property
    def queue_high_water(self) -> int: ...
    @property
    def queued(self) -> int: ...
    @property
    def state(self) -> State: ...
    @property
    def state_ns(self) -> typing.Annotated[list[int], "FixedSize(6)"]:
        """
        Nanoseconds in each state, in the order of State.
        """
    @property
    def stolen_from(self) -> tuple[int, ...]: ...

class TraceTrack:
    """
    What one thread recorded; see observe/trace_recorder.py.
    """
    @property
    def events(self) -> bytes:
        """
        The events' memory, oldest first.
        """
    @property
    def first_state(self) -> int: ...
    @property
    def last_since(self) -> int: ...
    @property
    def last_state(self) -> int: ...
    @property
    def lost(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def native_id(self) -> int: ...
    @property
    def sphere(self) -> int: ...

class TraceRecord:
    """
    What all threads of a system recorded.
    """
    @property
    def begin(self) -> int: ...
    @property
    def end(self) -> int: ...
    @property
    def queued(self) -> int: ...
    @property
    def tracks(self) -> list[TraceTrack]: ...

class NativeFunction:
    """
    A C function ``void f(void *context, int64_t item)``, which spheres call without the GIL.

    Args:
        address: of the function, as ctypes (``ctypes.cast(f, ctypes.c_void_p).value``) or Numba
            (``cfunc.address``) have it.
        context: passed on with each item; the address of what the function reads and writes,
            or 0.
        owner: any object; kept alive as long as this one and its work, for what the two addresses
            point to.

    Attributes:
        address: as given.

    Raises:
        ValueError: `address` is 0.
    """
    def __init__(
        self,
        address: typing.SupportsInt | typing.SupportsIndex,
        context: typing.SupportsInt | typing.SupportsIndex = 0,
        owner: typing.Any = None,
    ) -> None: ...
    @property
    def address(self) -> int: ...

class Work:
    """
    A batch of work items under way: what `KissingSpheres.distribute_work` returns.

    Attributes:
        items: how many the batch has.
        cancelled: how many of them will never run, because of an error or of
            `KissingSpheres.stop`; final once the batch is done.
        results: a list with what each item returned if the batch was made by
            `KissingSpheres.map`, else None.
    """
    def done(self) -> bool:
        """
        Whether all items have been run, or will never be.

        Returns:
            True once that is so, also if an item failed; does not wait.
        """
    def wait(self, timeout: typing.SupportsFloat | typing.SupportsIndex | None = None) -> None:
        """
        Waits until the batch is done; Ctrl-C is answered meanwhile.

        Args:
            timeout: seconds, at least 0; None waits for ever.

        Raises:
            ValueError: `timeout` is negative.
            Exception: that of the first item that failed, the very object, with a note of the item and
                the sphere.
            TimeoutError: the batch was not done in time. It goes on; call `wait` again.
            StoppedError: items were not run, as the spheres were stopped before.
            RuntimeError: called from inside a work item of the same spheres, or in a forked child.
        """
    @property
    def cancelled(self) -> int: ...
    @property
    def items(self) -> int: ...
    @property
    def results(self) -> typing.Any: ...

class StoppedError(RuntimeError):
    """
    The spheres do not run, or were stopped before they had done what the call waited for.

    Work items that had begun were finished, the others were not run. `KissingSpheres.start`
    starts the spheres again.
    """

class System:
    """
    The running hierarchy; see KissingSpheres.
    """
    def __init__(
        self,
        levels: typing.SupportsInt | typing.SupportsIndex,
        concurrency: typing.SupportsInt | typing.SupportsIndex,
        starts: typing.SupportsInt | typing.SupportsIndex = 0,
    ) -> None:
        """
        `starts`: of the system that it replaces.
        """
    def barrier(
        self,
        level: typing.SupportsInt | typing.SupportsIndex,
        timeout: typing.SupportsFloat | typing.SupportsIndex | None = None,
    ) -> None: ...
    def begin_trace(self, capacity: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def call_back(self, leaf: typing.SupportsInt | typing.SupportsIndex) -> None:
        """
        Ends the pause of the item that a leaf is at, or the one to come.
        """
    def cancel(self, work: Work) -> None: ...
    def end_trace(self) -> TraceRecord: ...
    def epoch(self, timeout: typing.SupportsFloat | typing.SupportsIndex | None = None) -> int: ...
    def forked(self) -> bool: ...
    def on_own_thread(self) -> bool: ...
    def pause(self) -> None:
        """
        In a work item: sleeps, without a turn to compute, until call_back(), or for no reason.
        """
    def receive(
        self,
        sphere: typing.SupportsInt | typing.SupportsIndex,
        timeout: typing.SupportsFloat | typing.SupportsIndex | None = None,
    ) -> typing.Any: ...
    def require_outside(self, what: str) -> None: ...
    def require_running(self, what: str) -> None: ...
    def running(self) -> bool: ...
    def send(
        self,
        source: typing.SupportsInt | typing.SupportsIndex,
        target: typing.SupportsInt | typing.SupportsIndex,
        value: typing.Any,
    ) -> None: ...
    def start(self) -> None: ...
    def stats(self) -> list[SphereStats]: ...
    def stop(
        self, timeout: typing.SupportsFloat | typing.SupportsIndex | None = None
    ) -> tuple[int, typing.Any]:
        """
        Returns what nobody was told of: how many items were not run, and an item's error.
        """
    def submit(self, fn: typing.Any, items: tuple[typing.Any, ...], collect: bool) -> Work: ...
    def submit_native(self, fn: NativeFunction, items: typing.Any) -> Work: ...
    def subtrees(self) -> tuple[typing.Any, ...]:
        """
        (ns since start, [(sphere, spheres in each state, items, stolen, queued, busy ns)]): of the root alone, then of each kissing sphere's whole subtree.
        """
    def trace_gradient(
        self,
        source: typing.SupportsInt | typing.SupportsIndex,
        sent: typing.SupportsInt | typing.SupportsIndex,
    ) -> None:
        """
        Records that the calling thread takes gradients that a sphere had ready then.
        """
    def trace_phase(
        self,
        label: typing.SupportsInt | typing.SupportsIndex,
        shard: typing.SupportsInt | typing.SupportsIndex,
        begin: typing.SupportsInt | typing.SupportsIndex,
    ) -> None:
        """
        Records what the calling thread did since `begin`, in nanoseconds.
        """
    def wait(self, timeout: typing.SupportsFloat | typing.SupportsIndex | None = None) -> None: ...
    def waiters(self, work: Work) -> int:
        """
        How many threads wait for this work: for tests.
        """
    @property
    def concurrency(self) -> int: ...
    @property
    def starts(self) -> int: ...
    @property
    def tracing(self) -> bool: ...

class SumJob:
    """
    Tree sums of buffers given by address; see tree_sum().
    """
    def __init__(self, depth: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def run(self, system: System | None = None) -> None:
        """
        Runs the sums: on the spheres if there are any and the sums are large.
        """
    def try_add(self, shards: collections.abc.Sequence[typing.Any], out: typing.Any) -> bool:
        """
        Adds the sum of tensors (None: absent) into a tensor. False, with nothing added, unless all are contiguous CPU tensors of one known type and shape, and overlap only as a whole.
        """
    @property
    def depth(self) -> int: ...

class Gather:
    """
    Rows to be copied to where they belong in a batch.
    """
    def __init__(self, columns: collections.abc.Sequence[typing.Any], keep: typing.Any) -> None:
        """
        A column is (numbers of its rows, address of the table, bytes from one row of it to the next, bytes of a row, address of the output), and nothing of it is checked, see data/tensor_gather.py. What has to stay alive is kept.
        """
    def finish(self, system: System | None = None) -> None:
        """
        Copies all rows, or waits until the spheres have.
        """
    def start(self, system: System) -> None:
        """
        Has the spheres begin, if it is worth their while; does not wait.
        """
    @property
    def bytes(self) -> int:
        """
        Of the batch.
        """
    @property
    def done(self) -> bool:
        """
        Whether it was started, and the spheres have copied all rows.
        """

class HeldTeam:
    """
    Inside its block the calling thread's OpenMP threads sleep.
    """
    def __enter__(self) -> None: ...
    def __exit__(self, type: typing.Any, value: typing.Any, traceback: typing.Any) -> None: ...
    def __init__(
        self,
        start: typing.SupportsInt | typing.SupportsIndex,
        end: typing.SupportsInt | typing.SupportsIndex,
        team_size: typing.SupportsInt | typing.SupportsIndex,
        threads: typing.SupportsInt | typing.SupportsIndex,
    ) -> None:
        """
        Addresses of GOMP_parallel_start, GOMP_parallel_end and omp_get_num_threads, and how many threads the team has, the calling one among them.
        """

def active_isa() -> str:
    """
    The instruction set that the sums use: baseline, avx2 or avx512.
    """

def current_sphere() -> int:
    """
    The id of the sphere whose thread is calling, or -1.
    """

def item_time_edges() -> tuple[int, ...]:
    """
    The upper edges, in nanoseconds, of all buckets of item times but the last.
    """

def join_dropped() -> None:
    """
    Waits until the threads of all systems that were dropped have ended.
    """

def keep_freed_memory(lean: bool) -> bool:
    """
    Has the C library reuse freed memory instead of returning it; see runtime/malloc.py.
    """

def read_tensors_by(exchange: typing.Any) -> None:
    """
    Once, on import: torch.Tensor.__dlpack_c_exchange_api__, or None.
    """

def row_numbers(indices: typing.Any) -> typing.Any:
    """
    (array of int64, least, greatest) of a list of plain ints; None for anything else.
    """

def set_thread_hooks(
    enter: collections.abc.Callable[..., typing.Any],
    leave: collections.abc.Callable[..., typing.Any],
) -> None:
    """
    Called on a sphere's thread before its first and after its last Python call.
    """

KISSING: int = 12
MAX_LEVELS: int = 4
TRACE_LABELS: tuple[typing.Any, ...] = (
    "item",
    "native item",
    "sum piece",
    "gather",
    "forward",
    "loss",
    "backward",
    "sum",
    "load",
)
