"""Random numbers that depend on the shard, not on the thread that happens to run the shard.

While a shard runs, all that draws from torch's default generator — dropout in any layer, inside
LSTMs and attention, ``torch.rand``, noise, sampling — draws from the shard's own generator instead.
Shard *k*'s generator has the seed ``base + k``, as `torch.utils.data` seeds its workers, where
``base`` is one int64 that the call's first random operation draws from the default generator. So:

- the numbers depend only on the seed, on what was drawn before (the step) and on the shard;
- ``torch.get_rng_state()`` is all there is to save for bit-equal resumption;
- a model that draws nothing leaves the default generator alone.

How it works: torch chooses an operator's kernel by dispatch keys, and a thread may include a key.
Shards include one for which every operator falls through, at no cost, except those that take a
`torch.Generator`: for these `_draw` is the kernel, which passes the shard's generator on. Operators
that take none (dropout, LSTM, attention) draw through operators that do. The key is `DeferredInit`,
which PyTorch declares and does not use.

`training` uses this for shards, `data` for a loader's workers.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, library

from torch_spheres import _compat
from torch_spheres.runtime.random_states import random_states, undo_draws
from torch_spheres.runtime.stack_level import users_level

__all__ = [
    "CallRandom",
    "RandomSource",
    "ShardRandom",
    "TrialRandom",
    "peek_base",
]

_KEYS = _compat.DispatchKeySet(_compat.draw_key)
_MAX_SEED = 2**63 - 1

# What a shard's generator has for a state before its first draw.
_NOTHING_DRAWN = torch.Generator().manual_seed(0x7E5C_5943_A11E_D0).get_state()

_here = threading.local()
_install_lock = threading.Lock()
_libraries: list[library.Library] = []  # keep the kernels registered


class CallRandom:
    """The base seed that all shards of one call of a model share.

    Args:
        base: the seed, if several processes need the same one. A seed is drawn nevertheless, so
            that the default generator advances as in one process.
        runs_on: the pool that runs the shards; None: the calling thread runs them.
    """

    def __init__(self, base: int | None = None, runs_on: Any = None) -> None:
        self.runs_on = runs_on
        self._lock = threading.Lock()
        self._given = base
        self._base: int | None = None
        self._outer = current_source()  # if the forward of another model makes this call
        self._expected = _default_states()

    def base(self) -> int:
        """Returns the base seed; the first shard to need it draws it."""
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
        """Whether a shard has drawn random numbers."""
        return self._base is not None

    def _drew_elsewhere(self) -> bool:
        # Operators of other libraries can draw from a default generator past the shards' own, and
        # so can CUDA kernels that take no generator.
        if self._outer is not None:
            return False  # the outer model's other shards advance the default generator meanwhile
        now = _default_states()
        return len(now) != len(self._expected) or not all(map(torch.equal, now, self._expected))

    def warn_if_missed(self) -> None:
        """Warns of random numbers that were drawn from a default generator past the shards' own."""
        if self._drew_elsewhere():
            warnings.warn(
                "something drew random numbers from torch's default generator while the shards "
                "ran, but not through an operator that SphereParallel can key by shard (a custom "
                "C++ operator, a CUDA kernel with its own dropout, or another thread): the result "
                "is not reproducible. Draw with torch's own operators inside the module, or use "
                "torch.nn.attention.sdpa_kernel(SDPBackend.MATH)",
                RuntimeWarning,
                stacklevel=users_level(),
            )


class RandomSource:
    """Replaces the default generators on a thread, by one for each device, all of one seed.

    Args:
        seed: returns the seed; is called at the first draw on each device.
    """

    def __init__(self, seed: Callable[[], int]) -> None:
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def active(self) -> contextlib.AbstractContextManager[None]:
        """Context in which the calling thread's default random numbers come from this source."""
        _install()
        return _ActiveSource(self)

    def generator(self, device: torch.device) -> torch.Generator:
        """The generator that replaces the device's default generator."""
        generator = self._generators.get(device)
        if generator is None:
            generator = torch.Generator(device).manual_seed(self._seed())
            self._generators[device] = generator
        return generator

    @property
    def has_drawn(self) -> bool:
        """Whether the CPU's generator has been made."""
        return torch.device("cpu") in self._generators

    def forget_draws(self) -> None:
        """Has the CPU's generator begin anew, with the same seed."""
        self._generators.pop(torch.device("cpu"), None)

    def replace_given(self, given: torch.Generator, op: Any) -> torch.Generator:
        """The generator that replaces one that was given to an operator: itself."""
        del op
        return given


class _ActiveSource:
    """The context of `RandomSource.active`; a generator function would take longer."""

    __slots__ = ("_guard", "_outer", "_source")

    def __init__(self, source: RandomSource) -> None:
        self._source = source
        self._guard: Any = _compat.IncludeDispatchKey(_compat.draw_key)

    def __enter__(self) -> None:
        self._outer = current_source()
        _here.source = self._source
        self._guard.__enter__()

    def __exit__(self, *error: object) -> None:
        self._guard.__exit__(*error)
        _here.source = self._outer


class ShardRandom(RandomSource):
    """The random numbers of one shard in its forward and backward pass.

    Args:
        call: the call of the model that the shard belongs to.
        shard: its number.
        leaf: the leaf of the tree at which its gradients are summed.

    Attributes:
        number_of: returns a module's number in the shard's replica; None: it is no part of that.
        reentrant: whether the shard has met a reentrant activation checkpoint, see
            training/shard.py.
        own_leaves: returns the ids of the leaf tensors that such a checkpoint may reach.
    """

    def __init__(self, call: CallRandom, shard: int, leaf: int) -> None:
        super().__init__(lambda: call.base() + shard)
        self.call, self.leaf = call, leaf
        self.number_of: Callable[[Any], int | None] = lambda _: None
        self.reentrant = False
        self.own_leaves: Callable[[], set[int]] = set

    def replace_given(self, given: torch.Generator, op: Any) -> torch.Generator:
        """Raises a RuntimeError."""
        del given
        raise RuntimeError(
            f"{op} was called with a generator of its own inside SphereParallel: the shards "
            "would draw from it in the order in which threads come by, and the numbers would "
            "not be reproducible. Leave generator= out: the shard's own generator is used "
            "then, seeded by torch.manual_seed()"
        )


class TrialRandom(RandomSource):
    """The random numbers of a pass whose result is thrown away.

    torch's come from a generator of the trial's own. The process's is never put back, since other
    threads may draw from it meanwhile.

    Attributes:
        drew: whether there were any.
    """

    def __init__(self) -> None:
        super().__init__(self._first_seed)
        self.drew = False

    def _first_seed(self) -> int:
        self.drew = True
        return 0

    def replace_given(self, given: torch.Generator, op: Any) -> torch.Generator:
        """Raises a RuntimeError, which ends the trial: the user's generator must not advance."""
        del given
        raise RuntimeError(f"{op} was called with a generator of its own")

    @contextlib.contextmanager
    def leaving_no_trace(self) -> Iterator[None]:
        """Context in which this source is active; puts Python's and numpy's generators back."""
        before = random_states()
        try:
            with self.active():
                yield
        finally:
            self.drew |= undo_draws(before)


def peek_base() -> int:
    """The base seed that a `CallRandom` would draw now; the default generator does not advance."""
    generator = torch.Generator()
    generator.set_state(torch.default_generator.get_state())
    return _draw_base(generator)


def _draw_base(generator: torch.Generator) -> int:
    # Inside a shard too, the draw must come from the generator that is given.
    with _compat.ExcludeDispatchKey(_KEYS):
        return int(torch.randint(_MAX_SEED, (), generator=generator, device="cpu"))


def current_source() -> RandomSource | None:
    """The source that is active on the calling thread: of a shard, a trial or a worker."""
    return getattr(_here, "source", None)


def _default_states() -> list[Tensor]:
    return [generator.get_state() for generator in _default_generators()]


def _default_generators() -> list[torch.Generator]:
    cuda = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
    return [torch.default_generator, *cuda]


def _is_default(generator: torch.Generator) -> bool:
    # Compared by address: the dispatcher wraps an operator's arguments in new Python objects.
    address: int = generator._cdata  # type: ignore[attr-defined]
    return any(address == known._cdata for known in _default_generators())  # type: ignore[attr-defined]


def _device_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    for value in (*args, kwargs.get("out")):
        if isinstance(value, Tensor):
            return value.device
    return torch.device(kwargs.get("device") or "cpu")


def _is_compiling() -> bool:
    """Whether operators are recorded for the compiler on the calling thread, and not run."""
    keys = _compat.dispatch_mode_keys
    kinds = (keys.FAKE, keys.PROXY, keys.FUNCTIONAL)
    return any(_compat.dispatch_mode_of(kind) is not None for kind in kinds)


@_compat.disable_compiler
def _draw(op: Any, position: int | None, /, *args: Any, **kwargs: Any) -> Any:
    """Calls a random operator with the active source's generator in place of the default one."""
    source = current_source()
    with _compat.ExcludeDispatchKey(_KEYS):
        # Another library has included the key; or code is compiled, which must draw from whatever
        # generator is the default one where it runs.
        if source is None or _is_compiling():
            return op(*args, **kwargs)
        in_args = position is not None and position < len(args)
        given = args[position] if in_args else kwargs.get("generator")  # type: ignore[index]
        if given is not None and not _is_default(given):
            generator = source.replace_given(given, op)
        else:
            device = _device_of(args, kwargs)
            if device.type == "meta":
                return op(*args, **kwargs)
            generator = source.generator(device)
        if in_args:
            assert position is not None
            args = (*args[:position], generator, *args[position + 1 :])
        else:
            kwargs = {**kwargs, "generator": generator}
        return op(*args, **kwargs)


@_compat.disable_compiler
def _native_dropout(x: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    """The CPU's kernel, for any device: CUDA's own draws its mask without a generator."""
    if train is False or p == 0:
        return x.clone(), torch.ones_like(x, dtype=torch.bool)
    mask = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p)  # its kernel is _draw
    return x * mask * (0.0 if p == 1 else 1 / (1 - p)), mask


class _DefaultGenerator:
    """Replaces `torch.random.default_generator`; inside a shard it is the shard's generator.

    Activation checkpointing saves and restores the generator's state around the second forward
    pass, by `torch.get_rng_state` and `torch.set_rng_state`.
    """

    def __init__(self, default: torch.Generator) -> None:
        self._default = default

    @_compat.disable_compiler
    def __getattr__(self, name: str) -> Any:
        source = current_source()
        here = self._default if source is None else source.generator(torch.device("cpu"))
        return getattr(here, name)

    @_compat.disable_compiler
    def get_state(self) -> Tensor:
        """As a generator's; inside a shard that has drawn nothing yet, `_NOTHING_DRAWN`."""
        source = current_source()
        if source is not None and not source.has_drawn:
            # (A seed would be drawn for it. torch.compile asks for the state of each frame.)
            return _NOTHING_DRAWN.clone()
        return self.__getattr__("get_state")()  # type: ignore[no-any-return]

    @_compat.disable_compiler
    def set_state(self, state: Tensor) -> torch.Generator:
        """As a generator's, and its inverse for `_NOTHING_DRAWN`."""
        source = current_source()
        if source is not None and torch.equal(state, _NOTHING_DRAWN):
            source.forget_draws()
            return torch.default_generator
        return self.__getattr__("set_state")(state)  # type: ignore[no-any-return]


def _install() -> None:
    """Registers the kernels, once, when the first source is activated."""
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
            # Operators that require a generator (seed, initial_seed) do not draw from it.
            positions = [
                None if argument.kwarg_only else position
                for position, argument in enumerate(schema.arguments)
                if argument.type.kind() == "OptionalType" and "Generator" in str(argument.type)
            ]
            if not positions:  # most operators: to look them all up takes long
                continue
            packet = getattr(torch.ops.aten, schema.name.removeprefix("aten::"), None)
            op = getattr(packet, schema.overload_name or "default", None)
            if op is not None:
                for position in positions:
                    aten.impl(op, functools.partial(_draw, op, position), _compat.DRAW_KEY)
        aten.impl("native_dropout", _native_dropout, _compat.DRAW_KEY)
        default = _DefaultGenerator(torch.default_generator)
        torch.random.default_generator = default  # type: ignore[assignment, attr-defined]
        _libraries.extend((everything, aten))
