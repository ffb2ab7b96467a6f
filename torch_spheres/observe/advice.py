"""Advice on how to use the spheres better, derived from a `Stats`; see `Stats.advice`.

Each rule is a function that returns one sentence, or None if it does not apply.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING

from torch_spheres.observe.histogram import ITEM_TIME_EDGES_NS
from torch_spheres.observe.table import duration
from torch_spheres.runtime.thread_hooks import has_gil

if TYPE_CHECKING:
    from torch_spheres.observe.stats import Stats

__all__ = ["advice_on"]

_MAX_SENTENCES = 3
_MIN_SECONDS = 1.0
_SHORT = 20e-6  # seconds; handing an item over costs as much


def advice_on(stats: Stats) -> tuple[str, ...]:
    """Returns at most three sentences, the most promising first."""
    if stats.running_time < _MIN_SECONDS or not stats.items_run:
        return ()
    found = (_idle(stats), _waiting_items(stats), _uneven(stats), _short_items(stats))
    return tuple(sentence for sentence in found if sentence)[:_MAX_SENTENCES]


def _busiest_share(stats: Stats) -> float:
    """A lower bound of the share of the time in which at least one sphere had work."""
    # If many leaves take turns, each of them is seldom busy though the turns are used.
    return max(stats.utilization, max(s.utilization for s in stats.leaves))


def _idle(stats: Stats) -> str | None:
    idle = 1 - _busiest_share(stats)
    if idle < 0.5:
        return None
    return (
        f"the spheres had nothing to do {idle:.0%} of the time, the busiest one too: hand out the "
        "next batch of work before the last is finished (distribute_work does not wait), or give "
        "them more of what the program does between"
    )


def _waiting_items(stats: Stats) -> str | None:
    cores = min(stats.concurrency, stats.cores)
    if cores < 1 or stats.utilization < 0.7 or stats.cores_used > 0.6 * cores:
        return None
    figures = (
        f"the spheres used {stats.utilization:.0%} of their turns, but the whole program kept only "
        f"{stats.cores_used:.1f} of {stats.cores} cores busy"
    )
    if stats.cores_used > 0.7 and has_gil():
        return (
            f"{figures}: unless other programs have the rest, Python runs one thread at a time "
            "(the GIL); let items call what releases it (torch, numpy), or use a NativeFunction"
        )
    more = "concurrency=" if stats.concurrency < len(stats.leaves) else "levels= and concurrency="
    return (
        f"{figures}: unless other programs have the rest, items wait, for a disk, a network or a "
        f"lock; larger {more} lets more of them wait at once"
    )


def _uneven(stats: Stats) -> str | None:
    if stats.imbalance < 1.5 or stats.utilization > 0.8 or _busiest_share(stats) < 0.5:
        return None
    if stats.mean_item_time < _SHORT:
        return None
    busiest = max(stats.leaves, key=lambda s: s.busy_ns)
    long, share = _long_items(stats)
    if share > 0.25:
        return (
            f"sphere {busiest.path} worked {duration(busiest.busy_ns / 1e9)}, "
            f"{stats.imbalance:.1f} times the mean of the {stats.concurrency} busiest, and items "
            f"of more than {duration(long)}, four times the median, made up {share:.0%} of the "
            "work: cut the longest items into smaller ones, or hand them out first"
        )
    return (
        f"{stats.utilization * stats.concurrency:.1f} of the {stats.concurrency} leaves that may "
        f"run were at work on average, though the busiest was {busiest.utilization:.0%} of the "
        "time: hand out more items at a time"
    )


def _long_items(stats: Stats) -> tuple[float, float]:
    """Four times the median in seconds, and the share of the work in items longer than that."""
    counts, long = stats.item_time_counts, 4 * stats.item_time(0.5)
    first = bisect_right(ITEM_TIME_EDGES_NS, long * 1e9) + 1
    # The buckets' lower edges make the share a lower bound.
    beyond = sum(
        edge * count
        for edge, count in zip(ITEM_TIME_EDGES_NS[first - 1 :], counts[first:], strict=True)
    )
    return long, beyond / stats.item_time_ns if stats.item_time_ns else 0.0


def _short_items(stats: Stats) -> str | None:
    inside = sum(s.item_time_ns for s in stats.leaves)
    awake = sum(s.processing_ns + s.ready_ns for s in stats.leaves)
    if sum(stats.item_time_counts) < 1000 or stats.mean_item_time > _SHORT or inside > 0.7 * awake:
        return None
    return (
        f"an item took {duration(stats.mean_item_time)} on average, and {1 - inside / awake:.0%} "
        "of the time that spheres were awake went by between items: put more work into each, a "
        "list of things instead of one"
    )
