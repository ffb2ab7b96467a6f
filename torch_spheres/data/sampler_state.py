"""What is saved of a pass over a sampler: how far it is, and what its draws start from.

`SphereBatchSampler` and the resumption of a wrapped loader (resume.py) share these.
"""

from __future__ import annotations

import copy
import inspect
import zlib
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch

__all__ = ["DrawSource", "SamplerEpoch", "draw_source", "extend_digest", "from_state"]

T = TypeVar("T")


class DrawSource(NamedTuple):
    """What a sampler draws from."""

    kind: str  # "sampler" (its own state_dict), "generator" (its own) or "global"
    capture: Callable[[], Any]
    restore: Callable[[Any], object]


def draw_source(sampler: Any) -> DrawSource:
    """Finds what a sampler draws from."""
    save, load = (getattr(sampler, name, None) for name in ("state_dict", "load_state_dict"))
    if callable(save) and callable(load):
        return DrawSource(
            "sampler",
            lambda: copy.deepcopy(save()),
            lambda saved: load(copy.deepcopy(saved)),
        )
    if isinstance(own := getattr(sampler, "generator", None), torch.Generator):
        return DrawSource("generator", own.get_state, lambda saved: own.set_state(saved.cpu()))
    return DrawSource("global", torch.get_rng_state, lambda saved: torch.set_rng_state(saved.cpu()))


@dataclass
class SamplerEpoch:
    """One pass over a sampler. The field names are keys of saved states."""

    epoch: int | None  # as set_epoch was told
    kind: str  # of the `DrawSource`
    start: Any  # the state of the `DrawSource` before the first draw
    position: int = 0  # global batches handed out
    digest: int = 0  # checksum of all their indices: a replay must give the same
    now: Any = None  # the sampler's own state at `position`, if it has one

    def count(self, batch: list[Any]) -> None:
        """Counts a batch that is handed out."""
        self.position += 1
        self.digest = extend_digest(self.digest, batch)


def extend_digest(digest: int, index: Any) -> int:
    """The checksum of the index lists so far, extended by one more list (or single index)."""
    if hasattr(index, "tolist"):
        index = index.tolist()
    try:
        content = array("q", index if isinstance(index, (list, tuple)) else (index,)).tobytes()
    except (TypeError, OverflowError):  # no integers: keys, or indices in tuples
        content = repr(index).encode()
    return zlib.crc32(content, digest)


def from_state(
    kind: Callable[..., T], state: Mapping[str, Any], owner: str, required: Mapping[str, Any]
) -> T:
    """Makes a dataclass of the state that `owner` saved of one.

    Raises:
        ValueError: a field is missing, or a value differs from the one in `required`.
    """
    names = list(inspect.signature(kind).parameters)
    if missing := {*names, *required} - {*state}:
        raise ValueError(f"not a state of {owner}: no {sorted(missing)} in {sorted(state)}")
    if differ := [f"{k}={state[k]!r}, not {v!r}" for k, v in required.items() if state[k] != v]:
        raise ValueError(f"the state of {owner} was saved with {'; '.join(differ)}")
    return kind(**copy.deepcopy({name: state[name] for name in names}))
