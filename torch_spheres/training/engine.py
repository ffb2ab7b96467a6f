"""`Engine`: runs a model's calls in shards, for `SphereParallel` and for `parallelize_`."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from torch_spheres import _compat
from torch_spheres.distributed.grad_scale import RowLossCheck, scale_grad
from torch_spheres.distributed.group import ProcessGroup, Ranks, find_ranks
from torch_spheres.distributed.membership import Membership
from torch_spheres.distributed.model_sync import sync_module
from torch_spheres.reduction.partition import checked_shards
from torch_spheres.runtime.default_pool import new_pool
from torch_spheres.runtime.malloc import keep_freed_memory
from torch_spheres.runtime.pool import SpherePool
from torch_spheres.runtime.rng import ShardRandom, current_source
from torch_spheres.training.autotune import (
    Plan,
    Trial,
    Tuners,
    all_ways,
    lean_ways,
    reproducible_ways,
    waiting_ways,
)
from torch_spheres.training.batch_split import rows_to_tune_by
from torch_spheres.training.call_arguments import CallArguments
from torch_spheres.training.executor import ShardExecutor
from torch_spheres.training.lazy_modules import initialise, is_lazy
from torch_spheres.training.parallel_forward import PARALLEL_FORWARD
from torch_spheres.training.pytree import flatten, unflatten
from torch_spheres.training.refusals import (
    refuse_off_cpu,
    refuse_torchs_sync_batch_norm,
    refuse_tracing,
)
from torch_spheres.training.replica_pool import ReplicaPool
from torch_spheres.training.sharded_call import ShardedCall
from torch_spheres.training.slow_warning import Adviser, WatchedCall
from torch_spheres.training.split_options import SplitOptions
from torch_spheres.training.step_checks import StepChecks
from torch_spheres.training.sync_batch_norm import waits_for_others

if TYPE_CHECKING:
    from torch_spheres.spheres import KissingSpheres

__all__ = ["Engine", "check_model", "engine_of", "start_engine"]


class Engine:
    """What a model that runs in shards has beside its weights: spheres, replicas, measurements.

    A deep copy has the same spheres; one that was unpickled has made its own. Neither has a module
    until whoever copied it assigns that.
    """

    module: nn.Module
    """What the shards run."""

    def __init__(
        self,
        module: nn.Module,
        spheres: KissingSpheres,
        *,
        reproducible: bool,
        process_group: ProcessGroup | bool | None,
        options: SplitOptions,
        shards: int,
    ) -> None:
        self.module, self.reproducible, self.options = module, reproducible, options
        self.shards = shards
        self._take(spheres)
        self._join(find_ranks(process_group, shards))
        self._membership = Membership("the model", process_group, self.ranks)

    def _join(self, ranks: Ranks | None) -> None:
        self.ranks, self.number = ranks, 0 if ranks is None else next(ranks.models)
        self.pool.checks = None if ranks is None else StepChecks(self.module, self.number)

    def sync(self) -> None:
        """Gives all ranks rank 0's values, and finds out whether they have the same model."""
        if self.ranks is not None:
            same = {"levels": self.spheres.levels, "shards": self.shards}
            sync_module(self.module, self.ranks, same | {"reproducible": self.reproducible})

    def _take(self, spheres: KissingSpheres) -> None:
        self.spheres = spheres
        self.pool = ReplicaPool()
        self._tuners = Tuners()
        self._adviser = Adviser()
        self._losses = RowLossCheck()

    @property
    def plan(self) -> str | None:
        """How batches are run in training; None while that is being measured."""
        latest = self._tuners.latest
        return None if latest is None or latest.chosen is None else latest.chosen.name

    @property
    def plan_costs(self) -> dict[str, float]:
        """What each way to run a batch in training took so far, in seconds per row."""
        latest = self._tuners.latest
        return {} if latest is None else latest.costs

    def forward(
        self, unsplit: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Runs the shards and puts their outputs together.

        Args:
            unsplit: called instead, if a batch that is not split is the fastest way.
            args: positional arguments of the module.
            kwargs: keyword arguments of the module.
        """
        refuse_tracing()
        self._begin()
        arguments = CallArguments(args, kwargs)
        executor, trial = self._choose("forward", all_ways, arguments)
        run = functools.partial(self.run_in_shards, executor, unsplit, arguments, trial)
        if trial is not None:
            result = run()
            # (Evaluations have no backward, even where they forget torch.no_grad().)
            trial.forward_done(flatten(result)[0] if self.module.training else ())
            return result
        if not self.reproducible and not self._is_collective:
            return run()  # the fastest of all ways
        call = WatchedCall(self, arguments, executor.plan, "forward", self._is_collective)
        return self._adviser.watch(run, call)

    def forward_backward(
        self, loss_fn: Callable[[Any, Any], Any], inputs: Any, targets: Any
    ) -> Tensor:
        """See `SphereParallel.forward_backward`."""
        args, kwargs = (inputs, {}) if isinstance(inputs, tuple) else ((inputs,), {})
        if isinstance(inputs, Mapping):
            args, kwargs = (), dict(inputs)
        self._begin()
        # Whole batches are no choice here: they would take the memory that this call saves.
        arguments = CallArguments(args, kwargs)
        executor, trial = self._choose("forward_backward", lean_ways, arguments)

        def run() -> Tensor:
            call = self._call(executor, arguments, "forward_backward")
            loss = call.forward_backward(loss_fn, targets)
            if trial is not None:
                trial.closely = call.closely
                trial.done()
            return loss

        if trial is not None:
            return run()
        watched = WatchedCall(
            self, arguments, executor.plan, "forward_backward", self._is_collective
        )
        loss: Tensor = self._adviser.watch(run, watched)
        return loss

    def is_on_cpu(self, tensors: Iterable[Tensor]) -> bool:
        """Whether the module's parameters are, and the tensors."""
        first = itertools.islice(self.module.parameters(), 1)
        return all(t.is_cpu for t in (*first, *tensors))

    def _begin(self) -> None:
        self.refuse_inside()
        if not self._is_for_all_ranks:
            return
        ranks = self._membership.current_ranks(self.shards)
        if ranks is not self.ranks:
            self.pool.layouts.clear()
            self._join(ranks)
            self.sync()

    def refuse_inside(self) -> None:
        """Raises a RuntimeError inside a shard that runs on the same spheres."""
        shard = current_source()
        if isinstance(shard, ShardRandom) and shard.call.runs_on is self.spheres:
            raise RuntimeError(
                "a parallel model is called inside the forward, or the loss, of another one that "
                "runs on the same spheres, which would wait for each other: call its bare module "
                "there (model.module), which has the same weights, or give it spheres of its own"
            )

    def _choose(
        self,
        what: str,
        ways: Callable[[int, int], list[Plan]],
        arguments: CallArguments,
    ) -> tuple[ShardExecutor, Trial | None]:
        if not self._is_collective:
            arguments.caught.raise_if_any()
        spheres = self.spheres
        rows = rows_to_tune_by(arguments, self.options)
        # On an accelerator kernels queue up anyway, and autograd runs backward on a thread of the
        # device's own, for which threads that it waits for would wait in turn.
        on_cpu = self.is_on_cpu(arguments.tensors())
        concurrency = spheres.concurrency if on_cpu else 0
        if self.reproducible or self._is_collective:
            ways = reproducible_ways
        together = waits_for_others(self.module)
        if together:
            refuse_off_cpu(on_cpu)
            ways = waiting_ways
        tuner = self._tuners.of(
            (rows.bit_length(), self.module.training, on_cpu, what, together),
            lambda: ways(self.shards, concurrency),
        )
        trial = tuner.trial(rows)
        plan = tuner.chosen if trial is None else trial.plan
        assert plan is not None
        return ShardExecutor(spheres, plan, together), trial

    def run_in_shards(
        self,
        executor: ShardExecutor,
        unsplit: Callable[..., Any],
        arguments: CallArguments,
        trial: Trial | None = None,
    ) -> Any:
        """What `forward` does with a plan."""
        if executor.plan.shards == 1 and executor.plan.workers == 0:
            return unsplit(*arguments.args, **arguments.kwargs)
        if self.ranks is not None and not self._is_collective:
            first = next((v for v in arguments.tensors() if v.dim()), None)
            if first is not None and first.shape[self.options.default_dim] == 0:
                # An evaluation's last batch may leave ranks without rows.
                return unsplit(*arguments.args, **arguments.kwargs)
        call = self._call(executor, arguments)
        if trial is not None:
            trial.closely = call.closely
        outputs = call.run_forward()
        if torch.is_grad_enabled() and call.ranks is not None:
            rows, total = call.split.rows, call.split.total
            outputs = [scale_grad(o, rows, total, self._losses) for o in outputs]
        assert call.nesting is not None
        return unflatten(outputs, call.nesting)

    @property
    def _is_for_all_ranks(self) -> bool:
        """Whether the call that is made now is one of all ranks, if there are any."""
        return torch.is_grad_enabled() or self.module.training

    @property
    def _is_collective(self) -> bool:
        """Whether the call that is made now is one of all ranks."""
        return self.ranks is not None and self._is_for_all_ranks

    def _call(
        self,
        executor: ShardExecutor,
        arguments: CallArguments,
        what: str = "forward",
    ) -> ShardedCall:
        ranks, own = self.ranks if self._is_collective else None, None
        if self.ranks is not None and ranks is None and self.ranks.has_own_rows:
            # An evaluation of what a loader has divided: in the shards of the whole batch.
            own = self.ranks.divide(self.shards), self.ranks.rank
        if ranks is not None and self.pool.checks is None:  # of a copy
            self.pool.checks = StepChecks(self.module, self.number)
        make = functools.partial(
            ShardedCall, self.module, self.pool, executor, arguments, ranks, what,
            options=self.options, own_part=own,
        )  # fmt: skip
        call = make()
        if any(map(is_lazy, self.module.modules())):
            initialise(call)
            call = make()
        return call

    # ---- copies ----

    def __deepcopy__(self, memo: dict[int, Any]) -> Engine:
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        made.reproducible, made.options = self.reproducible, copy.deepcopy(self.options)
        made.shards = self.shards
        made.ranks, made.number = self.ranks, self.number
        made._membership = copy.deepcopy(self._membership)
        made._take(self.spheres)
        return made

    def __getstate__(self) -> dict[str, Any]:
        """Threads stay behind, and groups: what is unpickled shares with the default one."""
        return {
            "reproducible": self.reproducible,
            "options": self.options,
            "spheres": (self.spheres.levels, self.spheres.concurrency),
            "shards": self.shards,
            "shares": self.ranks is not None,
            "number": self.number,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        levels, concurrency = state["spheres"]
        self.reproducible, self.options = state["reproducible"], state["options"]
        self.number, self.shards = state["number"], state["shards"]
        self._take(new_pool(levels, concurrency=concurrency))
        group = None if state["shares"] else False
        self.ranks = find_ranks(group, self.shards)
        self._membership = Membership("the model", group, self.ranks)


# ---- arguments ----


def start_engine(
    model: nn.Module,
    spheres: KissingSpheres | None,
    *,
    reproducible: bool,
    process_group: ProcessGroup | bool | None,
    batch_dim: int | Mapping[str, int] = 0,
    whole: Sequence[str] = (),
    scalars: Literal["mean", "sum"] = "mean",
    shards: int | None = None,
) -> Engine:
    """For `SphereParallel` and `parallelize_`: checks their arguments, and has all ranks agree."""
    _compat.require(_compat.PARALLEL)
    check_model(model)
    if spheres is None:
        spheres = new_pool()
    elif not isinstance(spheres, SpherePool):
        raise TypeError(f"spheres must be a KissingSpheres, got {type(spheres).__name__}")
    if not isinstance(reproducible, bool):
        raise TypeError(f"reproducible must be True or False, got {reproducible!r}")
    options = SplitOptions(batch_dim, whole, scalars)  # type: ignore[arg-type]
    options.check_names(model)
    keep_freed_memory(spheres.levels)
    engine = Engine(
        model,
        spheres,
        reproducible=reproducible,
        process_group=process_group,
        options=options,
        shards=checked_shards(shards, spheres.leaves),
    )
    engine.sync()
    return engine


def check_model(model: Any) -> None:
    """Whether a model can be run in shards.

    Raises:
        TypeError: it cannot.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(model).__name__}")
    for part in _parts(model):
        name = type(part).__name__
        if isinstance(part, (DataParallel, DistributedDataParallel)) or engine_of(part) is not None:
            way_out = (
                "its model.forward.remove() takes off what parallelize_() has put on"
                if hasattr(vars(part).get("forward"), "remove")
                else "wrap the bare module, and put DistributedDataParallel around the "
                "SphereParallel"
            )
            raise TypeError(
                f"module has a {name} in it, which runs in parallel already and does not work "
                f"inside another parallel module; {way_out}"
            )
        refuse_torchs_sync_batch_norm(model, part)
        if isinstance(part, torch.jit.ScriptModule):
            raise TypeError(
                f"module has a {name} in it, whose copies cannot share its parameters; use the "
                "module that it was made of, or torch.compile"
            )


def engine_of(module: object) -> Engine | None:
    """The engine of a `SphereParallel`, or of a model that `parallelize_` was called on."""
    forward = vars(module).get(PARALLEL_FORWARD) if isinstance(module, nn.Module) else None
    return forward.engine if forward is not None and forward.is_used_by(module) else None


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """The module and all in it, with `SphereParallel` itself, which `modules()` leaves out."""
    yield module
    for part in module.children():
        yield from _parts(part)
