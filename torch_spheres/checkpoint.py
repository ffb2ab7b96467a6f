"""Checkpoints: what a training needs to go on with the same bits, in a file that is always whole.

For users, of anything that has a ``state_dict()``:

::

    parts = {"model": model, "optimizer": optimizer, "loader": loader}
    step = ts.load_checkpoint("run/last.pt", **parts) or 0
    while step < steps:
        for x, y in loader:
            ...
            step += 1
            ts.save_checkpoint("run/last.pt", step=step, **parts)
"""

from __future__ import annotations

import contextlib
import copy
import errno
import os
import secrets
import shutil
import sys
import warnings
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from torch_spheres import _compat
from torch_spheres.distributed.drift import (
    comparable_values,
    digest_of,
    digests,
    first_difference,
)
from torch_spheres.distributed.group import Ranks, find_ranks
from torch_spheres.errors import DeferredError, RankError
from torch_spheres.runtime.arguments import as_index
from torch_spheres.runtime.random_states import random_states, restore_random_states
from torch_spheres.runtime.stack_level import users_level

__all__ = ["checkpoint_state", "load_checkpoint", "restore_checkpoint_state", "save_checkpoint"]

T = TypeVar("T")
StrPath = str | os.PathLike[str]
_FORMAT = "torch_spheres_checkpoint"  # a key whose value is the version


def checkpoint_state(*, step: int = 0, **objects: Any) -> dict[str, Any]:
    """The objects' states, the random states and the step, as a dict of tensors and plain values.

    The dict is for `torch.save`, `torch.distributed.checkpoint` or a file of your own; you may add
    other keys. Its tensors are the objects' own, as in any ``state_dict()``: ``copy.deepcopy`` it
    to keep it.

    Args:
        step: how many steps have been done.
        objects: whatever has ``state_dict()`` and ``load_state_dict()``: models, optimizers,
            schedulers, a ``GradScaler``, a wrapped loader, a sampler; each by a name of its own.

    Returns:
        The objects' states, and those of Python's, numpy's and torch's default generator (the
        CPU's, from which `SphereParallel` derives all it draws).

    Raises:
        TypeError: an object has no state, a sharded one is no model's, or `step` is no integer.
    """
    _compat.require(_compat.CHECKPOINT)
    _need_states(objects)
    # torch.distributed.checkpoint loses empty dicts and makes keys strings, but not in a tuple,
    # which is one value to it. Models stay bare, since it saves their shards.
    parts = {
        name: thing.state_dict() if isinstance(thing, nn.Module) else (thing.state_dict(),)
        for name, thing in objects.items()
    }
    _refuse_sharded({name: part for name, part in parts.items() if isinstance(part, tuple)})
    step = as_index("step", step)
    shards = {name: n for name, thing in objects.items() if (n := _shards_of(thing)) is not None}
    return {
        _FORMAT: 1, "step": step, "objects": parts, "random": random_states(), "shards": shards,
    }  # fmt: skip


def restore_checkpoint_state(state: Mapping[str, Any], /, **objects: Any) -> int:
    """Loads a `checkpoint_state` into the objects and the random generators.

    Loaders, schedulers and the like are loaded first, then models, then optimizers, then the random
    states. The state can be used again.

    Args:
        state: from `checkpoint_state`.
        objects: as of `checkpoint_state`, by the same names.

    Returns:
        The step.

    Raises:
        TypeError: an object has no ``load_state_dict()``.
        ValueError: `state` is no such state, has other names, or does not fit a model's parameters
            or an optimizer's groups. Nothing has been changed.
    """
    _check(state, objects)
    # Models copy into their parameters, but optimizers would train on the state's own tensors.
    saved = {
        name: value if isinstance(objects[name], nn.Module) else copy.deepcopy(value)
        for name, value in state["objects"].items()
    }
    return _restore({**state, "objects": saved}, objects)


def save_checkpoint(
    path: StrPath, /, *, step: int = 0, process_group: Any = None, **objects: Any
) -> None:
    """Writes a `checkpoint_state` to a file; when the function returns, it is on the disk.

    The new file is written beside the old one, as ``.NAME.*.tmp``, and then replaces it. So readers
    see a whole file at any time, also if the writer is killed.

    With torch.distributed all ranks call it, with the same state, and rank 0 writes its own. All
    return when it is written, which must not take longer than the group's timeout.

    Args:
        path: of the file. Its folder is made if it is missing.
        step: how many steps have been done.
        process_group: None: torch's default group, if there is one. False: no other process.
        objects: as of `checkpoint_state`.

    Raises:
        TypeError: an object has no state, one that ``torch.load(weights_only=True)`` would refuse,
            or one that is sharded over processes.
        OSError: the file cannot be written; the old one is as it was.
        RankError: another rank has failed, is at another step, or has other values.
    """
    ranks = find_ranks(process_group)
    state, marks = _on_all_ranks(ranks, "saving", lambda: checkpoint_state(step=step, **objects))
    _need_same([step for step, _ in marks], "the ranks are at different steps")
    _need_same_values(ranks, objects)
    first = ranks is None or ranks.rank == 0
    _on_all_ranks(ranks, "saving", lambda: _write(os.fspath(path), state) if first else None)
    if first and any(mark != marks[0] for mark in marks):
        text = "the ranks' random states differ: when this is loaded, all go on with rank 0's"
        warnings.warn(text, UserWarning, stacklevel=2)


def load_checkpoint(path: StrPath, /, *, process_group: Any = None, **objects: Any) -> int | None:
    """Restores what `save_checkpoint` has written, in any number of processes.

    With torch.distributed all ranks call it, and each reads the file.

    Args:
        path: of the file.
        process_group: as of `save_checkpoint`.
        objects: as of `save_checkpoint`, by the same names.

    Returns:
        The step; None if there is no file.

    Raises:
        TypeError: an object has no ``load_state_dict()``.
        ValueError: the file is no whole checkpoint, or does not fit, as in
            `restore_checkpoint_state`.
        RankError: another rank has failed, or does not see the same file.
    """
    ranks = find_ranks(process_group)
    state, marks = _on_all_ranks(ranks, "loading", lambda: _read(Path(path), objects))
    _need_same(
        marks,
        "the ranks see different files, of other steps and random states (-1: none); are they in "
        "a folder that all share?",
    )
    if state is not None:
        _on_all_ranks(ranks, "loading", lambda: _restore(state, objects))
    return None if state is None else int(state["step"])


# ---- several processes ----


def _on_all_ranks(ranks: Ranks | None, doing: str, work: Callable[[], T]) -> tuple[T, list[Any]]:
    """What `work` returns, and all ranks' marks; an error of one rank is raised on all."""
    # Without the file's path, which may differ between hosts.
    what = f"{doing} a checkpoint"
    try:
        value = work()
    except BaseException as error:
        if ranks is not None:
            ranks.meet(what, _mark(None), DeferredError(error))  # raises it when all know
        raise
    return value, [_mark(value)] if ranks is None else ranks.meet(what, _mark(value)).tolist()


def _mark(state: Any) -> list[int]:
    """The step and a checksum of torch's random state, to tell checkpoints apart; -1: none."""
    if not isinstance(state, Mapping):
        return [-1, 0]
    return [state["step"], zlib.crc32(state["random"]["torch"].numpy())]


def _need_same(marks: list[Any], otherwise: str) -> None:
    """Raises a RankError that says `otherwise` if the ranks' marks differ."""
    if others := tuple(rank for rank, mark in enumerate(marks) if mark != marks[0]):
        raise RankError(f"{otherwise} (by rank: {', '.join(map(str, marks))})", others)


def _need_same_values(ranks: Ranks | None, objects: Mapping[str, Any]) -> None:
    """Raises a RankError if the ranks' weights, hyperparameters or optimizer states differ."""
    if ranks is None:
        return
    what, named = "the comparison of what is saved", dict(comparable_values(objects))
    mine = digest_of(named.items())
    if len({*ranks.meet(what, [mine])[:, 0].tolist()}) == 1:
        return
    plain = {name: value for name, value in named.items() if not isinstance(value, torch.Tensor)}
    found = first_difference(ranks.objects({**digests(named.items()), **plain}, what))
    name, values = found or ("something", [])
    by_rank = ", ".join(f"{value!r} on rank {rank}" for rank, value in enumerate(values))
    shown = f" ({by_rank})" if name in plain else ""
    raise RankError(
        f"{name} is not the same on all ranks{shown}, of which rank 0's would be written: "
        "something of a rank's own has got in, such as a learning rate, a schedule by the loss of "
        "the rank's rows, or a weight that was set on some ranks only; to write what is this "
        "process's alone: process_group=False",
        tuple(rank for rank, value in enumerate(values) if value != values[0]),
    )


# ---- states ----


def _need_states(objects: Mapping[str, Any]) -> None:
    for name, thing in objects.items():
        if not all(callable(getattr(thing, m, None)) for m in ("state_dict", "load_state_dict")):
            raise TypeError(
                f"{name}, {type(thing).__name__}, has no state_dict and load_state_dict; give "
                "models, optimizers, wrapped loaders and the like, each by a name of its own"
            )


def _refuse_sharded(parts: Mapping[str, Any]) -> None:
    tensors: Any = sys.modules.get("torch.distributed.tensor")  # None: there is no DTensor
    for name, part in parts.items() if tensors else ():
        if any(isinstance(v, tensors.DTensor) for v in _compat.pytree.tree_leaves(part)):
            raise TypeError(
                f"the state of {name} is sharded over processes, of which this would save one "
                "shard; save it with torch.distributed.checkpoint, and its "
                "state_dict.get_state_dict"
            )


def _check(state: Any, objects: Mapping[str, Any]) -> None:
    """Raises whatever error can be known before anything is changed."""
    _compat.require(_compat.CHECKPOINT)
    if not isinstance(state, Mapping) or state.get(_FORMAT) != 1:
        what = list(state)[:8] if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(f"not what checkpoint_state() or save_checkpoint() made: {what}")
    _need_states(objects)
    if objects.keys() != state["objects"].keys():
        given = ", ".join(objects) or "nothing: give the objects by those names"
        of = ", ".join(state["objects"])
        raise ValueError(f"the checkpoint is of {of}, but was given {given}")
    for name, thing in objects.items():
        if misfit := _misfit(thing, _unpacked(state, name)):
            raise ValueError(f"the checkpoint's {name} is of another one: {misfit}")
    for name, saved in state.get("shards", {}).items():
        here = _shards_of(objects[name])
        if here not in (None, saved):
            warnings.warn(
                f"{name} was trained with shards={saved}, and now has {here}: training goes on, "
                "but not with the bits that it would have had; give it the saved number",
                UserWarning,
                stacklevel=users_level(),
            )


def _shards_of(thing: Any) -> Any:
    """Into how many shards a parallel model cuts a batch; a list for several in a wrapper."""
    for owner in (thing, getattr(thing, "forward", None)):  # (`parallelize_` has it there)
        ours = getattr(type(owner), "shards", None)  # and not an attribute of the user's
        getter: Any = ours.fget if isinstance(ours, property) else None
        if (getattr(getter, "__module__", None) or "").startswith("torch_spheres."):
            return int(getter(owner))
    inside = map(_shards_of, thing.children() if isinstance(thing, nn.Module) else ())
    found = [numbers for numbers in inside if numbers is not None]
    return found[0] if len(found) == 1 else found or None


def _misfit(thing: Any, saved: Any) -> str:
    """Why a state does not fit; of modules and optimizers that load it by torch's methods.

    Torch loads part of a state that does not fit before it raises, or takes it as it is.
    """
    own = type(thing).state_dict, type(thing).load_state_dict
    if isinstance(thing, nn.Module) and all(map(_is_known, own)):
        values = thing.state_dict(keep_vars=True)
        if names := sorted(values.keys() ^ saved.keys()):
            return f"only one of them has {', '.join(names[:4])} (of {len(names)} in all)"
        for name, value in values.items():  # (loading may resize buffers)
            known = isinstance(value, nn.Parameter) and not nn.parameter.is_lazy(value)
            if known and value.shape != saved[name].shape:
                return f"{name} is {(*saved[name].shape,)} there, and {(*value.shape,)} here"
    elif own == (Optimizer.state_dict, Optimizer.load_state_dict):
        groups = saved.get("param_groups", [])
        there, here = ([len(g["params"]) for g in gs] for gs in (groups, thing.param_groups))
        if there != here:
            return f"it has groups of {there} parameters, and here they are of {here}"
        if lacking := thing.defaults.keys() - groups[0].keys():
            return f"it has no {', '.join(sorted(lacking))}, as {type(thing).__name__} has"
    return ""


def _is_known(method: Any) -> bool:
    """Whether a method is torch's or ours, and not of a user's class."""
    return method.__module__.partition(".")[0] in ("torch", "torch_spheres")


def _restore(state: Mapping[str, Any], objects: Mapping[str, Any]) -> int:
    """Loads a checked state; returns the step."""
    # First the objects that may refuse; torch wants schedulers to come before optimizers.
    kinds = {n: (isinstance(o, Optimizer), isinstance(o, nn.Module)) for n, o in objects.items()}
    for name in sorted(objects, key=kinds.__getitem__):
        try:
            objects[name].load_state_dict(_unpacked(state, name))
        except Exception as error:
            error.add_note(f"when {name} was loaded from the checkpoint")
            raise
    restore_random_states(state["random"])
    return int(state["step"])


def _unpacked(state: Mapping[str, Any], name: str) -> Any:
    """The object's ``state_dict``, out of the tuple that `checkpoint_state` puts it in."""
    part = state["objects"][name]
    return part[0] if isinstance(part, tuple) else part


# ---- files ----


def _read(path: Path, objects: Mapping[str, Any]) -> dict[str, Any] | None:
    """A file's state, checked against the objects; None if there is no file."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    with file:
        try:  # (to the CPU: each object loads it to its own device)
            state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            # (pickle and zipfile raise all kinds of errors for broken bytes.)
            raise ValueError(
                f"{path} is no whole checkpoint; was it copied in part, or written by something "
                f"else than save_checkpoint? ({type(error).__name__})"
            ) from error
    try:
        _check(state, objects)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return state


def _write(name: str, state: Any) -> None:
    """Replaces the file `name` by a state, in one step that readers see."""
    path = Path(name)
    if path.is_dir() or name.endswith(os.sep):
        raise IsADirectoryError(errno.EISDIR, "a checkpoint is a file, not a folder", name)
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "a checkpoint would replace what is no file (a device?)", name)
    _refuse_sharded(state["objects"])
    path.parent.mkdir(parents=True, exist_ok=True)
    # (Not by `tempfile`, whose files only their owner may read.)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if strange := torch.serialization.get_unsafe_globals_in_checkpoint(temporary):
            raise TypeError(
                f"torch.load(weights_only=True) would refuse {', '.join(strange)}: have "
                "state_dict() return tensors and plain values"
            )
        with contextlib.suppress(FileNotFoundError):
            shutil.copymode(path, temporary)
        temporary.replace(path)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # hidden by torch's writer
            raise error.__context__ from None
        raise
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    with contextlib.suppress(OSError):  # some file systems cannot
        os.fsync(folder)
    os.close(folder)
