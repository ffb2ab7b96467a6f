"""`SphereParallel`: forward and backward of a batch's shards, at once, on shared weights."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parallel import DataParallel, DistributedDataParallel

from torch_spheres import _compat
from torch_spheres.advice import Adviser
from torch_spheres.crew import Crew
from torch_spheres.cutting import Cutting
from torch_spheres.losses import forward_backward
from torch_spheres.memory import keep_freed_memory
from torch_spheres.nesting import flatten, unflatten
from torch_spheres.ranks import ProcessGroup, find_ranks
from torch_spheres.replica_pool import ReplicaPool
from torch_spheres.same_model import sync_module
from torch_spheres.shards import Call
from torch_spheres.sharing import SharedCall
from torch_spheres.splitting import refuse_tracing, rows_to_tune_by
from torch_spheres.system import KissingSpheres
from torch_spheres.tuning import Plan, Trial, Tuners, all_ways, lean_ways, reproducible_ways
from torch_spheres.whole_batch import face, gather_rows

__all__ = ["SphereParallel"]


class SphereParallel(nn.Module):
    """Runs a module on the spheres: the rows of each batch are split over the leaves.

    Use it in place of the module; the loop stays as it is, and ``.grad`` is complete when
    ``backward()`` returns.

    Args:
        module: the model. Its parameters are shared by all shards, never copied; each of the at
            most ``spheres.concurrency`` running shards has its own copy of everything else.
        spheres: who runs the shards; None makes a `KissingSpheres` of two levels.
        reproducible: True: shards are a fixed part of the batch, run with one intra-op thread each,
            and are summed in the fixed tree, so for one build of torch the bits of outputs,
            gradients, buffers and weights do not depend on ``spheres.concurrency``, on which thread
            ran what, nor on the number of processes. False: a few ways to run the batch are
            measured during the first 12 to 45 steps, among them the bare module as it is, and the
            fastest is kept; see `plan`. (With several processes it is as True.)
        process_group: with `torch.distributed` initialised, the processes that share each batch:
            None: all of them. False: none, this process is alone with its batch (inside
            `DistributedDataParallel`, for one).
        batch_dim: the dimension of the batch's rows: of all arguments, or a dict from names of
            arguments of the module's forward to theirs (others have 0). It also says that a list,
            or a square matrix, has the batch's rows.
        whole: names of arguments that every shard gets as they are: a mask over positions, a table.
        scalars: how outputs without dimensions are put together: ``"mean"``, weighted by the
            shards' rows, or ``"sum"``. A call with ``num_items_in_batch=`` (Hugging Face's models
            divide their loss by it) sums.

    Several processes (as many as divide the leaves: twelve, 144 with ``levels=3``): each gets its
    rows of one batch, see `wrap`, and runs the shards of its groups. Rank 0's parameters and
    buffers are everybody's from the start. ``.grad`` is the sum over all ranks when ``backward()``
    returns, bit for bit that of one process if the loss's gradient for a row is: with
    `forward_backward`, or a loss over the whole batch, see `gather`. A mean over the rank's own
    rows is weighted by its share of the rows, which rounds. Calls with gradients, and in training
    mode, are for all ranks together; an evaluation under ``no_grad`` in evaluation mode is this
    process's own.

    Inputs: every tensor with dimensions is cut along its first, or along `batch_dim`, anywhere in
    positional and keyword arguments, lists, tuples, dicts, dataclasses, distributions and key-value
    caches; tensors without dimensions and other objects go to every shard as they are. What may
    have the batch's rows by chance (a square matrix, a list with as many elements) is refused until
    `batch_dim` or `whole` says what it is. Rows are split as `torch.tensor_split` does; with fewer
    rows than leaves only so many shards run.

    Outputs are put together in order, each along the dimension that follows the rows; tensors
    without dimensions (a loss computed inside the model) as `scalars` says. What is the same
    whatever the rows are (a weight) is returned once. Distributions, key-value caches, numpy arrays
    and lists with an element for each row are put together too; other objects that hold tensors,
    and values that are no tensors and differ, are refused.

    The first call of each form (flags and numbers of dimensions) is compared with the bare module:
    the rows of two shards are run together and alone, in evaluation mode and without a trace in
    buffers and random numbers. A UserWarning says once if the model is not row-wise: if it looks
    across the rows of a batch, or its batch is another dimension. Of a module that draws random
    numbers in evaluation mode, shapes alone are compared.

    Parameters: hooks on them, and what `torch.autograd.grad` returns, see the whole batch's
    gradient, once. Hooks on modules run in each shard, with the shard's rows.

    Buffers: every shard starts from the same values; of those that changed, floating-point ones
    become the mean over the shards that ran (summed in the tree), others those of the first shard.

    Random numbers (dropout, ``torch.rand``, ...) come from a generator of each shard's own, seeded
    by one number drawn from torch's default generator in the call: see `torch_spheres.random`.
    Python's and numpy's generators are not keyed by shard.

    Other attributes that a forward sets are set on a copy, and lost.

    On an accelerator the shards run one after another, in the calling thread; the sum is made on
    the device.

    With ``reproducible=True`` a UserWarning says once if the bare module turns out to be faster.

    Raises:
        TypeError: `module` is not an `nn.Module` or already a parallel one, or `spheres` not a
            `KissingSpheres`, or another argument of the wrong type.
        ValueError: the processes cannot share the leaves evenly, or have different models; or
            `batch_dim` or `whole` has the name of no argument.
        RankError: another process does not come, or has failed (in any call that they share).
    """

    def __init__(
        self,
        module: nn.Module,
        spheres: KissingSpheres | None = None,
        *,
        reproducible: bool = True,
        process_group: ProcessGroup | bool | None = None,
        batch_dim: int | Mapping[str, int] = 0,
        whole: Sequence[str] = (),
        scalars: Literal["mean", "sum"] = "mean",
    ) -> None:
        super().__init__()
        _compat.require(_compat.PARALLEL)
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
        for part in module.modules():
            if isinstance(part, (DataParallel, DistributedDataParallel, SphereParallel)):
                raise TypeError(
                    f"module has a {type(part).__name__} in it, which does not work inside "
                    "SphereParallel; wrap the bare module, and put DistributedDataParallel around "
                    "the SphereParallel"
                )
            if isinstance(part, torch.jit.ScriptModule):
                raise TypeError(
                    f"module has a {type(part).__name__} in it, whose copies cannot share its "
                    "parameters; use the module that it was made of, or torch.compile"
                )
        if spheres is None:
            spheres = KissingSpheres()
        elif not isinstance(spheres, KissingSpheres):
            raise TypeError(f"spheres must be a KissingSpheres, got {type(spheres).__name__}")
        if not isinstance(reproducible, bool):
            raise TypeError(f"reproducible must be True or False, got {reproducible!r}")
        self._cutting = Cutting(batch_dim, whole, scalars)  # type: ignore[arg-type]
        self._cutting.check_names(module)
        keep_freed_memory(spheres.levels)
        self.module = module
        self.reproducible = reproducible
        self._take(spheres)
        self._ranks = find_ranks(process_group, spheres.leaves)
        if self._ranks is not None:
            settings = {"levels": spheres.levels, "reproducible": reproducible}
            sync_module(module, self._ranks, settings)
        self.register_load_state_dict_pre_hook(_add_prefix)  # type: ignore[no-untyped-call]

    def _take(self, spheres: KissingSpheres) -> None:
        self._spheres = spheres
        self._pool = ReplicaPool()
        self._tuners = Tuners()
        self._adviser = Adviser()

    @property
    def spheres(self) -> KissingSpheres:
        """The hierarchy that runs the shards."""
        return self._spheres

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

    @_compat.disable_compiler  # compiled code around has a gap here
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the shards; see the class for what is split and how outputs are put together."""
        refuse_tracing()
        crew, trial = self._choose("forward", all_ways, args, kwargs)
        run = functools.partial(self._run, crew, args, kwargs)
        if trial is not None:
            result = run()
            trial.forward_done(flatten(result)[0])
            return result
        advise = self.reproducible and not self._shares and self.training
        if advise and torch.is_grad_enabled() and crew.plan.workers > 0:
            return self._adviser.watch(run, self.module, args, kwargs)
        return run()

    def _choose(
        self,
        what: str,
        ways: Callable[[int, int], list[Plan]],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Crew, Trial | None]:
        spheres = self._spheres
        tensors = [v for v in flatten((args, kwargs))[0] if isinstance(v, Tensor)]
        rows = rows_to_tune_by(tensors, self._cutting)
        # On an accelerator kernels queue up anyway, and autograd runs backward on a thread of the
        # device's own, for which threads that it waits for would wait in turn.
        on_cpu = all(t.is_cpu for t in (*itertools.islice(self.module.parameters(), 1), *tensors))
        concurrency = spheres.concurrency if on_cpu else 0
        if self.reproducible or self._shares:
            ways = reproducible_ways
        tuner = self._tuners.of(
            (rows.bit_length(), self.training, on_cpu, what),
            lambda: ways(spheres.leaves, concurrency),
        )
        trial = tuner.trial(rows)
        plan = tuner.chosen if trial is None else trial.plan
        assert plan is not None
        return Crew(spheres, plan), trial

    def _run(self, crew: Crew, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if crew.plan.shards == 1 and crew.plan.workers == 0:
            return self.module(*args, **kwargs)
        call = self._call(crew, args, kwargs)
        outputs = call.run_forward()
        if torch.is_grad_enabled():
            # (After the forward, which finds what it reaches beside the parameters.)
            tensors = [*call.trainable, *call.inputs_with_grad]
            outputs = list(_OnSpheres.apply(call, outputs, *tensors))  # type: ignore[no-untyped-call]
            if isinstance(call, SharedCall):
                share = call.split.rows / call.split.total
                outputs = [face(o, share) for o in outputs]
        assert call.nesting is not None
        return unflatten(outputs, call.nesting)

    @property
    def _shares(self) -> bool:
        """Whether the call that is made now is one of all ranks."""
        return self._ranks is not None and (torch.is_grad_enabled() or self.training)

    def _call(
        self, crew: Crew, args: tuple[Any, ...], kwargs: dict[str, Any], what: str = "forward"
    ) -> Call:
        ranks = self._ranks if self._shares else None
        kind = Call if ranks is None else SharedCall
        make = functools.partial(kind, self.module, self._pool, crew, args, kwargs, ranks, what,
                                 cutting=self._cutting)  # fmt: skip
        call = make()
        if any(isinstance(m, LazyModuleMixin) and m.has_uninitialized_params()
               for m in self.module.modules()):  # fmt: skip
            call.initialise_lazy_modules()
            call = make()
        return call

    def forward_backward(
        self,
        loss_fn: Callable[[Any, Any], Tensor | tuple[Tensor, Tensor | float]],
        inputs: Any,
        targets: Any,
    ) -> Tensor:
        """Forward, loss and backward shard by shard; only those of running shards are alive.

        The same as ``loss_fn(model(*inputs), targets).backward()`` for a loss that is a mean over
        rows, in less memory: nothing is gathered, and at most ``spheres.concurrency`` shards have
        activations at a time. With more levels shards are smaller.

        Args:
            loss_fn: called with a shard's output and its rows of `targets`. Returns the mean over
                its rows as a scalar, which is weighted by the rows; or ``(sum, count)``, a scalar
                and a number, for means over something else (tokens that are not padding): then
                gradients and loss are those of the total sum over the total count.
            inputs: of the model: one tensor or other value, a tuple of positional arguments, or a
                dict of keyword arguments; split as by `forward`.
            targets: anything nested, split by rows as well: along dimension 0, or `batch_dim` if
                that is one number.

        Returns:
            The whole batch's loss, a scalar without a graph. Gradients have been added to
            ``.grad``, and hooks have run, as by ``backward()``.

        Raises:
            ValueError: the loss is not a scalar or not differentiable, or inputs and targets differ
                in their rows.
            RuntimeError: called under ``torch.no_grad()``.
        """
        args, kwargs = (inputs, {}) if isinstance(inputs, tuple) else ((inputs,), {})
        if isinstance(inputs, Mapping):
            args, kwargs = (), dict(inputs)
        # Whole batches are no choice here: they would take the memory that this call saves.
        crew, trial = self._choose("forward_backward", lean_ways, args, kwargs)
        call = self._call(crew, args, kwargs, "forward_backward")
        loss = forward_backward(call, loss_fn, targets)
        if trial is not None:
            trial.done()
        return loss

    def gather(self, rows: Tensor) -> Tensor:
        """All ranks' rows of a tensor, in the batch's order; in one process, the tensor itself.

        For a loss over the whole batch, which every rank computes, with its gradient for this
        rank's rows: bit for bit that of one process ::

            loss = criterion(model.gather(model(x)), model.gather(y))

        Args:
            rows: outputs of this model, or what came from them row by row, or anything else that
                has this rank's rows, such as targets: in the first dimension, or in `batch_dim`.

        Raises:
            ValueError: the ranks do not have their groups' rows of one batch.
        """
        if self._ranks is None:
            return rows
        dim = max(0, min(self._cutting.default_dim, rows.dim() - 1))
        return gather_rows(rows, self._ranks, self._spheres.leaves, dim)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """For gradient accumulation, as in DistributedDataParallel; changes nothing here.

        ``backward()`` always adds the whole batch's gradient to ``.grad``, over all processes,
        inside this context and outside: their sum would have other bits if it came later.
        """
        yield

    # The bare module's keys, so that checkpoints can be exchanged with it.

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The bare module's `state_dict`."""
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Loads a `state_dict` of the bare module or of a `SphereParallel` around it."""
        return self.module.load_state_dict(state_dict, strict, assign)

    def __deepcopy__(self, memo: dict[int, Any]) -> SphereParallel:
        """A copy of the module on the same spheres."""
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        made.__dict__.update(copy.deepcopy(self._own(), memo))
        made._take(self._spheres)
        made._ranks = self._ranks
        return made

    def __getstate__(self) -> dict[str, Any]:
        """Threads stay behind, and groups: what is unpickled shares with the default one."""
        spheres = self._spheres.levels, self._spheres.concurrency
        return {**self._own(), "_spheres": spheres, "_ranks": self._ranks is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        levels, concurrency = state["_spheres"]
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._take(KissingSpheres(levels, concurrency=concurrency))
        self._ranks = find_ranks(None if state["_ranks"] else False, self._spheres.leaves)

    def _own(self) -> dict[str, Any]:
        """Everything but what belongs to the threads."""
        threads = ("_spheres", "_pool", "_tuners", "_adviser", "_ranks")
        return {k: v for k, v in self.__dict__.items() if k not in threads}


class _OnSpheres(torch.autograd.Function):
    """Puts the shards into the caller's graph as one node, with the parameters as its inputs.

    Autograd itself then adds the sums to ``.grad``, runs the parameters' hooks, and knows what
    ``torch.autograd.grad`` asks for.
    """

    @staticmethod
    def forward(ctx: Any, call: Call, outputs: list[Any], *_: Tensor) -> tuple[Any, ...]:
        ctx.call = call
        ctx.set_materialize_grads(False)
        fixed = [
            o
            for o, differs in zip(outputs, call.differentiable_outputs, strict=True)
            if isinstance(o, Tensor) and not differs
        ]
        ctx.mark_non_differentiable(*fixed)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "backward(create_graph=True) through SphereParallel: gradients of gradients would "
                "need the shards' graphs a second time; compute such a loss on the bare "
                "model.module"
            )
        return (None, None, *ctx.call.run_backward(grads))


def _add_prefix(_module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """When a `SphereParallel` is part of a larger module: its keys have no ``module.`` in them."""
    for key in [k for k in state_dict if k.startswith(prefix)]:
        state_dict[f"{prefix}module.{key[len(prefix) :]}"] = state_dict.pop(key)
