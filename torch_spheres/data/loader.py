"""`wrap`: a `DataLoader` whose batches are loaded by threads of this process.

The same batches in the same order as the loader that it was given, with the same random numbers
drawn from the same generators at the same moments; in one process, without pickling, shared memory
or worker processes that start anew at each epoch.
"""

from __future__ import annotations

import copy
import functools
import time
import warnings
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.utils.data
from torch.utils.data import DataLoader

from torch_spheres.data.data_pipes import DATA_PIPES
from torch_spheres.data.device_transfer import Transfer
from torch_spheres.data.inline_iter import InlineIterator
from torch_spheres.data.iter_base import SphereIterator
from torch_spheres.data.loader_checks import check_loader, check_options, ranks_for
from torch_spheres.data.loader_stats import Call, LoaderStats, Meter
from torch_spheres.data.prefetch_iter import AheadIterator
from torch_spheres.data.rank_slice import same_epoch
from torch_spheres.data.resume import Bookmark, Progress
from torch_spheres.distributed.group import ProcessGroup, find_ranks
from torch_spheres.distributed.membership import Membership
from torch_spheres.runtime.arguments import as_index
from torch_spheres.runtime.default_pool import new_pool
from torch_spheres.runtime.malloc import keep_freed_memory
from torch_spheres.runtime.stack_level import users_level

if TYPE_CHECKING:
    from torch_spheres.spheres import KissingSpheres

__all__ = ["SphereLoader", "wrap"]

T = TypeVar("T", covariant=True)


class SphereLoader(DataLoader[T]):
    """What `wrap` returns: a `DataLoader`, of the class that was wrapped too.

    All attributes are those of the wrapped loader, its sampler and dataset the very same objects.
    It can also be made as one, ``SphereLoader(dataset, batch_size=96, spheres=spheres)``, as
    frameworks do that rebuild a loader by its class.

    Args:
        args: of `DataLoader`.
        spheres: this, `device`, `copy_dataset`, `workers` and `process_group` are as of `wrap`.
        kwargs: of `DataLoader`.
    """

    spheres: KissingSpheres
    # (Names that a subclass is not likely to have for something else.)
    _sphere_device: torch.device | None
    _sphere_copies: bool
    _sphere_workers: str
    _membership: Membership
    _meter: Meter
    _pending: Progress | None
    _newest: weakref.ref[SphereIterator] | None
    _mark: Bookmark | None  # of the newest, which may be gone

    def __init__(
        self,
        *args: Any,
        spheres: KissingSpheres | None = None,
        device: torch.device | str | int | None = None,
        copy_dataset: bool = False,
        workers: str = "sphere",
        process_group: ProcessGroup | bool | None = None,
        **kwargs: Any,
    ) -> None:
        vars(self)["_sphere_workers"] = workers  # torch's asks what will make the batches
        super().__init__(*args, **kwargs)
        check_options(self, spheres, copy_dataset, workers)
        self._set_up(spheres, device, copy_dataset, workers, process_group)

    def _set_up(
        self,
        spheres: KissingSpheres | None,
        device: torch.device | str | int | None,
        copy_dataset: bool,
        workers: str,
        process_group: ProcessGroup | bool | None,
    ) -> SphereLoader[T]:
        """Makes a loader of what is a `DataLoader` so far."""
        where = None if device is None else torch.device(device)
        if where is not None and where.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError(f"device={device!r}: torch has no CUDA device here")
        spheres = new_pool() if spheres is None else spheres
        found = find_ranks(process_group, spheres.leaves)
        ranks = ranks_for(self, found, workers)
        keep_freed_memory(spheres.levels)
        # Under the names of the arguments too: frameworks read them off to make another one.
        public = {"device": device, "copy_dataset": copy_dataset, "workers": workers,
                  "process_group": process_group}  # fmt: skip
        attributes = {
            **{name: value for name, value in public.items() if not hasattr(self, name)},
            "_sphere_device": where,
            "_sphere_copies": copy_dataset,
            "_sphere_workers": workers,
            "_pending": None,
        }
        # (A sampler that cuts the batches itself stays with the ranks that it was made for.)
        group = process_group if ranks is found else False
        return self._fill(attributes, spheres, Membership("the loader", group, ranks))

    def _get_iterator(self) -> Any:
        if self._sphere_workers == "process":
            self._meter.way = "process"
            iterator = super()._get_iterator()
            return _Counting(iterator, self._meter, self._sphere_device)
        self._membership.current_ranks(self.spheres.leaves)
        same_epoch(self, self._pending)
        kind = InlineIterator if self.num_workers == 0 else AheadIterator
        made = kind(self, self._pending)
        self._pending = None  # not before: what could not be resumed can be tried again
        self._newest, self._mark = weakref.ref(made), made.mark
        return made

    @property
    def _is_accelerate_prepared(self) -> bool:
        """Accelerate's `prepare` asks for it, and then makes a loader of its own of this one."""
        warnings.warn(
            "Accelerate makes a loader of its own of a wrapped one, which loads with worker "
            "processes and without the spheres: prepare the plain DataLoader, and then put the "
            "spheres inside, loader.base_dataloader = wrap(loader.base_dataloader)",
            UserWarning,
            stacklevel=users_level(),
        )
        return False

    def check_worker_number_rationality(self) -> None:
        """Nothing to check: no processes will be made."""
        if self._sphere_workers == "process":
            super().check_worker_number_rationality()

    def _own_attributes(self) -> dict[str, Any]:
        left_out = {"spheres", "_membership", "_iterator", "_newest", "_mark", "_meter"}
        return {name: value for name, value in vars(self).items() if name not in left_out}

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        group = vars(self).get("process_group")
        memo[id(group)] = group  # which cannot be copied
        made = memo[id(self)] = type(self).__new__(type(self))  # what it holds may refer to it
        return made._fill(
            copy.deepcopy(self._own_attributes(), memo),
            self.spheres,
            copy.deepcopy(self._membership),
        )

    def _fill(
        self, attributes: dict[str, Any], spheres: KissingSpheres, membership: Membership
    ) -> SphereLoader[T]:
        """Gives a new loader these attributes, and what no two loaders share."""
        # Past DataLoader.__setattr__, which would refuse some of them.
        vars(self).update(attributes, spheres=spheres, _membership=membership)
        meter = Meter(self.num_workers, spheres._samples.loaded)
        vars(self).update(_iterator=None, _newest=None, _mark=None, _meter=meter)
        return self

    def __reduce__(self) -> Any:
        # By the class that was wrapped: its sphere class is made when it is needed.
        shape = self.spheres.levels, self.spheres.concurrency
        shared = self._membership.ranks is not None
        attributes = self._own_attributes()
        if not isinstance(attributes.get("process_group"), (bool, type(None))):
            attributes["process_group"] = None  # a group of another process's is no group here
        return _rebuild, (_base_of(self), attributes, shape, shared)

    def __repr__(self) -> str:
        try:
            of = f"{len(self.dataset):,} samples"  # type: ignore[arg-type]
        except (TypeError, NotImplementedError):
            of = "samples"
        return (
            f"{type(self).__name__}({of} of {type(self.dataset).__name__}, "
            f"batch_size={self.batch_size}, num_workers={self.num_workers}) on {self.spheres!r}"
        )

    # ---- figures ----

    def stats(self) -> LoaderStats:
        """What this loader has done since it was made; print it, or read its ``advice``."""
        return self._meter.snapshot()

    def calls(self) -> tuple[Call, ...]:
        """The last 10,000 calls of ``next()``, oldest first: what `plot_loader` draws."""
        return self._meter.calls()

    # ---- positions ----

    def state_dict(self) -> dict[str, Any]:
        """Where the iterator that began last is, or was when the loop broke off; plain values.

        That is after the last batch that was handed out; after the end, before the next epoch.
        Batches that were loaded ahead but not handed out will come again. Save the process's own
        random state with it (``torch.get_rng_state()``): a shuffle of an epoch to come is drawn
        from there.

        Raises:
            RuntimeError: batches come from processes, or out of order; or an iterable dataset's own
                ``state_dict()`` fails.
        """
        self._need_threads("state_dict()")
        newest = self._newest() if self._newest is not None else None
        if self._mark is not None and not self._mark.finished:
            return (self._mark if newest is None else newest).progress().as_dict()
        if self._pending is not None:
            return self._pending.as_dict()
        state = Progress.to_come(self)
        if self._mark is not None and self.persistent_workers:
            last = self._mark.progress()
            state.base_seed, state.workers, state.fresh = last.base_seed, last.workers, False
            for worker in state.workers.values():  # what they draw goes on; the rest begins anew
                worker.update(fetched=0, holder="", progress=None, begin=None)
        return state.as_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """The next iterator goes on where the saved one was; those after it begin at the beginning.

        Args:
            state_dict: from `state_dict`, also of another process. The dataset, the sampler and
                the loader's arguments have to be the same.

        Raises:
            ValueError: it is no such state, or one of a loader with other arguments.
            RuntimeError: batches come from processes. By the iterator: the sampler does not repeat
                the batches that were handed out.
        """
        self._need_threads("load_state_dict()")
        self._pending = Progress.of(state_dict, self)
        self._newest = self._mark = None
        if self._iterator is not None:
            self._iterator._shutdown_workers()  # type: ignore[attr-defined]
            self._iterator = None

    def _need_threads(self, what: str) -> None:
        if isinstance(self.dataset, DATA_PIPES):
            raise RuntimeError(f"{what}: a DataPipe does not say where it is; use a Dataset")
        if self._sphere_workers == "process":
            raise RuntimeError(
                f"{what} does not know where worker processes are; use wrap(loader), without "
                'workers="process"'
            )


class _Counting:
    """An iterator over worker processes, for `LoaderStats`; its batches may go to a device."""

    def __init__(self, iterator: Any, meter: Meter, device: torch.device | None) -> None:
        self._iterator, self._meter = iterator, meter
        self._transfer = Transfer(device)
        self._last: float | None = None

    def __iter__(self) -> _Counting:
        return self

    def __next__(self) -> Any:
        begin = time.perf_counter()
        batch = self._transfer.send(next(self._iterator))()
        end = time.perf_counter()
        self._meter.handed_out(batch, 0, 0)
        since = begin if self._last is None else self._last
        self._meter.waited(end - begin, end - since, end)
        self._last = end
        return batch

    def __len__(self) -> int:
        return len(self._iterator)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._iterator, name)


def _base_of(loader: SphereLoader[Any]) -> Any:
    """The class that was wrapped."""
    return DataLoader if type(loader) is SphereLoader else type(loader).__bases__[1]


@functools.cache
def _class_for(kind: Any) -> type[SphereLoader[Any]]:
    if kind is DataLoader:
        return SphereLoader
    # Methods of a subclass stay; what makes iterators is ours.
    return type(f"Sphere{kind.__name__}", (SphereLoader, kind), {"__module__": kind.__module__})


def wrap(
    loader: DataLoader[T],
    spheres: KissingSpheres | None = None,
    *,
    num_workers: int | None = None,
    device: torch.device | str | int | None = None,
    copy_dataset: bool = False,
    workers: str = "sphere",
    process_group: ProcessGroup | bool | None = None,
) -> SphereLoader[T]:
    """The loader, with its batches loaded by threads instead of worker processes.

    ::

        loader = ts.wrap(loader, spheres)

    ``num_workers=n`` of the loader means *n* logical workers: `get_worker_info()`, and what is
    drawn from torch's default generator or from ``get_worker_info().rng``, are those that *n*
    worker processes would have, on any number of threads, and batches are loaded ahead
    (``prefetch_factor``). Python's and numpy's process-wide generators are shared by threads: a
    warning tells of it. With ``num_workers=0`` the loop's own thread loads, as in plain torch.
    Datasets that are tensors in memory are gathered in C++ either way.

    Args:
        loader: any `DataLoader`; it stays as it is, and shares its sampler and dataset.
        spheres: with whose life the workers end. None: a `KissingSpheres` of two levels, which is
            ``wrapped.spheres``.
        num_workers: instead of the loader's.
        device: batches are pinned, copied there by a stream of their own (with workers, ahead of
            the loop), and ready when handed over. None or the CPU: they stay where they are.
        copy_dataset: each logical worker has its own deep copy of the dataset, made with the
            iterator; for datasets that are not thread-safe. Otherwise each has a shallow copy of it
            and of datasets inside it: attributes that it sets are its own, what they hold is
            shared. (Without workers there is nobody to share with.)
        workers: ``"sphere"``, or ``"process"``: the loader's own worker processes load, which is
            faster for datasets that run in Python and keep the GIL; without ``state_dict`` and
            `sample_seed`.
        process_group: with `torch.distributed` initialised, the processes that share each batch:
            None: all of them. False: none. ``batch_size`` is that of all together, and the sampler
            the same on all (no `DistributedSampler`): each process loads its groups' rows of the
            batches that one process would have, in their order, and a `state_dict` of one resumes
            on any other number of processes. All of them begin an iterator together, with rank 0's
            random state; one that only some use needs False. The order of rows is that of
            `spheres`: give those of the model. (An iterable dataset is read by all, and each keeps
            its rows. What a dataset draws from its worker's generator depends on which rows the
            process has; `sample_seed` does not.)

    Raises:
        TypeError: the loader is no `DataLoader`, or another argument of the wrong kind.
        RuntimeError: `device` is CUDA, and there is none.
        ValueError: `workers` is something else; ``"process"`` with ``num_workers=0``; a loader that
            is wrapped already; or one that makes its iterators itself.
    """
    check_loader(loader)
    if num_workers is not None and workers == "process":
        raise ValueError(
            'num_workers= is for workers="sphere"; give the DataLoader that many itself'
        )
    check_options(loader, spheres, copy_dataset, workers)
    attributes = dict(vars(loader))
    if num_workers is not None:
        attributes["num_workers"] = as_index("num_workers", num_workers, 0)
        if num_workers > 0 and loader.prefetch_factor is None:
            attributes["prefetch_factor"] = 2  # torch's default
        elif num_workers == 0:
            attributes.update(prefetch_factor=None, persistent_workers=False, timeout=0)
    if loader.multiprocessing_context is not None and workers == "sphere":
        warnings.warn(
            "multiprocessing_context has no effect on a wrapped loader, which makes no processes",
            UserWarning,
            stacklevel=2,
        )
    base: Any = type(loader)
    kind = _class_for(base)
    made: SphereLoader[T] = kind.__new__(kind)
    vars(made).update(attributes)
    return made._set_up(spheres, device, copy_dataset, workers, process_group)


def _rebuild(
    base: Any, attributes: dict[str, Any], shape: tuple[int, int], shared: bool
) -> SphereLoader[Any]:
    """A wrapped loader from a pickle: on spheres of its own, as many as the saved one's."""
    spheres = new_pool(shape[0], concurrency=shape[1])
    group = None if shared else False
    membership = Membership("the loader", group, find_ranks(group, spheres.leaves))
    kind = _class_for(base)
    return kind.__new__(kind)._fill(attributes, spheres, membership)
