"""`wrap` and `SphereLoader`: a `DataLoader` whose batches are loaded by threads of this process.

It gives the batches of the loader that it was made of in the same order, with the same random
numbers drawn from the same generators at the same moments; without pickling, shared memory or
worker processes that start anew at each epoch.
"""

from __future__ import annotations

import copy
import functools
import warnings
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.utils.data
from torch.utils.data import DataLoader

from torch_spheres.data.data_pipes import DATA_PIPES
from torch_spheres.data.inline_iter import InlineIterator
from torch_spheres.data.iter_base import SphereIterator
from torch_spheres.data.loader_checks import check_loader, check_options, ranks_for
from torch_spheres.data.loader_config import LoaderConfig, dataset_length
from torch_spheres.data.loader_stats import Call, LoaderStats, Meter
from torch_spheres.data.prefetch_iter import PrefetchIterator
from torch_spheres.data.process_iter import ProcessIterator
from torch_spheres.data.rank_slice import sync_epoch
from torch_spheres.data.resume import EpochPosition, LoaderState
from torch_spheres.distributed.group import ProcessGroup, find_ranks
from torch_spheres.distributed.membership import Membership
from torch_spheres.reduction.partition import checked_shards
from torch_spheres.runtime.arguments import as_index
from torch_spheres.runtime.default_pool import new_pool
from torch_spheres.runtime.malloc import keep_freed_memory
from torch_spheres.runtime.stack_level import users_level

if TYPE_CHECKING:
    from torch_spheres.spheres import KissingSpheres

__all__ = ["SphereLoader", "wrap"]

T = TypeVar("T", covariant=True)

_NOT_COPIED = {"spheres", "_membership", "_iterator", "_newest", "_sphere_position", "_meter"}


class SphereLoader(DataLoader[T]):
    """What `wrap` returns: a `DataLoader`, and an instance of the wrapped loader's class.

    All attributes are those of the wrapped loader, its sampler and dataset the very same objects.
    Like frameworks that rebuild a loader by its class, you can also construct it:
    ``SphereLoader(dataset, batch_size=96, spheres=spheres)``.

    Args:
        args: of `DataLoader`.
        spheres: as of `wrap`.
        device: as of `wrap`.
        copy_dataset: as of `wrap`.
        workers: as of `wrap`.
        process_group: as of `wrap`.
        shards: as of `wrap`.
        kwargs: of `DataLoader`.

    Attributes:
        spheres: the hierarchy whose threads load.

    Raises:
        TypeError: an argument of the wrong kind.
        RuntimeError: `device` is CUDA, and there is none.
        ValueError: what `DataLoader` refuses, and the values that `wrap` does.
    """

    spheres: KissingSpheres
    # A wrapped subclass is unlikely to use these names.
    _sphere_device: torch.device | None
    _sphere_copies: bool
    _sphere_workers: str
    _sphere_shards: int
    _membership: Membership
    _meter: Meter
    _pending: LoaderState | None  # loaded, for the next iterator
    _newest: weakref.ref[SphereIterator] | None
    _sphere_position: EpochPosition | None  # of the newest iterator, which may be gone

    def __init__(
        self,
        *args: Any,
        spheres: KissingSpheres | None = None,
        device: torch.device | str | int | None = None,
        copy_dataset: bool = False,
        workers: str = "sphere",
        process_group: ProcessGroup | bool | None = None,
        shards: int | None = None,
        **kwargs: Any,
    ) -> None:
        vars(self)["_sphere_workers"] = workers  # DataLoader's __init__ reads it, see below
        super().__init__(*args, **kwargs)
        check_options(self, spheres, copy_dataset, workers)
        self._set_up(spheres, device, copy_dataset, workers, process_group, shards)

    def _set_up(
        self,
        spheres: KissingSpheres | None,
        device: torch.device | str | int | None,
        copy_dataset: bool,
        workers: str,
        process_group: ProcessGroup | bool | None,
        shards: int | None,
    ) -> SphereLoader[T]:
        """Adds what a `DataLoader` does not have."""
        where = None if device is None else torch.device(device)
        if where is not None and where.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError(f"device={device!r}: torch has no CUDA device here")
        spheres = new_pool() if spheres is None else spheres
        number = checked_shards(shards, spheres.leaves)
        found = find_ranks(process_group, number)
        ranks = ranks_for(self, found, workers)
        keep_freed_memory(spheres.levels)
        # Frameworks rebuild a loader from attributes that are named as the arguments.
        public = {"device": device, "copy_dataset": copy_dataset, "workers": workers,
                  "process_group": process_group, "shards": shards}  # fmt: skip
        attributes = {
            **{name: value for name, value in public.items() if not hasattr(self, name)},
            "_sphere_device": where,
            "_sphere_copies": copy_dataset,
            "_sphere_workers": workers,
            "_sphere_shards": number,
            "_pending": None,
        }
        # A sampler that cuts the batches itself stays with the ranks that it was made for.
        group = process_group if ranks is found else False
        return self._fill(attributes, spheres, Membership("the loader", group, ranks))

    def _sphere_config(self) -> LoaderConfig:
        """What an iterator needs for an epoch that begins now.

        Raises:
            RuntimeError: the process group was destroyed, and there is no new one.
        """
        return LoaderConfig(
            loader=self,
            spheres=self.spheres,
            ranks=self._membership.current_ranks(self._sphere_shards),
            meter=self._meter,
            device=self._sphere_device,
            shards=self._sphere_shards,
            copy_dataset=self._sphere_copies,
        )

    def _get_iterator(self) -> Any:
        if self._sphere_workers == "process":
            self._meter.way = "process"
            iterator = super()._get_iterator()
            return ProcessIterator(iterator, self._meter, self._sphere_device)
        config = self._sphere_config()
        sync_epoch(config, self._pending)
        kind = InlineIterator if self.num_workers == 0 else PrefetchIterator
        made = kind(config, self._pending)
        self._pending = None  # not before: what could not be resumed can be tried again
        self._newest, self._sphere_position = weakref.ref(made), made.position
        return made

    @property
    def _is_accelerate_prepared(self) -> bool:
        """Warns Accelerate's `prepare`, which reads it and then makes a loader of its own."""
        warnings.warn(
            "Accelerate makes a loader of its own of a wrapped one, which loads with worker "
            "processes and without the spheres: prepare the plain DataLoader, and then put the "
            "spheres inside, loader.base_dataloader = wrap(loader.base_dataloader)",
            UserWarning,
            stacklevel=users_level(),
        )
        return False

    def check_worker_number_rationality(self) -> None:
        """Checks nothing: no processes will be made."""
        if self._sphere_workers == "process":
            super().check_worker_number_rationality()

    def _own_attributes(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in _NOT_COPIED}

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        group = vars(self).get("process_group")
        memo[id(group)] = group  # a process group cannot be copied
        made = memo[id(self)] = type(self).__new__(type(self))  # before what may refer to it
        attributes = copy.deepcopy(self._own_attributes(), memo)
        return made._fill(attributes, self.spheres, copy.deepcopy(self._membership))

    def _fill(
        self, attributes: dict[str, Any], spheres: KissingSpheres, membership: Membership
    ) -> SphereLoader[T]:
        """Sets the attributes of a new loader, and those that no two loaders share."""
        # Past DataLoader.__setattr__, which would refuse some of them.
        vars(self).update(attributes, spheres=spheres, _membership=membership)
        meter = Meter(self.num_workers, spheres._samples.loaded)
        vars(self).update(_iterator=None, _newest=None, _sphere_position=None, _meter=meter)
        return self

    def __reduce__(self) -> Any:
        shape = self.spheres.levels, self.spheres.concurrency
        shared = self._membership.ranks is not None
        attributes = self._own_attributes()
        if not isinstance(attributes.get("process_group"), (bool, type(None))):
            attributes["process_group"] = None  # another process does not have this group
        return _rebuild, (_wrapped_class(self), attributes, shape, shared)

    def __repr__(self) -> str:
        rows = dataset_length(self.dataset)
        return (
            f"{type(self).__name__}({'' if rows is None else f'{rows:,} '}samples of "
            f"{type(self.dataset).__name__}, batch_size={self.batch_size}, "
            f"num_workers={self.num_workers}) on {self.spheres!r}"
        )

    # ---- figures ----

    def stats(self) -> LoaderStats:
        """Reads what this loader has done since it was made.

        Returns:
            A snapshot; print it, or read its ``advice``.
        """
        return self._meter.snapshot()

    def calls(self) -> tuple[Call, ...]:
        """Reads when ``next()`` was called and how long it took: what `plot_loader` draws.

        Returns:
            The last 10,000 calls, oldest first, with times in seconds.
        """
        return self._meter.calls()

    # ---- positions ----

    def state_dict(self) -> dict[str, Any]:
        """Saves where the newest iterator is, or was when the loop broke off.

        That is after the last batch that was handed out; after the end, before the next epoch.
        Batches that were loaded ahead but not handed out will come again. Save the process's own
        random state with it (``torch.get_rng_state()``): a shuffle of an epoch to come is drawn
        from there.

        Returns:
            Plain values and tensors, for ``torch.load(weights_only=True)``.

        Raises:
            RuntimeError: batches come from processes, or out of order; or an iterable dataset's own
                ``state_dict()`` fails.
        """
        self._need_threads("state_dict()")
        newest = self._newest() if self._newest is not None else None
        if self._sphere_position is not None and not self._sphere_position.finished:
            return (self._sphere_position if newest is None else newest).save().as_dict()
        if self._pending is not None:
            return self._pending.as_dict()
        state = LoaderState.of_next_epoch(self)
        if self._sphere_position is not None and self.persistent_workers:
            last = self._sphere_position.save()
            state.base_seed, state.workers, state.fresh = last.base_seed, last.workers, False
            for worker in state.workers.values():  # only their random streams go on
                worker.update(fetched=0, holder="", progress=None, begin=None)
        return state.as_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Has the next iterator go on where the saved one was; those after it begin anew.

        Args:
            state_dict: from `state_dict`, also of another process. The dataset, the sampler and
                the loader's arguments have to be the same.

        Raises:
            ValueError: it is no such state, or one of a loader with other arguments.
            RuntimeError: batches come from processes. By the iterator: the sampler does not repeat
                the batches that were handed out.
        """
        self._need_threads("load_state_dict()")
        self._pending = LoaderState.from_dict(state_dict, self)
        self._newest = self._sphere_position = None
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


def _wrapped_class(loader: SphereLoader[Any]) -> Any:
    """The class of the loader that was wrapped."""
    return DataLoader if type(loader) is SphereLoader else type(loader).__bases__[1]


@functools.cache
def _sphere_class(kind: Any) -> type[SphereLoader[Any]]:
    """A subclass of `SphereLoader` and of a loader's class, whose methods stay."""
    if kind is DataLoader:
        return SphereLoader
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
    shards: int | None = None,
) -> SphereLoader[T]:
    """The loader, with its batches loaded by threads: ``loader = ts.wrap(loader, spheres)``.

    The loader's ``num_workers=n`` becomes *n* logical workers, which load ahead
    (``prefetch_factor``). Their `get_worker_info()`, torch default generators and
    ``get_worker_info().rng`` are those of *n* worker processes, on any number of threads. Threads
    share Python's and numpy's process-wide generators: a warning tells of it. With
    ``num_workers=0`` the loop's own thread loads, as in plain torch. Datasets that are tensors in
    memory are gathered in C++ either way.

    Args:
        loader: any `DataLoader`; it stays as it is, and shares its sampler and dataset.
        spheres: the workers end when they stop. None: a new `KissingSpheres` of two levels,
            ``wrapped.spheres``.
        num_workers: instead of the loader's.
        device: batches are pinned, copied there on a stream of their own (with workers, ahead of
            the loop), and ready when handed over. None or the CPU: they stay where they are.
        copy_dataset: for datasets that are not thread-safe: each logical worker deep-copies the
            dataset when the iterator is made. Otherwise each has a shallow copy of it and of
            datasets inside it: the attributes it sets are its own, what they hold is shared.
            (``num_workers=0``: no copy.)
        workers: ``"sphere"``, or ``"process"`` to keep the loader's worker processes, which are
            faster if the dataset's Python keeps the GIL; without ``state_dict``, `sample_seed`.
        process_group: with `torch.distributed` initialised, the processes that share each batch.
            None: all; False: none. All give the same sampler (no `DistributedSampler`) and the
            ``batch_size`` of all together; each loads its groups' rows of one process's batches, in
            the order of `spheres`: give the model's. Processes begin an iterator together, with
            rank 0's random state: one that only some use needs False. A `state_dict` resumes on any
            number of processes. An iterable dataset is read by all, and each keeps its rows. What a
            dataset draws from its worker's generator depends on the rows of the process;
            `sample_seed` does not.
        shards: of the model, if it was given fewer than its spheres have leaves: processes share
            the rows by shards.

    Returns:
        A new loader, also of the wrapped one's class.

    Raises:
        TypeError: the loader is no `DataLoader`, or another argument of the wrong kind.
        RuntimeError: `device` is CUDA, and there is none.
        ValueError: `workers` is something else; ``"process"`` with ``num_workers=0``; a loader that
            is wrapped already; or one that makes its iterators itself.
    """
    check_loader(loader, num_workers, workers)
    check_options(loader, spheres, copy_dataset, workers)
    base: Any = type(loader)
    kind = _sphere_class(base)
    made: SphereLoader[T] = kind.__new__(kind)
    vars(made).update(_attributes_for(loader, num_workers, workers))
    return made._set_up(spheres, device, copy_dataset, workers, process_group, shards)


def _attributes_for(
    loader: DataLoader[Any], num_workers: int | None, workers: str
) -> dict[str, Any]:
    """The loader's attributes, with another number of workers if that is given."""
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
            stacklevel=3,
        )
    return attributes


def _rebuild(
    base: Any, attributes: dict[str, Any], shape: tuple[int, int], shared: bool
) -> SphereLoader[Any]:
    """Unpickles a wrapped loader, with new spheres that are as many as the saved one's."""
    spheres = new_pool(shape[0], concurrency=shape[1])
    group = None if shared else False
    membership = Membership("the loader", group, find_ranks(group, attributes["_sphere_shards"]))
    kind = _sphere_class(base)
    return kind.__new__(kind)._fill(attributes, spheres, membership)
