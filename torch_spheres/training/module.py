"""`SphereParallel`: forward and backward of a batch's shards, at once, on shared weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from torch_spheres.distributed.gather_rows import gather_rows
from torch_spheres.distributed.group import ProcessGroup
from torch_spheres.runtime.arguments import as_index
from torch_spheres.training.delegation import Delegating
from torch_spheres.training.engine import Engine, start_engine
from torch_spheres.training.parallel_forward import (
    PARALLEL_FORWARD,
    ParallelForward,
    keeping_grad_mode,
)
from torch_spheres.training.shard_timing import ShardTimes, suggest_shards

if TYPE_CHECKING:
    from torch_spheres.spheres import KissingSpheres

__all__ = ["SphereParallel"]


class SphereParallel(Delegating):
    """Runs a module on the spheres: the rows of each batch are split over the leaves.

    Use it in place of the module; the loop stays as it is, and ``.grad`` is complete when
    ``backward()`` returns. Names of parameters, buffers and parts are those of the module, and so
    are its attributes and methods, which are read and set here as there; ``.module`` is the module
    itself. For frameworks that look at the class there is `parallelize_`.

    Args:
        module: the model. Its parameters and attributes are shared by all shards, never copied; a
            running shard has a shallow copy of the modules, and the buffers that it writes to.
        spheres: who runs the shards; None makes a `KissingSpheres` of two levels.
        reproducible: True: shards are a fixed part of the batch, run with one intra-op thread each,
            and are summed in the fixed tree, so for one build of torch the bits of outputs,
            gradients, buffers and weights do not depend on ``spheres.concurrency``, on which thread
            ran what, nor on the number of processes. (A UserWarning says once if the bare module
            turns out to be faster.) False: a few ways to run the batch are measured during the
            first 6 to 53 steps, among them the bare module, and the fastest is kept; see `plan`.
            (With several processes it is as True.)
        process_group: with `torch.distributed` initialised, the processes that share each batch:
            None: all of them. False: none, this process is alone with its batch (inside
            `DistributedDataParallel`, for one).
        batch_dim: the dimension of the batch's rows: of all arguments, or a dict from names of
            arguments of the module's forward to theirs (others have 0). It also says that a list,
            or a square matrix, has the batch's rows.
        whole: names of arguments that every shard gets as they are: a mask over positions, a table.
        shards: into how many a batch is cut: a divisor of the leaves (1, 2, 3, 4, 6 or 12 with two
            levels). None: as many as there are leaves. Fewer, larger shards cost less; more of them
            spread over more cores and processes. The bits depend on it. See `suggest_shards`.
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
    the rows of two shards are run together and alone, in evaluation mode (once in training, too, if
    there is no batch norm), without a trace in buffers and random numbers. A UserWarning says once
    if the model is not row-wise: if it looks across the rows of a batch, or its batch is another
    dimension. Values of a module that draws random numbers in that mode are not compared.

    Parameters: hooks on them, and what `torch.autograd.grad` returns, see the whole batch's
    gradient, once. Hooks on modules run in each shard, with the shard's rows; those on this object
    run once, with the whole batch.

    Whatever else the forward reaches that requires a gradient gets it as well: layers in lists,
    tensors on attributes and in closures. (In closures they are looked for in the first calls, in
    those whose number is a power of two, and wherever there have been some.)

    Buffers: every shard starts from the same values; of those that changed, floating-point ones
    become the mean over the shards that ran (summed in the tree), others those of the first shard.
    Where `BatchNorm1d` trains, a shard has at least two rows. Batch norm sees a shard's rows;
    `convert_sync_batchnorm` makes it see the whole batch.

    Random numbers (dropout, ``torch.rand``, ...) come from a generator of each shard's own, seeded
    by one number drawn from torch's default generator in the call: see `torch_spheres.runtime.rng`.
    Python's and numpy's generators are not keyed by shard.

    Attributes: each shard begins with the module's own, which are the user's objects. What a
    forward sets on them is lost after its shard, and a UserWarning names it once. A forward that
    writes to parameters, or in place to what the shards share, is refused with a RuntimeError,
    however it writes (see `torch_spheres.training.forward_effects` for when that is noticed).

    On an accelerator the shards run one after another in the calling thread; the device sums.

    Raises:
        TypeError: `module` is not an `nn.Module` or already a parallel one, or `spheres` not a
            `KissingSpheres`, or another argument of the wrong type.
        ValueError: the processes cannot share the shards evenly, or have different models; or
            `batch_dim` or `whole` has the name of no argument; or `shards` does not divide the
            leaves.
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
        shards: int | None = None,
    ) -> None:
        engine = start_engine(
            module, spheres, reproducible=reproducible, process_group=process_group,
            batch_dim=batch_dim, whole=whole, scalars=scalars, shards=shards,
        )  # fmt: skip
        super().__init__(module)
        forward = vars(self)[PARALLEL_FORWARD] = ParallelForward(engine)
        if type(self).forward is SphereParallel.forward:
            vars(self)["forward"] = forward  # where it has the signature of the module's own

    @property
    def _engine(self) -> Engine:
        forward: ParallelForward = vars(self)[PARALLEL_FORWARD]
        return forward.engine

    @property
    def spheres(self) -> KissingSpheres:
        """The hierarchy that runs the shards."""
        return self._engine.spheres

    @property
    def reproducible(self) -> bool:
        """As it was given."""
        return self._engine.reproducible

    @property
    def shards(self) -> int:
        """Into how many shards a batch is cut."""
        return self._engine.shards

    @property
    def plan(self) -> str | None:
        """How batches are run in training; None while that is being measured."""
        return self._engine.plan

    @property
    def plan_costs(self) -> dict[str, float]:
        """What each way to run a batch in training took so far, in seconds per row."""
        return self._engine.plan_costs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs a batch in shards.

        Args:
            args: of the module; see the class for what is split.
            kwargs: of the module.

        Returns:
            What the module returns for the batch; see the class for how it is put together.
        """
        return vars(self)[PARALLEL_FORWARD](*args, **kwargs)

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
        return keeping_grad_mode(lambda: self._engine.forward_backward(loss_fn, inputs, targets))  # type: ignore[no-any-return]

    def suggest_shards(self, *args: Any, repeats: int = 5, **kwargs: Any) -> ShardTimes:
        """Measures a forward and backward of a batch in each number of shards, and in plain torch.

        As in ``print(model.suggest_shards(x))``. It changes nothing: neither this model's `shards`,
        of which its bits depend, nor weights, ``.grad``, buffers, arguments or random numbers; and
        no hook is called, unless the forward fails without. (Other objects that a forward changes,
        as a list of its own, each pass changes.) Call it with nothing else running.

        Args:
            args: of the model, as for a call: a batch as it comes in training.
            repeats: measurements of each number, whose medians count.
            kwargs: of the model.

        Returns:
            The numbers' times as multiples of plain PyTorch's, and the number to use.

        Raises:
            TypeError: `repeats` is not an integer.
            ValueError: it is less than 1.
            RuntimeError: the module is lazy and has no shapes yet; or a shard calls this, or
                somebody in ``torch.inference_mode()``, which has no backward.
        """
        return suggest_shards(self._engine, args, kwargs, as_index("repeats", repeats, 1))

    def gather(self, rows: Tensor) -> Tensor:
        """Gathers all ranks' rows of a tensor.

        For a loss over the whole batch, which every rank computes, with its gradient for this
        rank's rows: bit for bit that of one process ::

            loss = criterion(model.gather(model(x)), model.gather(y))

        Args:
            rows: outputs of this model, or what came from them row by row, or anything else that
                has this rank's rows, such as targets: in the first dimension, or in `batch_dim`.

        Returns:
            The batch's rows in order, of the same dtype; in one process, `rows` itself.

        Raises:
            ValueError: the ranks do not have their groups' rows of one batch.
        """
        if self._engine.ranks is None:
            return rows
        dim = max(0, min(self._engine.options.default_dim, rows.dim() - 1))
        return gather_rows(rows, self._engine.ranks, self._engine.shards, dim)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Context for gradient accumulation, as in DistributedDataParallel; changes nothing here.

        ``backward()`` always adds the whole batch's gradient to ``.grad``, over all processes:
        their sum would have other bits if it came later.
        """
        yield

    def __setstate__(self, state: dict[str, Any]) -> None:
        """For deep copies, on the same spheres, and for what is unpickled, on its own."""
        super().__setstate__(state)
        self._engine.module = self.module
