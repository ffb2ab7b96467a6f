"""Trains with a batch that does not fit: `forward_backward` keeps few shards' activations.

    python examples/big_batch.py --limit-mib 400             # 144 shards: trains
    python examples/big_batch.py --limit-mib 400 --plain     # the usual loop: out of memory

The limit is on the address space that the process may add to what it has after starting up. With
three levels there are 144 shards, of which at most --concurrency have activations at a time.
"""

from __future__ import annotations

import argparse
import resource
import sys
from pathlib import Path

import torch
from torch import nn

import torch_spheres as ts


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=positive, default=28_800)
    parser.add_argument("--width", type=positive, default=256)
    parser.add_argument("--depth", type=positive, default=24)
    parser.add_argument("--steps", type=positive, default=3)
    parser.add_argument("--limit-mib", type=positive, help="MiB that may be added; default: any")
    parser.add_argument("--concurrency", type=positive, default=2)
    parser.add_argument("--plain", action="store_true", help="the usual loop, without spheres")
    return parser.parse_args()


def limit_memory(mib: int) -> None:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    allowed = pages * resource.getpagesize() + (mib << 20)
    resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    layers = [
        layer for _ in range(args.depth) for layer in (nn.Linear(args.width, args.width), nn.GELU())
    ]
    model: nn.Module = nn.Sequential(*layers, nn.Linear(args.width, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x = torch.randn(args.rows, args.width)
    y = x.mean(1, keepdim=True)
    criterion = nn.MSELoss()
    activations = args.rows * args.width * 4 * 2 * args.depth
    print(f"activations of the whole batch: {activations >> 20} MiB", flush=True)

    if args.plain:
        criterion(model(x[:2]), y[:2]).backward()  # threads and kernels are there before the limit
    else:
        spheres = ts.KissingSpheres(levels=3, concurrency=args.concurrency).start()
        model = ts.SphereParallel(model, spheres)
    if args.limit_mib is not None:
        limit_memory(args.limit_mib)
    for step in range(args.steps):
        optimizer.zero_grad()
        if args.plain:
            loss = criterion(model(x), y)
            loss.backward()
        else:
            loss = model.forward_backward(criterion, x, y)
        optimizer.step()
        print(f"step {step + 1}: loss {loss.item():.6f}", flush=True)


if __name__ == "__main__":
    try:
        main(parse())
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        sys.exit("big_batch.py: out of memory")
