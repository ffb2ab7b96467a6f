"""The histogram of how long work items take: edges of its buckets, sums, quantiles."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch_spheres import _core
from torch_spheres.runtime.arguments import as_number

__all__ = ["ITEM_TIME_EDGES_NS", "add_counts", "quantile_ns"]

ITEM_TIME_EDGES_NS: tuple[int, ...] = _core.item_time_edges()
"""Edges of the buckets of `SphereStats.item_time_counts`, in nanoseconds, from 64 to 2**38 (275 s).

Each doubling has four buckets of equal width, none wider than a quarter of its lower edge."""

_NOTHING = (0,) * (len(ITEM_TIME_EDGES_NS) + 1)


def add_counts(histograms: Iterable[Sequence[int]]) -> tuple[int, ...]:
    """Adds histograms; some may be empty."""
    filled = [counts for counts in histograms if counts and counts != _NOTHING]
    return tuple(map(sum, zip(*filled, strict=True))) if filled else _NOTHING


def quantile_ns(counts: Sequence[int], q: float) -> float:
    """Returns the time in nanoseconds that a share `q` of the items took less than.

    The items of a bucket are assumed to be spread evenly over it. So the result is off by less than
    a quarter of the true time, or by 64 ns if that is more. It is 0 without items, and at most the
    last edge (275 s).

    Raises:
        TypeError: `q` is not a number.
        ValueError: `q` is not between 0 and 1.
    """
    share = as_number("q", q, "a number, a share of the items from 0 to 1")
    if not 0 <= share <= 1:
        raise ValueError(f"q is a share of the items, 0 to 1 (0.5: the median), got {q!r}")
    rank, seen = share * sum(counts), 0
    for bucket, count in enumerate(counts):
        if count and seen + count >= rank:
            if bucket == len(ITEM_TIME_EDGES_NS):
                break
            low = ITEM_TIME_EDGES_NS[bucket - 1] if bucket else 0
            return low + (ITEM_TIME_EDGES_NS[bucket] - low) * max(0.0, rank - seen) / count
        seen += count
    return float(ITEM_TIME_EDGES_NS[-1]) if seen < sum(counts) else 0.0
