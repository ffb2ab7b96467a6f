"""The table that ``KissingSpheres.print_stats()`` prints, and how figures are written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch_spheres.observe.sphere_stats import SphereStats
    from torch_spheres.observe.stats import Stats

__all__ = ["counted", "duration", "format_stats"]

_COLUMNS = "{:<17} {:>7} {:>11} {:>10} {:>9} {:>10} {:>9} {:>10} {:>7}"
_HEADER = _COLUMNS.format(
    "", "spheres", "items", "stolen", "messages", "work s", "sums s", "barrier s", "busy %"
)
_RULE = "-" * len(_HEADER)


def duration(seconds: float) -> str:
    """Writes a time with three digits and a suitable unit: ``"1.23 ms"``."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds < 1000 else f"{seconds:.0f} s"
    return f"{seconds / 1e-9:.3g} ns"


def counted(number: int, noun: str) -> str:
    """Writes a number of things: ``"1 item"``, ``"1,234 items"``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _row(name: str, spheres: Sequence[SphereStats]) -> str:
    busy = sum(s.busy_ns for s in spheres)
    total = sum(s.total_ns for s in spheres)
    return _COLUMNS.format(
        name,
        f"{len(spheres)}",
        f"{sum(s.items_run for s in spheres):,}",
        f"{sum(s.items_stolen for s in spheres):,}",
        f"{sum(s.messages_received for s in spheres):,}",
        f"{sum(s.processing_ns for s in spheres) / 1e9:.3f}",
        f"{sum(s.accumulating_ns for s in spheres) / 1e9:.3f}",
        f"{sum(s.waiting_ns for s in spheres) / 1e9:.3f}",
        f"{100 * busy / total:.1f}" if total else "-",
    )


def _summary(stats: Stats, leaves: int) -> list[str]:
    turns = f"at most {stats.concurrency} of {leaves} leaves run at once"
    used = f"{100 * stats.utilization:.1f} % of that was used, imbalance {stats.imbalance:.2f}"
    lines = [f"{turns}; {used}, {100 * stats.steal_rate:.0f} % stolen"]
    if sum(stats.item_time_counts):
        lines.append(
            f"an item took {duration(stats.mean_item_time)} on average; half of them less than "
            f"{duration(stats.item_time(0.5))}, 95 % less than {duration(stats.item_time(0.95))}"
        )
    return lines


def format_stats(stats: Stats) -> str:
    """Returns a table: a row per level, then the three busiest and the three idlest leaves."""
    leaves = sorted(stats.leaves, key=lambda s: s.busy_ns, reverse=True)
    levels = range(leaves[0].level + 1)
    lines = [_HEADER, _RULE]
    lines += [_row(f"level {n}" + (" (root)" if n == 0 else ""), stats.level(n)) for n in levels]
    if len(leaves) > 1:
        lines.append(_RULE)
        lines += [_row(f"busiest: {s.path}", [s]) for s in leaves[:3]]
        lines += [_row(f"idlest: {s.path}", [s]) for s in leaves[-3:]]
    return "\n".join([*lines, _RULE, _row("all", stats.spheres), *_summary(stats, len(leaves))])
