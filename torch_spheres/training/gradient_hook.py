"""The fixed sum tree, and `GradientHook`, which runs it before the optimizer's step."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from torch_spheres.distributed.group import ProcessGroup, find_ranks
from torch_spheres.distributed.membership import Membership
from torch_spheres.distributed.tree_all_reduce import total_over_ranks
from torch_spheres.reduction.tree_sum import tree_sums
from torch_spheres.runtime.arguments import as_index
from torch_spheres.runtime.pool import SpherePool
from torch_spheres.runtime.trace_hooks import gradients_taken, phase
from torch_spheres.training.engine import engine_of
from torch_spheres.training.step_checks import GradientSumChecks

if TYPE_CHECKING:
    from torch_spheres.spheres import KissingSpheres

__all__ = ["GradientHook", "trains"]


class GradientHook:
    """Sums the shards' gradients up the hierarchy before ``optimizer.step()``.

    Args:
        optimizer: any `torch.optim.Optimizer`; a step pre-hook is registered on it.
        model_or_spheres: a `SphereParallel` model, or one that `parallelize_` was called on, whose
            ``backward()`` completes ``.grad`` by itself (the hook then only has what `add` brings),
            or a `KissingSpheres` for loops that compute gradients in work functions.
        process_group: for `KissingSpheres`, with `torch.distributed` initialised: the processes
            whose gradients are summed, and which step together. None: all; False: this one alone.
            (A parallel model has its own.)

    In such a loop a work function calls ``hook.add(shard, grads)`` and `optimizer.step()` does the
    rest: all shards' gradients are added in the fixed tree (see `tree_sum`) and the sum is added to
    ``.grad``, as ``backward()`` would. Shards that were not added, and gradients that are None,
    are left out of the tree. The bits do not depend on which thread added what when.

    With `torch.distributed` initialised, each process adds the shards of its own groups: those
    whose index modulo 12 is one of its ``12 / world_size`` (for other numbers of processes, which
    need ``levels=3`` or 4: see reduction/partition.py). The sum is over all processes.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: the processes cannot share the leaves evenly.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model_or_spheres: nn.Module | KissingSpheres,
        *,
        process_group: ProcessGroup | bool | None = None,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
            )
        self._by_hand = isinstance(model_or_spheres, SpherePool)
        engine = engine_of(model_or_spheres)
        if engine is not None:
            self._spheres, self._ranks = engine.spheres, engine.ranks
        elif isinstance(model_or_spheres, SpherePool):
            self._spheres = model_or_spheres
            self._ranks = find_ranks(process_group, model_or_spheres.leaves)
            self._membership = Membership("the hook", process_group, self._ranks)
        else:
            raise TypeError(
                "model_or_spheres must be a SphereParallel, a model that parallelize_() was called "
                f"on, or a KissingSpheres, got {type(model_or_spheres).__name__}"
            )
        if isinstance(model_or_spheres, nn.Module) and not trains(optimizer, model_or_spheres):
            warnings.warn(
                f"the optimizer, {type(optimizer).__name__}, has none of the model's parameters, "
                "so that its step will change nothing of the model; was it made for another one, "
                "or before the model was given new ones?",
                UserWarning,
                stacklevel=2,
            )
        self._optimizer = optimizer
        self._checks = GradientSumChecks(optimizer)
        self._lock = threading.Lock()
        self._added: dict[int, list[Tensor | None]] = {}
        self._made: list[tuple[int, int]] = []  # for a trace: leaf and time of each that was added
        # The optimizer keeps the function, and so the hook, even if nobody else does.
        self._handles = (
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        )

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self._spheres._steps.begin(optimizer)
        self.reduce()

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self._spheres._steps.end(optimizer)

    @property
    def parameters(self) -> list[Tensor]:
        """The optimizer's parameters, in the order of its groups: the order `add` expects."""
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def add(
        self, shard: int, grads: Sequence[Tensor | None] | Mapping[Tensor, Tensor | None]
    ) -> None:
        """Hands over the gradients of one shard. Any thread; usually from a work item.

        Args:
            shard: 0 to ``spheres.leaves - 1``, once between two sums.
            grads: one gradient per parameter of the optimizer in the order of `parameters`, or of
                those that require a gradient; None for an unused one. As
                ``torch.autograd.grad(loss, params, allow_unused=True)`` returns them. Or a mapping
                from parameter to gradient. Shape, dtype and device as the parameter's. The tensors
                are kept, not copied, until the sum.

        Raises:
            ValueError: no such shard in this process, a gradient that does not fit its parameter,
                or a sparse one that several processes would sum.
            RuntimeError: the shard was added already since the last sum.
            TypeError: `grads` holds something else than tensors and None.
        """
        shard = as_index("shard", shard, 0, self._spheres.leaves - 1)
        if self._ranks is not None:
            own = self._ranks.divide(self._spheres.leaves).owned(self._ranks.rank)
            if shard not in own:
                raise ValueError(f"shard {shard} is another rank's; this one has {own}")
        fitted = self._fit(grads)
        if self._ranks is not None and any(g is not None and g.is_sparse for g in fitted):
            raise ValueError(
                "a hook by hand cannot sum sparse gradients over processes: add g.to_dense(), or "
                "train a SphereParallel model, which can"
            )
        with self._lock:
            if shard in self._added:
                raise RuntimeError(
                    f"shard {shard} was added already since the last sum; to accumulate over "
                    "several batches call reduce() after each, which adds to .grad"
                )
            self._added[shard] = fitted
            leaf = self._spheres.topology.leaf_of_item(shard)
            self._made.append((leaf, time.monotonic_ns()))

    def _fit(
        self, grads: Sequence[Tensor | None] | Mapping[Tensor, Tensor | None]
    ) -> list[Tensor | None]:
        parameters = self.parameters
        fitted: list[Tensor | None]
        if isinstance(grads, Mapping):
            known = {id(p) for p in parameters}
            for p in grads:
                if id(p) not in known:
                    raise ValueError(
                        f"grads has a tensor of shape {tuple(p.shape)} that is not a parameter of "
                        "the optimizer"
                    )
            fitted = [grads.get(p) for p in parameters]
        else:
            trainable = [p.requires_grad for p in parameters]
            given = list(grads)
            if len(given) == len(parameters):
                fitted = given
            elif len(given) == sum(trainable):
                rest = iter(given)
                fitted = [next(rest) if needed else None for needed in trainable]
            else:
                raise ValueError(
                    f"grads has {len(given)} gradients, but the optimizer has {len(parameters)} "
                    f"parameters, of which {sum(trainable)} require a gradient"
                )
        for i, (p, g) in enumerate(zip(parameters, fitted, strict=True)):
            if g is None:
                continue
            if not isinstance(g, Tensor):
                raise TypeError(f"gradient {i} must be a tensor or None, got {g!r}")
            if g.shape != p.shape or g.dtype != p.dtype or g.device != p.device:
                raise ValueError(
                    f"gradient {i} is {g.dtype} {tuple(g.shape)} on {g.device}, but its parameter "
                    f"is {p.dtype} {tuple(p.shape)} on {p.device}"
                )
        return [None if g is None else g.detach() for g in fitted]

    @torch.no_grad()
    def reduce(self) -> None:
        """Sums what was added up the tree and adds it to ``.grad``; does nothing without any.

        ``optimizer.step()`` calls it. Call it yourself to clip or look at gradients before, or
        after each batch when accumulating over several.

        Raises:
            ValueError: the processes have other batches, parameters or hyperparameters.
            RankError: another process does not come, or has failed.
        """
        spheres = self._spheres
        if self._by_hand:
            self._ranks = self._membership.current_ranks(spheres.leaves)
        with self._lock:
            if not self._added and (self._ranks is None or not self._by_hand):
                return
            added, self._added = self._added, {}
            made, self._made = self._made, []
        parameters = self.parameters
        absent: list[Tensor | None] = [None] * len(parameters)
        shards = [added.get(leaf, absent) for leaf in range(spheres.leaves)]
        columns = [[s[i] for s in shards] for i in range(len(parameters))]
        if self._ranks is not None and self._by_hand:
            self._checks.meet(self._ranks)
        with phase(spheres, "sum"):
            gradients_taken(spheres, made)
            if self._ranks is None:
                sums = tree_sums(columns, spheres=spheres)
            else:
                sums = total_over_ranks(columns, parameters, self._ranks, spheres)
        for parameter, total in zip(parameters, sums, strict=True):
            if total is None:
                continue
            if parameter.grad is None:
                parameter.grad = total
            else:
                parameter.grad += total

    def remove(self) -> None:
        """Takes the hook off the optimizer. Gradients that were added and not summed are dropped.

        May be called more than once.
        """
        for handle in self._handles:
            handle.remove()
        with self._lock:
            self._added.clear()
            self._made.clear()


def trains(optimizer: torch.optim.Optimizer, module: nn.Module) -> bool:
    """Whether it has any of the module's parameters, or there are none."""
    known = {id(p) for p in module.parameters()}
    return not known or any(id(p) in known for g in optimizer.param_groups for p in g["params"])
