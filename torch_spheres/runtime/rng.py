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

`training` uses this for shards, `data` for a loader's workers, `checkpoint` to save states.
"""

from __future__ import annotations

import contextlib
import functools
import random
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
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
    "numpy_state",
    "peek_base",
    "random_states",
    "restore_random_states",
    "undo_draws",
]

_KEYS = _compat.DispatchKeySet(_compat.draw_key)
_MAX_SEED = 2**63 - 1
# With the attributes of ``get_worker_info().rng``.
_PROCESS_GENERATORS = SimpleNamespace(
    torch_generator=torch.default_generator, random_generator=random, numpy_generator=np.random
)

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
                stacklevel=5,
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
            self.drew |= undo_draws(before, of_torch=False)


def peek_base() -> int:
    """The base seed that a `CallRandom` would draw now; the default generator does not advance."""
    generator = torch.Generator()
    generator.set_state(torch.default_generator.get_state())
    return _draw_base(generator)


def _draw_base(generator: torch.Generator) -> int:
    # Inside a shard too, the draw must come from the generator that is given.
    with _compat.ExcludeDispatchKey(_KEYS):
        return int(torch.randint(_MAX_SEED, (), generator=generator, device="cpu"))


def random_states(rng: Any = _PROCESS_GENERATORS) -> dict[str, Any]:
    """The states of torch's, Python's and numpy's generators, as plain values and a tensor.

    Args:
        rng: has the generators: a worker's ``get_worker_info().rng``; default: the process's.
    """
    version, words, gauss = rng.random_generator.getstate()
    return {
        "torch": rng.torch_generator.get_state(),
        "python": [version, [*words], gauss],
        "numpy": numpy_state(rng.numpy_generator),
    }


def numpy_state(generator: Any) -> Any:
    """The state of a `RandomState` or of `numpy.random`, as plain values.

    Plain values can be compared by ``==``, set by ``set_state`` and loaded by ``torch.load``.
    """
    state = generator.get_state(legacy=False)
    return _compat.pytree.tree_map_only(np.ndarray, np.ndarray.tolist, state)


def restore_random_states(states: Mapping[str, Any], rng: Any = _PROCESS_GENERATORS) -> None:
    """Sets the generators' states to what `random_states` returned, or to some of it."""
    if "python" in states:
        version, words, gauss = states["python"]
        rng.random_generator.setstate((version, tuple(words), gauss))
    if "numpy" in states:
        rng.numpy_generator.set_state(states["numpy"])
    if "torch" in states:
        rng.torch_generator.set_state(states["torch"])


def undo_draws(before: Mapping[str, Any], *, of_torch: bool) -> bool:
    """Puts those of the process's generators back that have moved; returns whether one had.

    Other threads then draw the same numbers again: `of_torch` is for who has drawn from it.
    """
    now = random_states()
    moved = [name for name in ("python", "numpy") if now[name] != before[name]]
    if of_torch and not torch.equal(now["torch"], before["torch"]):
        moved.append("torch")
    restore_random_states({name: before[name] for name in moved})
    return bool(moved)


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


def _draw(op: Any, position: int | None, /, *args: Any, **kwargs: Any) -> Any:
    """Calls a random operator with the active source's generator in place of the default one."""
    source = current_source()
    with _compat.ExcludeDispatchKey(_KEYS):
        if source is None:  # another library has included the key
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

    def __getattr__(self, name: str) -> Any:
        source = current_source()
        here = self._default if source is None else source.generator(torch.device("cpu"))
        return getattr(here, name)


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
