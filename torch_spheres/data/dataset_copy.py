"""Copies of a dataset for logical workers: what one sets on its copy, no other worker sees."""

from __future__ import annotations

import copy
import functools
import multiprocessing.sharedctypes
import multiprocessing.synchronize
import warnings
from types import MethodType
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from torch_spheres.runtime.object_graph import walk
from torch_spheres.runtime.rebinding import rebound

__all__ = ["shallow_copy", "shared_memory_in"]

_SHARED = (multiprocessing.sharedctypes.SynchronizedBase, multiprocessing.synchronize.SemLock)
_CONTAINERS = (list, tuple, dict)


def shallow_copy(dataset: Any, known: dict[int, Any] | None = None) -> Any:
    """A copy with attributes of its own, whose values are shared with the original.

    Datasets among these values, also in lists, tuples and dicts (`Subset`, `ConcatDataset`), are
    copied in the same way, each once. Objects without attributes, or with a ``__copy__`` (an array
    would copy its data), are shared; so is what cannot be copied, with a warning.

    Args:
        dataset: of any class.
        known: copies that were made already, by the original's id; new ones are added.
    """
    known = {} if known is None else known
    if id(dataset) in known:
        return known[id(dataset)]
    if not isinstance(dataset, Dataset) and (
        hasattr(type(dataset), "__copy__") or not hasattr(dataset, "__dict__")
    ):
        return dataset
    try:
        made = copy.copy(dataset)
    except Exception as error:  # noqa: BLE001
        warnings.warn(
            f"{type(dataset).__name__} cannot be copied ({error!r}), so that the logical workers "
            "share it: what one of them sets on it is there for the others",
            UserWarning,
            stacklevel=2,
        )
        made = dataset
    known[id(dataset)] = made
    attributes = getattr(made, "__dict__", None)
    if made is dataset or attributes is None:
        return made
    for name, value in [*attributes.items()]:
        new = _copied_inside(value, known)
        if isinstance(value, (MethodType, functools.partial)):
            new = rebound(value, known)  # a method of the dataset becomes one of its copy
        if new is not value:
            attributes[name] = new
    return made


def _copied_inside(value: Any, known: dict[int, Any]) -> Any:
    if isinstance(value, Dataset):
        return shallow_copy(value, known)
    if type(value) not in _CONTAINERS:
        return value
    items = [*(value.values() if isinstance(value, dict) else value)]
    if not items or not isinstance(items[0], Dataset):  # only the first: lists can be long
        return value
    new = [_copied_inside(item, known) for item in items]
    return dict(zip(value, new, strict=True)) if isinstance(value, dict) else type(value)(new)


def shared_memory_in(dataset: Any) -> dict[int, Any]:
    """The `memo` with which `copy.deepcopy` shares memory that worker processes share, too."""
    shared: dict[int, Any] = {}
    for _, value in walk([("", dataset)]):
        if isinstance(value, _SHARED) or (isinstance(value, Tensor) and value.is_shared()):
            shared[id(value)] = value
    return shared
