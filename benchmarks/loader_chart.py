"""Draws what bench_loader.py measured: each way to load relative to the best plain `DataLoader`.

python benchmarks/chart.py results/loader.json loader.png
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import loader_contestants as names
from chart import Speeds, panel, spread

# colour (Okabe and Ito's, which colour-blind people tell apart), marker, filled?, legend
STYLES = {
    names.OURS: ("#0072b2", "o", True, "ours, with workers"),
    names.OURS_NO_WORKERS: ("#0072b2", "o", False, "ours, num_workers=0"),
    names.OURS_PROCESS: ("#009e73", "P", True, 'ours, workers="process"'),
    names.NO_WORKERS: ("#8a8a8a", "s", False, "DataLoader, num_workers=0"),
    names.PROCESSES: ("#3d3d3d", "D", False, "DataLoader, new processes"),
    names.FORKSERVER: ("#3d3d3d", "x", True, "the same, forkserver"),
    names.PERSISTENT: ("#3d3d3d", "D", True, "DataLoader, persistent processes"),
    names.PREFETCH: ("#8a8a8a", "s", True, "persistent, prefetch_factor=8"),
    names.WHOLE: ("#cc79a7", "X", True, "DataLoader, __getitems__ by hand"),
    names.SPDL: ("#d55e00", "^", True, "SPDL, threads"),
    names.NODES: ("#e69f00", "v", True, "torchdata.nodes, threads"),
}


def ratios(samples: Mapping[str, Sequence[float]]) -> dict[str, tuple[float, float, float]]:
    """How many times as good as the plain loader with the best median; small samples are good."""
    plain = [name for name in samples if name in names.PLAIN]
    best = samples[min(plain, key=lambda name: statistics.median(samples[name]))]
    return {
        name: spread([b / s for b, s in zip(best, samples[name], strict=True)])
        for name in STYLES
        if name in samples
    }


def draw(sections: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A line for each section; its name is what its title has before the colon."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows: Speeds = {s["title"].partition(":")[0]: ratios(s["samples"]) for s in sections}
    used = {name for row in rows.values() for name in row}
    figure, axis = plt.subplots(figsize=(9, 1.8 + 0.72 * len(rows)), layout="constrained")
    panel(axis, rows, {name: style for name, style in STYLES.items() if name in used})
    every = [part for row in rows.values() for each in row.values() for part in each]
    powers = range(math.floor(math.log2(min(every))), math.ceil(math.log2(max(every))) + 1)
    ticks = [2.0**power for power in powers]
    axis.set_xscale("log")
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_xlim(min(every) / 1.15, max(every) * 1.15)
    axis.minorticks_off()
    axis.set_xlabel(
        "times as fast (memory: times as little) as the best plain DataLoader of the row\n"
        "(right is better, dots are medians, lines quartiles)",
        fontsize=9,
    )
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=9, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
