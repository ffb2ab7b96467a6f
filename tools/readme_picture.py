"""Draws the README's picture from a real run: an epoch of the MNIST trainer's model, and one step.

    python tools/readme_picture.py                  # writes docs/spheres.png

Needs the examples' extra: pip install ".[examples]".
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import torch_spheres as ts

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from mnist_data import load_mnist  # noqa: E402


def run(concurrency: int, batch_size: int) -> tuple[ts.KissingSpheres, ts.Trace]:
    """Trains an epoch, then traces a few steps; the spheres, and the trace of the fastest."""
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", message="the shards of this model are so small")
    data = load_mnist(None)
    module = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 7 * 7, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip
    spheres = ts.KissingSpheres(levels=2, concurrency=concurrency)
    model, optimizer, loader = ts.prepare(
        module,
        torch.optim.AdamW(module.parameters(), lr=1e-3),
        DataLoader(TensorDataset(data.train_x, data.train_y), batch_size, shuffle=True),
        spheres,
    )
    criterion = nn.CrossEntropyLoss()

    def step(x: torch.Tensor, y: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()

    for x, y in loader:
        step(x, y)
    traces = []
    for x, y in loader:
        with spheres.trace() as trace:
            step(x, y)
        traces.append(trace)
    return spheres, min(traces, key=lambda trace: trace.end_ns - trace.begin_ns)


def draw(spheres: ts.KissingSpheres, trace: ts.Trace, path: Path) -> None:
    figure = Figure(figsize=(12, 5.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(5, 7))
    spheres.plot(left.add_subplot())
    ts.plot_timeline(trace, right.add_subplot())
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, pil_kwargs={"optimize": True})
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "spheres.png")
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=384)
    args = parser.parse_args()
    spheres, trace = run(args.concurrency, args.batch_size)
    with spheres:
        draw(spheres, trace, args.out)


if __name__ == "__main__":
    main()
