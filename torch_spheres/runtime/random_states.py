"""The states of torch's, Python's and numpy's generators: read, put back, compared.

Used by `checkpoint`, by a loader's state, and by passes whose results are thrown away.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from torch_spheres import _compat

__all__ = ["numpy_state", "random_states", "restore_random_states", "undo_draws"]

# With the attributes of ``get_worker_info().rng``.
_PROCESS_GENERATORS = SimpleNamespace(
    torch_generator=torch.default_generator, random_generator=random, numpy_generator=np.random
)


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


def undo_draws(before: Mapping[str, Any]) -> bool:
    """Puts Python's and numpy's generators back if they have moved; returns whether one had."""
    now = random_states()
    moved = [name for name in ("python", "numpy") if now[name] != before[name]]
    restore_random_states({name: before[name] for name in moved})
    return bool(moved)
