"""Random numbers that belong to a shard, not to the thread that happens to run it.

While a shard runs, whatever draws from torch's default generator — dropout in any layer, inside
LSTMs and attention, ``torch.rand``, noise, sampling — draws from the shard's own generator instead.
That one is seeded with *base + k* for shard *k*, as `torch.utils.data` seeds its workers, where
*base* is a single int64 drawn from the default generator in the call's first random operation. So:

- the numbers depend on the seed, on what was drawn before (the step) and on the shard alone;
- ``torch.get_rng_state()`` is all there is to save for bit-equal resumption;
- a model that draws nothing leaves the default generator alone.

How: an operator's kernel is chosen by dispatch keys, and a thread may include a key of its own.
Shards include one for which every operator falls through, at no cost, but for those that take a
`torch.Generator`: they come to `_draw`, which puts the shard's in. Operators that take none
(dropout, LSTM, attention) draw through those that do. `DeferredInit` is the key because PyTorch
declares it and uses it for nothing.
"""

from __future__ import annotations

import contextlib
import functools
import random
import threading
import warnings
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, library

from torch_spheres import _compat

__all__ = [
    "CallRandom",
    "RandomSource",
    "ShardRandom",
    "TrialRandom",
    "next_base",
    "numpy_state",
    "random_states",
    "restore_random_states",
]

_KEYS = _compat.DispatchKeySet(_compat.draw_key)
_SEEDS = 2**63 - 1
# As ``get_worker_info().rng`` has them.
_OF_PROCESS = SimpleNamespace(
    torch_generator=torch.default_generator, random_generator=random, numpy_generator=np.random
)

_here = threading.local()
_install_lock = threading.Lock()
_libraries: list[library.Library] = []  # kernels live as long as these


class CallRandom:
    """The random numbers of one call of a model: the base seed that its shards share.

    Args:
        base: the seed, where several processes have to have the same; it is drawn all the same, so
            that the default generator goes on as in one process.
        runs_on: the spheres that run the shards; None: the caller's thread does.
    """

    def __init__(self, base: int | None = None, runs_on: Any = None) -> None:
        self.runs_on = runs_on
        self._lock = threading.Lock()
        self._given = base
        self._base: int | None = None
        self._outer = current_shard()  # of another model, whose forward calls this one
        self._expected = _default_states()

    def base(self) -> int:
        """Drawn when the first shard needs it; whichever asks first, they all get the same."""
        with self._lock:
            if self._base is None:
                outer = self._outer
                drawn = _draw_base(
                    torch.default_generator if outer is None
                    else outer.generator(torch.device("cpu"))
                )  # fmt: skip
                self._base = drawn if self._given is None else self._given
                self._expected[0] = torch.default_generator.get_state()
            return self._base

    @property
    def drew(self) -> bool:
        """Whether a shard has needed it."""
        return self._base is not None

    def missed_any(self) -> bool:
        """Whether something drew from a default generator past the shards' own.

        Operators of other libraries can, and so can CUDA kernels that take no generator.
        """
        if self._outer is not None:
            return False  # shards of the outer model, at once, have the default generator go on
        now = _default_states()
        return len(now) != len(self._expected) or not all(map(torch.equal, now, self._expected))

    def warn_if_missed(self) -> None:
        """Says that random numbers were drawn that belong to no shard."""
        if self.missed_any():
            warnings.warn(
                "something drew random numbers from torch's default generator while the shards "
                "ran, but not through an operator that SphereParallel can key by shard (a custom "
                "C++ operator, a CUDA kernel with its own dropout, or another thread): the result "
                "is not reproducible. Draw with torch's own operators inside the module, or use "
                "torch.nn.attention.sdpa_kernel(SDPBackend.MATH)",
                RuntimeWarning,
                stacklevel=5,
            )


class RandomSource:
    """What stands in for the default generators on a thread: one with the same seed per device.

    Args:
        seed: asked for it with the first draw on a device.
    """

    def __init__(self, seed: Callable[[], int]) -> None:
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def active(self) -> contextlib.AbstractContextManager[None]:
        """On the calling thread: default random numbers come from here inside the block."""
        _install()
        return _Active(self)

    def generator(self, device: torch.device) -> torch.Generator:
        """In place of the default generator of the device."""
        generator = self._generators.get(device)
        if generator is None:
            generator = torch.Generator(device).manual_seed(self._seed())
            self._generators[device] = generator
        return generator

    def instead_of(self, given: torch.Generator, op: Any) -> torch.Generator:
        """In place of a generator that was handed to the operator: itself."""
        del op
        return given


class _Active:
    """See `RandomSource.active`; no generator, which takes longer."""

    __slots__ = ("_guard", "_outer", "_source")

    def __init__(self, source: RandomSource) -> None:
        self._source = source
        self._guard: Any = _compat.IncludeDispatchKey(_compat.draw_key)

    def __enter__(self) -> None:
        self._outer = current_shard()
        _here.shard = self._source
        self._guard.__enter__()

    def __exit__(self, *error: object) -> None:
        self._guard.__exit__(*error)
        _here.shard = self._outer


class ShardRandom(RandomSource):
    """The random numbers of one shard, through its forward and its backward.

    Args:
        call: the call of the model that it belongs to.
        shard: its number.
        leaf: of the tree, at which its gradients are summed.
    """

    def __init__(self, call: CallRandom, shard: int, leaf: int) -> None:
        super().__init__(lambda: call.base() + shard)
        self.call, self.leaf = call, leaf
        self.number_of: Callable[[Any], int | None] = lambda _: None
        """A module's number in the shard's replica, if it is part of that."""
        self.reentrant = False  # a reentrant checkpoint was met, see training/shard_task.py
        self.own_leaves: Callable[[], set[int]] = set  # by id, those that such a one may reach

    def instead_of(self, given: torch.Generator, op: Any) -> torch.Generator:
        """Refuses.

        Raises:
            RuntimeError: always.
        """
        del given
        raise RuntimeError(
            f"{op} was called with a generator of its own inside SphereParallel: the shards "
            "would draw from it in the order in which threads come by, and the numbers would "
            "not be reproducible. Leave generator= out: the shard's own generator is used "
            "then, seeded by torch.manual_seed()"
        )


class TrialRandom(RandomSource):
    """Random numbers of a forward that is only tried: they are nobody's.

    Attributes:
        any: whether there were any.
    """

    def __init__(self) -> None:
        super().__init__(self._begun)
        self.any = False

    def _begun(self) -> int:
        self.any = True
        return 0

    def instead_of(self, given: torch.Generator, op: Any) -> torch.Generator:
        """Ends the trial, which may not draw from somebody's generator."""
        del given
        raise RuntimeError(f"{op} was called with a generator of its own")


def next_base() -> int:
    """What `CallRandom` would draw now."""
    generator = torch.Generator()
    generator.set_state(torch.default_generator.get_state())
    return _draw_base(generator)


def _draw_base(generator: torch.Generator) -> int:
    # Also where the shards' key is included: this draw is nobody's but the generator's.
    with _compat.ExcludeDispatchKey(_KEYS):
        return int(torch.randint(_SEEDS, (), generator=generator, device="cpu"))


def random_states(rng: Any = _OF_PROCESS) -> dict[str, Any]:
    """Of torch's generator, Python's and numpy's, those of the process or a worker's ``rng``."""
    version, words, gauss = rng.random_generator.getstate()
    return {
        "torch": rng.torch_generator.get_state(),
        "python": [version, [*words], gauss],
        "numpy": numpy_state(rng.numpy_generator),
    }


def numpy_state(generator: Any) -> Any:
    """Plain values, which compare by ``==``, ``set_state`` takes and ``torch.load`` gives back.

    Args:
        generator: a `RandomState`, or `numpy.random`.
    """
    state = generator.get_state(legacy=False)
    return _compat.pytree.tree_map_only(np.ndarray, np.ndarray.tolist, state)


def restore_random_states(states: Mapping[str, Any], rng: Any = _OF_PROCESS) -> None:
    """Has the three go on from what `random_states` returned."""
    version, words, gauss = states["python"]
    rng.random_generator.setstate((version, tuple(words), gauss))
    rng.numpy_generator.set_state(states["numpy"])
    rng.torch_generator.set_state(states["torch"])


def current_shard() -> RandomSource | None:
    """The shard that the calling thread runs, if any."""
    return getattr(_here, "shard", None)


def _default_states() -> list[Tensor]:
    return [generator.get_state() for generator in _default_generators()]


def _default_generators() -> list[torch.Generator]:
    cuda = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
    return [torch.default_generator, *cuda]


def _is_default(generator: torch.Generator) -> bool:
    # By address: an operator's arguments come here in new Python objects.
    address: int = generator._cdata  # type: ignore[attr-defined]
    return any(address == known._cdata for known in _default_generators())  # type: ignore[attr-defined]


def _device_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    for value in (*args, kwargs.get("out")):
        if isinstance(value, Tensor):
            return value.device
    return torch.device(kwargs.get("device") or "cpu")


def _draw(op: Any, position: int | None, /, *args: Any, **kwargs: Any) -> Any:
    """Calls a random operator with the shard's generator in place of the default one."""
    shard = current_shard()
    with _compat.ExcludeDispatchKey(_KEYS):
        if shard is None:  # the key was included by somebody else
            return op(*args, **kwargs)
        in_args = position is not None and position < len(args)
        given = args[position] if in_args else kwargs.get("generator")  # type: ignore[index]
        if given is not None and not _is_default(given):
            generator = shard.instead_of(given, op)
        else:
            device = _device_of(args, kwargs)
            if device.type == "meta":
                return op(*args, **kwargs)
            generator = shard.generator(device)
        if in_args:
            assert position is not None
            args = (*args[:position], generator, *args[position + 1 :])
        else:
            kwargs = {**kwargs, "generator": generator}
        return op(*args, **kwargs)


def _native_dropout(x: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    """CUDA's kernel draws the mask inside; this is what the CPU's does, on any device."""
    if train is False or p == 0:
        return x.clone(), torch.ones_like(x, dtype=torch.bool)
    mask = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p)  # comes to _draw
    return x * mask * (0.0 if p == 1 else 1 / (1 - p)), mask


class _DefaultGenerator:
    """Stands for the default CPU generator in `torch.random`: a shard's own inside a shard.

    Activation checkpointing saves and restores the state of the random numbers around what it
    runs a second time, by way of `torch.get_rng_state` and `torch.set_rng_state`.
    """

    def __init__(self, default: torch.Generator) -> None:
        self._default = default

    def __getattr__(self, name: str) -> Any:
        shard = current_shard()
        here = self._default if shard is None else shard.generator(torch.device("cpu"))
        return getattr(here, name)


def _install() -> None:
    """Registers the kernels; once, when the first shard runs."""
    if _libraries:
        return
    with _install_lock:
        if _libraries:
            return
        everything = library.Library("_", "IMPL")
        everything.fallback(library.fallthrough_kernel, _compat.DRAW_KEY)
        aten = library.Library("aten", "IMPL")
        for schema in _compat.operator_schemas():
            if not schema.name.startswith("aten::"):
                continue
            # (initial_seed and seed read a generator, they do not draw from it.)
            taken = [
                None if argument.kwarg_only else position
                for position, argument in enumerate(schema.arguments)
                if argument.type.kind() == "OptionalType" and "Generator" in str(argument.type)
            ]
            if not taken:  # most: to look them all up would take longer than a first batch
                continue
            packet = getattr(torch.ops.aten, schema.name.removeprefix("aten::"), None)
            op = getattr(packet, schema.overload_name or "default", None)
            if op is not None:
                for where in taken:
                    aten.impl(op, functools.partial(_draw, op, where), _compat.DRAW_KEY)
        aten.impl("native_dropout", _native_dropout, _compat.DRAW_KEY)
        default = _DefaultGenerator(torch.default_generator)
        torch.random.default_generator = default  # type: ignore[assignment, attr-defined]
        _libraries.extend((everything, aten))
