"""Where the figures go: Prometheus' text format, and TensorBoard or what looks like it."""

from __future__ import annotations

import re
import warnings
import weakref
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch

from torch_spheres.item_times import ITEM_TIME_EDGES_NS

if TYPE_CHECKING:
    from torch_spheres.stats import SphereStats, Stats
    from torch_spheres.system import KissingSpheres

__all__ = ["ScalarWriter", "StatsLog", "Steps", "figures", "prometheus_text"]

# ---- Prometheus ----

_PREFIX = "torch_spheres_"
_LABEL = re.compile(r"(?!__)[a-zA-Z_][a-zA-Z0-9_]*")
_OURS = {"level", "sphere", "path", "state", "le"}
_FEW_SPHERES = 13
_COUNTERS = (
    ("items_run", "Work items run, stolen ones included."),
    ("items_stolen", "Work items run that belonged to another sphere."),
    ("items_given", "Work items of the own queue that other spheres ran."),
    ("messages_sent", "Messages sent along edges."),
    ("messages_received", "Messages taken out of mailboxes."),
)
_STATES = ("processing", "accumulating", "waiting", "idle", "ready")

Labels = dict[str, str]


def prometheus_text(stats: Stats, per_sphere: bool | None, labels: Mapping[str, str]) -> str:
    """See `Stats.to_prometheus`."""
    if stats.is_difference:
        raise ValueError(
            "to_prometheus() wants a snapshot, spheres.stats(), whose counters only grow; "
            "Prometheus makes the differences (rate(...))"
        )
    if per_sphere is not None and not isinstance(per_sphere, bool):
        raise TypeError(f"per_sphere must be True, False or None, got {per_sphere!r}")
    if not isinstance(labels, Mapping):
        raise TypeError(f"labels must map names to values, {{'pool': 'a'}}, got {labels!r}")
    for name in labels:
        if not isinstance(name, str):
            raise TypeError(f"labels: names must be strings, got {name!r}")
        if not _LABEL.fullmatch(name) or name in _OURS:
            raise ValueError(
                f"labels: {name!r} cannot be used; names are letters, digits and _, do not begin "
                f"with a digit or __, and are none of {', '.join(sorted(_OURS))}"
            )
    common = dict(labels)
    if per_sphere is None:
        per_sphere = len(stats) <= _FEW_SPHERES
    parts: list[tuple[Labels, tuple[SphereStats, ...]]] = []
    if per_sphere:
        parts += [
            (common | {"level": str(s.level), "sphere": str(s.id), "path": s.path}, (s,))
            for s in stats.spheres
        ]
    else:
        levels = range(stats.spheres[-1].level + 1)
        parts += [(common | {"level": str(level)}, stats.level(level)) for level in levels]
    leaves = [part for part in parts if part[1][0].level == stats.spheres[-1].level]

    text = _Text()
    for name, meaning in _COUNTERS:
        text.family(f"{name}_total", "counter", meaning)
        for own, spheres in parts:
            text.sample(f"{name}_total", own, sum(getattr(s, name) for s in spheres))
    text.family(
        "state_seconds_total", "counter", "Time of the spheres' threads in each state, added up."
    )
    for own, spheres in parts:
        for state in _STATES:
            ns = sum(getattr(s, f"{state}_ns") for s in spheres)
            text.sample("state_seconds_total", own | {"state": state}, ns / 1e9)
    text.family("queued_items", "gauge", "Work items that wait in the leaves' queues.")
    for own, spheres in leaves:
        text.sample("queued_items", own, sum(s.queued for s in spheres))
    text.family(
        "queue_high_water_items", "gauge", "Most work items that ever waited in one leaf's queue."
    )
    for own, spheres in leaves:
        text.sample("queue_high_water_items", own, max(s.queue_high_water for s in spheres))
    _item_times(text, stats, common)
    text.family("concurrency", "gauge", "Leaves that may run at once.")
    text.sample("concurrency", common, stats.concurrency)
    return str(text)


def _item_times(text: _Text, stats: Stats, labels: Labels) -> None:
    name = "item_duration_seconds"
    text.family(name, "histogram", "Time that work items took, but for pieces of gradient sums.")
    counts, seen = stats.item_time_counts, 0
    for bucket, edge in enumerate(ITEM_TIME_EDGES_NS):
        seen += counts[bucket]
        if bucket % 4 == 0:  # one line for each doubling
            text.sample(f"{name}_bucket", labels | {"le": repr(edge / 1e9)}, seen)
    text.sample(f"{name}_bucket", labels | {"le": "+Inf"}, sum(counts))
    text.sample(f"{name}_sum", labels, stats.item_time_ns / 1e9)
    text.sample(f"{name}_count", labels, sum(counts))


class _Text:
    """Lines of the text format: a HELP and a TYPE for each family, then its samples."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def family(self, name: str, kind: str, meaning: str) -> None:
        self._lines += [f"# HELP {_PREFIX}{name} {meaning}", f"# TYPE {_PREFIX}{name} {kind}"]

    def sample(self, name: str, labels: Labels, value: float) -> None:
        inside = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
        braces = f"{{{inside}}}" if inside else ""
        self._lines.append(f"{_PREFIX}{name}{braces} {value!r}")

    def __str__(self) -> str:
        return "\n".join(self._lines) + "\n"


def _escaped(value: str) -> str:
    return str(value).replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


# ---- TensorBoard ----


class ScalarWriter(Protocol):
    """What `KissingSpheres.log_to` writes to, as ``torch.utils.tensorboard.SummaryWriter``."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int, /) -> Any:
        """Keeps a figure of a step."""


def figures(stats: Stats) -> dict[str, float]:
    """What `StatsLog` writes of a difference; item times only if items were run."""
    values = {
        "utilization": stats.utilization,
        "imbalance": stats.imbalance,
        "steal_rate": stats.steal_rate,
        "items_per_second": stats.items_per_second,
        "cores_used": stats.cores_used,
        "queued": float(stats.queued),
        "queue_high_water": float(max(s.queue_high_water for s in stats.spheres)),
        "messages_per_second": stats.messages / stats.elapsed if stats.elapsed > 0 else 0.0,
    }
    if sum(stats.item_time_counts):
        values["item_time_p50_seconds"] = stats.item_time(0.5)
        values["item_time_p95_seconds"] = stats.item_time(0.95)
    return values


class StatsLog:
    """What `KissingSpheres.log_to` returns: counts steps, and writes each n of them.

    Use it from one thread at a time. As a context manager it is closed at the end of the block.
    """

    def __init__(
        self,
        spheres: KissingSpheres,
        writer: ScalarWriter,
        every: int,
        optimizer: torch.optim.Optimizer | None,
        tag: str,
        first_step: int,
    ) -> None:
        self._spheres, self._writer, self._every, self._tag = spheres, writer, every, tag
        self._steps = self._written = self._first = first_step
        self._wrote = self._warned = False
        self._due = first_step + every
        self._last = spheres.stats()
        self._handle: Any = None
        if optimizer is None:
            spheres._logs.append(self)
        else:
            self._handle = optimizer.register_step_post_hook(self._after_step)
        self._closed = False

    def _after_step(self, *_: Any) -> None:
        self.step()

    @property
    def steps(self) -> int:
        """Steps counted so far, on top of ``first_step``."""
        return self._steps

    def step(self) -> None:
        """Counts a step; for loops without an optimizer's. Writes if it is the n-th.

        Raises:
            What the writer raised. The step is counted all the same, and its figures are part of
            those that are written after the next n.
            RuntimeError: the log is closed.
        """
        if self._closed:
            raise RuntimeError("step() of a log that is closed; call spheres.log_to() again")
        self._steps += 1
        if self._steps >= self._due:
            self.write()

    def write(self) -> None:
        """Writes the figures since the last time, now. Raises what the writer raised."""
        now, steps = self._spheres.stats(), self._steps
        self._due = steps + self._every
        for name, value in figures(now - self._last).items():
            self._writer.add_scalar(f"{self._tag}/{name}", value, steps)
        self._last, self._written, self._wrote = now, steps, True  # not if the writer raised

    def close(self) -> None:
        """Counts no more steps, and writes what came since the last time. The writer stays open.

        May be called more than once. Raises what the writer raised; the log is closed even so.
        Warns if no step was counted.
        """
        self._close(stacklevel=4)

    def _close(self, stacklevel: int) -> None:
        if self._detach():
            self.warn_if_silent(stacklevel)
            if self._steps > self._written:
                self.write()

    def warn_if_silent(self, stacklevel: int) -> None:
        """Says once that nothing was written for lack of steps, if spheres have run items."""
        spoke = self._steps > self._first or self._wrote
        if spoke or self._warned or (self._spheres.stats() - self._last).items_run == 0:
            return
        self._warned = True
        warnings.warn(
            "log_to() has written nothing so far, because it has counted no steps: no optimizer "
            "with a GradientHook on these spheres has stepped; give it optimizer=..., or call "
            "log.step() in the loop"
            if self._handle is None
            else "log_to() has written nothing, because its optimizer has not stepped",
            UserWarning,
            stacklevel=stacklevel,
        )

    def _detach(self) -> bool:
        was_open, self._closed = not self._closed, True
        if self._handle is not None:
            self._handle.remove()
        elif self in self._spheres._logs:
            self._spheres._logs.remove(self)
        return was_open

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self._close(stacklevel=4)
        else:  # what broke the loop is not to be covered by an error of the writer
            self._detach()


def open_log(
    spheres: KissingSpheres,
    writer: Any,
    every: int,
    optimizer: Any,
    tag: Any,
    first_step: int,
) -> StatsLog:
    """Checks the arguments of `KissingSpheres.log_to`."""
    if not callable(getattr(writer, "add_scalar", None)):
        raise TypeError(
            "writer must have add_scalar(tag, value, global_step), as torch.utils.tensorboard's "
            f"SummaryWriter, got {writer!r} of type {type(writer).__name__}"
        )
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer must be None or a torch.optim.Optimizer, got {type(optimizer).__name__}"
        )
    if not isinstance(tag, str) or not tag:
        raise TypeError(f"tag must be a string that is not empty, got {tag!r}")
    return StatsLog(spheres, writer, every, optimizer, tag, first_step)


class Steps:
    """What the `GradientHook`s of some spheres tell: each step counts once, for every log."""

    def __init__(self, logs: Iterable[StatsLog]) -> None:
        self._logs = logs
        self._under_way: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()

    def begin(self, optimizer: torch.optim.Optimizer) -> None:
        """It is about to step."""
        self._under_way.add(optimizer)

    def count(self, optimizer: torch.optim.Optimizer) -> None:
        """It has stepped; another of its hooks may have said so already.

        Raises what the first writer to fail raised, with the other errors as notes.
        """
        if optimizer not in self._under_way:
            return
        self._under_way.discard(optimizer)
        errors: list[Exception] = []
        for log in tuple(self._logs):
            try:
                log.step()
            except Exception as error:  # noqa: BLE001  (raised below, once all have counted)
                errors.append(error)
        if errors:
            for other in errors[1:]:
                errors[0].add_note(f"the writer of another log raised too: {other!r}")
            raise errors[0]
