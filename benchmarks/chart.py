"""Draws what bench_training.py measured: speeds relative to plain torch, a dot for each way.

python benchmarks/chart.py results/training.json training.png
python benchmarks/chart.py results/loader.json loader.png

The second is drawn by loader_chart.py.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from contestants import ACCUMULATE, DDP, FORWARD_BACKWARD, PLAIN, REPRODUCIBLE, TUNED

# colour, marker, filled?, and what the legend says
STYLES = {
    ACCUMULATE: ("#8a8a8a", "s", True, "twelve-fold accumulation"),
    DDP: ("#3d3d3d", "D", True, "DDP, a process for each core"),
    FORWARD_BACKWARD: ("#d9730d", "o", False, "ours, forward_backward, the same bits"),
    REPRODUCIBLE: ("#d9730d", "o", True, "ours, the same bits"),
    TUNED: ("#1769c0", "o", True, "ours, reproducible=False"),
}
TITLE = re.compile(r"(small|large) batches, (\d+) worker")
TICKS = (0.125, 0.18, 0.25, 0.35, 0.5, 0.7, 1, 1.4, 2, 2.8, 4)

Spread = tuple[float, float, float]
"""First quartile, median, third quartile."""
Speeds = dict[str, dict[str, Spread]]
"""By row and way: how many times as fast as plain."""
Styles = Mapping[str, tuple[str, str, bool, str]]


def speeds(samples: Mapping[str, Sequence[float]]) -> Speeds:
    """From a section's samples, which are named ``row: way``."""
    rows: dict[str, dict[str, Sequence[float]]] = {}
    for name, seconds in samples.items():
        row, _, way = name.rpartition(": ")
        rows.setdefault(row, {})[way] = seconds
    return {
        row: {
            way: spread([p / s for p, s in zip(ways[PLAIN], seconds, strict=True)])
            for way, seconds in ways.items()
            if way in STYLES
        }
        for row, ways in rows.items()
    }


def spread(ratios: Sequence[float]) -> Spread:
    if len(ratios) < 2:
        return ratios[0], ratios[0], ratios[0]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return low, median, high


def draw(sections: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One panel for each batch size, with the most workers that were measured."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    found = [(title, s) for s in sections if (title := TITLE.match(s["title"])) and s["samples"]]
    if not found:
        raise ValueError("there are no training steps to draw among the sections")
    workers = max(int(title[2]) for title, _ in found)
    panels = [(title[1], speeds(s["samples"])) for title, s in found if int(title[2]) == workers]
    rows = max(len(measured) for _, measured in panels)
    figure, axes = plt.subplots(
        1, len(panels), figsize=(5.2 * len(panels), 1.7 + 0.52 * rows), squeeze=False,
        sharex=True, layout="constrained",
    )  # fmt: skip
    for axis, (size, measured) in zip(axes[0], panels, strict=True):
        panel(axis, measured)
        axis.set_title(f"{size} batches", fontsize=10)
    every = [s for _, measured in panels for ways in measured.values() for s in ways.values()]
    limits = min(0.7, *(low for low, _, _ in every)), max(1.4, *(high for _, _, high in every))
    ticks = [t for t in TICKS if limits[0] / 1.1 <= t <= limits[1] * 1.1]
    if len(ticks) > 7:
        ticks = [t for t in ticks if math.log2(t).is_integer()]
    axes[0][0].set_xscale("log")
    axes[0][0].set_xlim(limits[0] / 1.08, limits[1] * 1.08)
    axes[0][0].set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes[0][0].minorticks_off()
    figure.supxlabel(
        f"speed relative to plain torch with {workers} intra-op threads (right is faster; "
        "dots are medians, lines quartiles)",
        fontsize=9,
    )
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=9, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def panel(axis: Any, measured: Speeds, styles: Styles = STYLES) -> None:
    """A line of dots for each row, the first on top."""
    axis.axvline(1, color="#b0b0b0", linewidth=1, zorder=0)
    for i, (way, (colour, marker, filled, label)) in enumerate(styles.items()):
        here = [(y, ways[way]) for y, ways in enumerate(measured.values()) if way in ways]
        if not here:
            continue
        # A little below one another, so that equal speeds stay visible.
        heights = [y + 0.65 * ((i + 0.5) / len(styles) - 0.5) for y, _ in here]
        axis.hlines(heights, [s[0] for _, s in here], [s[2] for _, s in here], colour, linewidth=1)
        axis.plot(
            [s[1] for _, s in here], heights, marker, color=colour, label=label, markersize=5.5,
            markerfacecolor=colour if filled else "white",
        )  # fmt: skip
    for y in range(len(measured) - 1):
        axis.axhline(y + 0.5, color="#ececec", linewidth=0.8, zorder=0)
    axis.set_yticks(range(len(measured)), list(measured), fontsize=9)
    axis.set_ylim(len(measured) - 0.5, -0.5)
    axis.tick_params(length=0)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    report = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if report["benchmark"] == "bench_loader":
        import loader_chart

        loader_chart.draw(report["sections"], Path(sys.argv[2]))
    else:
        draw(report["sections"], Path(sys.argv[2]))


if __name__ == "__main__":
    main()
