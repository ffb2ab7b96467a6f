"""Checkpoints: what a training needs to go on with the same bits, in a file that is always whole.

::

    parts = {"model": model, "optimizer": optimizer, "loader": loader}
    step = ts.load_checkpoint("run/last.pt", **parts) or 0
    while step < steps:
        for x, y in loader:
            ...
            step += 1
            ts.save_checkpoint("run/last.pt", step=step, **parts)

Whoever reads the file, and whenever its writer is killed, finds the old or the new one: the new one
is written beside the old, and then takes its place. It does not depend on the number of processes.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import fcntl
import hashlib
import operator
import os
import random
import re
import secrets
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_spheres import _compat
from torch_spheres.company import Company
from torch_spheres.parallel import SphereParallel

__all__ = ["checkpoint_state", "load_checkpoint", "restore_checkpoint_state", "save_checkpoint"]

StrPath = str | os.PathLike[str]
_FORMAT = "torch_spheres_checkpoint"  # a key whose value is the version


def checkpoint_state(*, step: int = 0, **objects: Any) -> dict[str, Any]:
    """The objects' states, the random states and the step: tensors and plain values.

    For `torch.save`, `torch.distributed.checkpoint` or a file of your own; other keys may be added.
    As in any ``state_dict()`` the tensors are the objects' own: to keep them, ``copy.deepcopy``.

    Args:
        step: how many steps have been done.
        objects: whatever has ``state_dict()`` and ``load_state_dict()``: models, optimizers,
            schedulers, a ``GradScaler``, a wrapped loader, a sampler; each by a name of its own.

    Returns:
        With the states of Python's and numpy's generators, and of torch's default one (the CPU's,
        from which all that `SphereParallel` draws is derived).

    Raises:
        TypeError: an object has no state, or a sharded one that is not a model's; or `step` is no
            integer.
    """
    _compat.require(_compat.CHECKPOINT)
    _need_states(objects)
    parts = {name: _packed(thing) for name, thing in objects.items()}
    _refuse_sharded({name: part for name, part in parts.items() if isinstance(part, tuple)})
    version, words, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    return {
        _FORMAT: 1,
        "step": operator.index(step),
        "objects": parts,
        "random": {
            "torch": torch.get_rng_state(),
            "python": [version, [*words], gauss],
            "numpy": _compat.pytree.tree_map_only(np.ndarray, np.ndarray.tolist, numpy_state),
        },
    }


def restore_checkpoint_state(state: Mapping[str, Any], /, **objects: Any) -> int:
    """Has the objects and the random generators go on from a `checkpoint_state`; returns its step.

    Loaders, schedulers and the like are loaded first, then models, then optimizers, then the random
    states. The state can be used again.

    Raises:
        TypeError: an object has no ``load_state_dict()``.
        ValueError: it is no such state, it has other names, a model's parameters or an optimizer's
            groups are others. Nothing has been changed.
    """
    _compat.require(_compat.CHECKPOINT)
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
    """Writes a `checkpoint_state`; when it returns, the file is on the disk.

    With torch.distributed all ranks call it, with the same state, and rank 0 writes its own. All
    return when it is written, which must not take longer than the group's timeout.

    Args:
        path: a file, which is replaced. Its folder is made if it is missing; temporaries in it of
            writers that were killed are removed.
        step: how many steps have been done.
        process_group: None: torch's default group, if there is one. False: no other process.
        objects: as of `checkpoint_state`.

    Raises:
        TypeError: an object has no state, one that ``torch.load(weights_only=True)`` would refuse,
            or one that is sharded over processes.
        OSError: it cannot be written; the old file is as it was.
        RankError: another rank has failed, or is at another step.
    """
    name = os.fspath(path)
    company = Company(process_group, f"saving {name}")
    state, told = company.together(lambda: checkpoint_state(step=step, **objects), _marks)
    company.need_same([mark[:1] for mark in told], "the ranks are at different steps")
    company.together(lambda: _write(name, state) if company.rank == 0 else None, lambda _: None)
    if company.rank == 0 and any(mark != told[0] for mark in told):
        text = "the ranks' random states differ: when this is loaded, all go on with rank 0's"
        warnings.warn(text, UserWarning, stacklevel=2)


def load_checkpoint(path: StrPath, /, *, process_group: Any = None, **objects: Any) -> int | None:
    """Restores what `save_checkpoint` has written, in any number of processes.

    With torch.distributed all ranks call it, and each reads the file. Arguments are those of
    `save_checkpoint`, by the same names.

    Returns:
        The step; None if there is no file.

    Raises:
        TypeError: an object has no ``load_state_dict()``.
        ValueError: the file is no whole checkpoint; or as `restore_checkpoint_state`.
        RankError: another rank has failed, or does not see the same file.
    """
    company = Company(process_group, f"loading {os.fspath(path)}")
    state, seen = company.together(lambda: _read(Path(path), objects), _marks)
    company.need_same(seen, "the ranks see different files; is it in a folder that all share?")
    if state is None:
        return None
    step, _ = company.together(lambda: _restore(state, objects), lambda _: None)
    return step


# ---- states ----


def _need_states(objects: Mapping[str, Any]) -> None:
    for name, thing in objects.items():
        if not all(callable(getattr(thing, m, None)) for m in ("state_dict", "load_state_dict")):
            raise TypeError(
                f"{name} is a {type(thing).__name__}, without state_dict and load_state_dict; give "
                "models, optimizers, wrapped loaders and the like, each by a name of its own"
            )


def _check(state: Any, objects: Mapping[str, Any]) -> None:
    """Everything that can be known before anything is changed."""
    if not isinstance(state, Mapping) or state.get(_FORMAT) != 1:
        what = list(state)[:8] if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(f"not what checkpoint_state() or save_checkpoint() made: {what}")
    _need_states(objects)
    saved = state["objects"]
    if objects.keys() != saved.keys():
        texts = [f"it has no {name}" for name in objects if name not in saved]
        texts += [f"nothing was given for its {name}" for name in saved if name not in objects]
        raise ValueError(f"the checkpoint is of other objects: {', '.join(texts)}")
    for name, thing in objects.items():
        if misfit := _misfit(thing, _unpacked(saved[name])):
            raise ValueError(f"the checkpoint's {name} is of another one: {misfit}")


def _misfit(thing: Any, saved: Any) -> str:
    """Why what torch loads in part, or as it is, does not fit; classes of yours know better."""
    own = type(thing).state_dict, type(thing).load_state_dict
    if any(own == (k.state_dict, k.load_state_dict) for k in (nn.Module, SphereParallel)):
        here = thing.state_dict(keep_vars=True)
        if names := sorted(here.keys() ^ saved.keys()):
            ddp = any(name.startswith("module.") for name in names)
            hint = "; of a DistributedDataParallel, save and load the .module" if ddp else ""
            return f"only one of them has {', '.join(names[:4])} (of {len(names)} in all){hint}"
        for name, value in here.items():  # (buffers may be resized by who loads them)
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


def _restore(state: Mapping[str, Any], objects: Mapping[str, Any]) -> int:
    # Those first that may refuse; torch wants schedulers to come before optimizers.
    kinds = {n: (isinstance(o, Optimizer), isinstance(o, nn.Module)) for n, o in objects.items()}
    for name in sorted(objects, key=kinds.__getitem__):
        try:
            objects[name].load_state_dict(_unpacked(state["objects"][name]))
        except Exception as error:
            error.add_note(f"when {name} was loaded from the checkpoint")
            raise
    version, words, gauss = state["random"]["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(state["random"]["numpy"])
    torch.set_rng_state(state["random"]["torch"])
    return int(state["step"])


def _marks(state: Mapping[str, Any] | None) -> tuple[str, str]:
    """What tells checkpoints apart: the step, and torch's random state."""
    if state is None:
        return "none", ""
    drawn = state["random"]["torch"].numpy().tobytes()
    return f"step {state['step']}", f"random state {hashlib.sha256(drawn).hexdigest()[:8]}"


def _packed(thing: Any) -> Any:
    # torch.distributed.checkpoint loses empty dicts, and makes keys strings; a tuple is one value
    # to it. It has to see inside of models, whose shards it saves.
    state = thing.state_dict()
    return state if isinstance(thing, nn.Module) else (state,)


def _unpacked(part: Any) -> Any:
    return part[0] if isinstance(part, tuple) else part


def _names_with(parts: Mapping[str, Any], is_odd: Callable[[Any], bool]) -> str:
    return ", ".join(
        n for n, part in parts.items() if any(map(is_odd, _compat.pytree.tree_leaves(part)))
    )


def _refuse_sharded(parts: Mapping[str, Any]) -> None:
    tensors: Any = sys.modules.get("torch.distributed.tensor")  # not there: nor any of them
    if tensors and (names := _names_with(parts, lambda v: isinstance(v, tensors.DTensor))):
        raise TypeError(
            f"the state of {names} is sharded over processes, of which this would save one shard; "
            "save it with torch.distributed.checkpoint, and its state_dict.get_state_dict"
        )


# ---- files ----


def _read(path: Path, objects: Mapping[str, Any]) -> dict[str, Any] | None:
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    with file:
        try:  # (to the CPU: who loads a state takes it to its own device)
            state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, ValueError, LookupError, EOFError, UnpicklingError) as error:
            raise ValueError(
                f"{path} is no whole checkpoint; was it copied in part, or written by something "
                f"else than save_checkpoint? ({type(error).__name__})"
            ) from error
    _compat.require(_compat.CHECKPOINT)
    _check(state, objects)
    return state


def _write(name: str, state: Any) -> None:
    path = Path(name)
    if path.is_dir() or name.endswith(os.sep):
        raise IsADirectoryError(errno.EISDIR, "a checkpoint is a file, not a folder", name)
    _refuse_sharded(state["objects"])
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    with _beside(path) as (temporary, file):
        try:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        except RuntimeError as error:  # torch's writer hides what the file has said
            said = error.__context__
            if not isinstance(said, OSError):
                raise
            raise OSError(said.errno, said.strerror, name) from error
        _refuse_unreadable(temporary, state)
        with contextlib.suppress(FileNotFoundError):
            shutil.copymode(path, temporary)
        temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    with contextlib.suppress(OSError):  # some file systems cannot
        os.fsync(folder)
    os.close(folder)


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """A new file in the same folder, locked for as long as its writer lives."""
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        file = temporary.open("xb")
        with contextlib.suppress(OSError):  # where files cannot be locked leftovers stay
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink > 0:
            break
        file.close()  # another save took it for a leftover, before it was locked
    try:
        with file:
            yield temporary, file
    finally:
        temporary.unlink(missing_ok=True)


def _remove_leftovers(path: Path) -> None:
    """Of writers that were killed, whose locks are free."""
    ours = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{16}}\.tmp")
    for found in [f for f in path.parent.iterdir() if ours.fullmatch(f.name)]:
        with contextlib.suppress(OSError), found.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found.unlink()


def _refuse_unreadable(temporary: Path, state: Mapping[str, Any]) -> None:
    """Now, not when the training is to be resumed."""
    if strange := torch.serialization.get_unsafe_globals_in_checkpoint(temporary):
        plain = (Tensor, bool, int, float, complex, str, bytes, torch.dtype, type(None))
        names = _names_with(state["objects"], lambda v: type(v) not in plain)
        raise TypeError(
            f"torch.load(weights_only=True) would refuse {', '.join(strange)} (look at {names}): "
            "have state_dict() return tensors and plain values"
        )
