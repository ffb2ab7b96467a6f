"""`parallelize_`: what `SphereParallel` does, in place, for frameworks that look at the class."""

from __future__ import annotations

import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from torch import nn

from torch_spheres import _compat
from torch_spheres.distributed.group import ProcessGroup
from torch_spheres.training.engine import Engine, check_model, start_engine
from torch_spheres.training.lazy_modules import is_lazy
from torch_spheres.training.parallel_forward import (
    PARALLEL_FORWARD,
    ParallelForward,
    keeping_grad_mode,
)

if TYPE_CHECKING:
    from torch_spheres.spheres import KissingSpheres

__all__ = ["parallelize_"]

Model = TypeVar("Model", bound=nn.Module)


def parallelize_(
    model: Model,
    spheres: KissingSpheres | None = None,
    *,
    reproducible: bool = True,
    process_group: ProcessGroup | bool | None = None,
    batch_dim: int | Mapping[str, int] = 0,
    whole: Sequence[str] = (),
    scalars: Literal["mean", "sum"] = "mean",
    shards: int | None = None,
) -> Model:
    """Has a model run its batches on the spheres, as `SphereParallel(model)` does, in place.

    The model stays the object that it is, of its own class, so that frameworks save, load, inspect
    and call it as ever: Hugging Face's ``Trainer``, a ``LightningModule``. Outputs, gradients and
    weights have the bits that `SphereParallel` gives. Deep copies run on the same spheres; what is
    unpickled makes spheres of its own.

    What is set is ``model.forward``, on this one object: its ``engine`` has ``spheres``,
    ``reproducible``, ``plan`` and ``plan_costs``, and ``model.forward.remove()`` takes it off
    again. Hooks on the model itself run once, with the whole batch; hooks on its parts run in each
    shard. ``forward_backward`` and ``gather`` are methods of `SphereParallel` only.

    Args:
        model: its own forward runs in each shard, also one that was set on the object before.
        spheres: as of `SphereParallel`.
        reproducible: as of `SphereParallel`.
        process_group: as of `SphereParallel`.
        batch_dim: as of `SphereParallel`.
        whole: as of `SphereParallel`.
        scalars: as of `SphereParallel`.
        shards: as of `SphereParallel`.

    Returns:
        The same model.

    Raises:
        TypeError: as `SphereParallel`; or the model runs in parallel already, or is compiled.
        ValueError: as `SphereParallel`; or the model is lazy itself and shared by processes.
        RankError: as `SphereParallel`.
    """
    check_model(model)
    if _compat.is_compiled(model):
        raise TypeError(
            f"the {type(model).__name__} is compiled as a whole, whose code cannot be run in "
            "shards in place; compile its parts, or use SphereParallel(torch.compile(model))"
        )
    engine = start_engine(
        model, spheres, reproducible=reproducible, process_group=process_group,
        batch_dim=batch_dim, whole=whole, scalars=scalars, shards=shards,
    )  # fmt: skip
    if engine.ranks is not None and is_lazy(model):
        raise ValueError(
            f"the {type(model).__name__} would take its shapes and values from each rank's rows; "
            "call it once before parallelize_, or use SphereParallel"
        )
    forward = InPlaceForward(model, engine)
    vars(model).update({"forward": forward, PARALLEL_FORWARD: forward})
    return model


class InPlaceForward(ParallelForward):
    """The forward of a model that is run in shards in place.

    The shards run a second object of the model's class, with the model's own attributes, but
    without this forward and without the model's hooks, which its call has run by then.
    """

    __doc__ = ParallelForward.__doc__  # a property: for callers it is the model's own

    def __init__(self, model: nn.Module, engine: Engine) -> None:
        super().__init__(engine)
        self._own = vars(model).get("forward")
        self._attach(model)

    def _attach(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)  # the model has this object, and is freed when it goes
        self.engine.module = bare = object.__new__(type(model))
        self.engine.pool.user_module = self._model
        self.engine.pool.calls_forward = True
        self._instead: dict[str, Any] = {name: OrderedDict() for name in _compat.FORWARD_HOOKS}
        own = self._own
        if own is not None:
            is_method = isinstance(own, types.MethodType) and own.__self__ is model
            self._instead["forward"] = types.MethodType(own.__func__, bare) if is_method else own

    @property
    def model(self) -> nn.Module:
        """That it was made for."""
        model = self._model()
        if model is None:
            raise RuntimeError("the model of this forward is gone; keep the model, and call that")
        return model

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """With the attributes that the model has now."""
        model, bare = self.model, self.engine.module
        left_out = ("forward", PARALLEL_FORWARD, *_compat.COMPILED)
        attributes = {
            name: value
            for name, value in vars(model).items()
            if name not in left_out and type(value) is not InPlaceForward
        }
        if type(bare) is not type(model):  # parametrizations and lazy modules change it
            bare.__class__ = type(model)
        object.__setattr__(bare, "__dict__", attributes | self._instead)
        return keeping_grad_mode(lambda: self.engine.forward(self.__wrapped__, args, kwargs))

    def is_used_by(self, model: nn.Module) -> bool:
        """Not if ``del model.forward`` was the way back."""
        return super().is_used_by(model) and "forward" in vars(model)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        own: Callable[..., Any] | None = self._own
        return types.MethodType(type(self.model).forward, self.model) if own is None else own

    def remove(self) -> None:
        """Gives the model the forward back that it had before `parallelize_`.

        Raises:
            RuntimeError: it has another one by now.
        """
        attributes = vars(self.model)
        if attributes.get("forward") is not self:
            raise RuntimeError(
                "the model's forward is another one by now, which has to be taken off before"
            )
        del attributes["forward"], attributes[PARALLEL_FORWARD]
        if self._own is not None:
            attributes["forward"] = self._own

    def __getstate__(self) -> dict[str, Any]:
        """For deep copies and pickles of the model, which bring a copy of it here."""
        return {"engine": self.engine, "own": self._own, "model": self.model}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.engine, self._own = state["engine"], state["own"]
        self._attach(state["model"])
