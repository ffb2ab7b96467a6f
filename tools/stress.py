"""Runtime, loader and training by many threads at once, with every item, sum and bit counted.

    python tools/stress.py --minutes 60          # best with a Python that has no GIL

Round after round, threads repeat the functions in ROUNDS with other sizes, on other spheres, with
sleeps at random. Each compares what comes out with what plain Python, or plain torch, gives: items
and sums, the order of messages, batches, and the bits of weights, optimizer state, gradients and
losses. The exit status is 1 if anything was wrong, or if a thread did not come back.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import functools
import itertools
import random
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import native_items
import reference
import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, get_worker_info

import torch_spheres as ts

LOST = 300  # seconds after the end of a round in which a thread may still come back
ROWS = 50
chance = random.Random()  # loaders warn of draws from the generator of the process


def nap() -> None:
    """Sometimes sleeps, so that threads meet in other orders each time."""
    if chance.random() < 0.02:
        time.sleep(chance.random() * 0.002)


def same(got: Any, expected: Any, what: str) -> None:
    if got != expected:
        raise AssertionError(f"{what}: {got!r:.500} instead of {expected!r:.500}")


# ---- the runtime ----


def items(spheres: ts.KissingSpheres, counts: Counter[str]) -> None:
    """Python items, some of which submit more, native items, and an item that fails."""
    count, base = chance.choice((1, 11, 12, 13, 100, 1000)), chance.randrange(1 << 40)
    numbers, bad, error = range(base, base + count), base + count // 2, LookupError(base)
    seen: list[int] = []
    nested: list[int] = []
    handles: list[ts.Work] = []

    def run(item: int) -> int:
        nap()
        seen.append(item)
        if item % 50 == 0:
            try:
                handles.append(spheres.distribute_work([item, item], nested.append))
            except RuntimeError:  # 64 batches are in flight, and an item must not wait
                nested.extend([item, item])
        return item * item

    def fail(item: int) -> None:
        if item == bad:
            raise error

    tally = native_items.Tally()
    work = spheres.distribute_work(numbers, run)
    native = spheres.distribute_work(range(count), tally.function())
    same(spheres.map(run, numbers), [item * item for item in numbers], "results of map")
    for handle in (work, native):
        handle.wait()
    for handle in handles:  # all there will be
        handle.wait()
    same(sorted(seen), sorted([*numbers] * 2), "items")
    same(sorted(nested), sorted([n for n in numbers if n % 50 == 0] * 4), "nested items")
    same((tally.count, tally.sum), (count, sum(range(count))), "native items and their sum")
    caught: list[LookupError] = []
    try:
        spheres.map(fail, numbers)
    except LookupError as raised:
        caught.append(raised)
    same(caught, [error], "the error")
    counts.update({"items": 2 * count + len(nested), "native items": count, "errors": 1})


def barriers(spheres: ts.KissingSpheres, counts: Counter[str]) -> None:
    """What was submitted before a barrier has run after it."""
    count = chance.randrange(40)
    seen: list[int] = []
    work = spheres.distribute_work(range(count), seen.append)
    meet: Any = chance.choice((spheres.epoch, lambda: spheres.barrier(spheres.levels - 1)))
    try:
        meet()
    except RuntimeError as error:  # somebody's item failed, which opens all barriers
        if "a work item failed" not in str(error):
            raise
        work.wait()
    same((work.done(), sum(seen)), (True, sum(range(count))), "items before a barrier")
    counts.update({"barriers": 1, "items": count})


def stops(_: ts.KissingSpheres, counts: Counter[str]) -> None:
    """Spheres are stopped while three threads submit: each item has run, or is told as lost."""
    spheres = ts.KissingSpheres(chance.choice((1, 2, 3)), concurrency=chance.choice((1, 2, 5)))

    def submit(base: int) -> tuple[list[ts.Work], list[int]]:
        works: list[ts.Work] = []
        ran: list[int] = []
        with contextlib.suppress(ts.StoppedError):
            for begin in itertools.count(base, 20):
                numbers = range(begin, begin + chance.randrange(20))
                works.append(spheres.distribute_work(numbers, ran.append))
                nap()
        return works, ran

    with ThreadPoolExecutor(5) as threads:
        for _time in range(3):
            spheres.start()
            users = [threads.submit(submit, user << 40) for user in range(3)]
            time.sleep(chance.random() * 0.02)
            for stopping in [threads.submit(spheres.stop) for _ in range(2)]:
                stopping.result()
            for works, ran in (user.result() for user in users):
                lost = sum(work.cancelled for work in works)
                same(len(set(ran)), len(ran), "items run twice")
                same(len(ran) + lost, sum(work.items for work in works), "items run and lost")
                counts.update({"items": len(ran), "items lost, as told": lost})
            counts["stops"] += 1


def messages(_: ts.KissingSpheres, counts: Counter[str]) -> None:
    """Three senders and two receivers at one mailbox: nothing is lost, doubled or overtaken."""
    count, sources = chance.choice((10, 200)), (0, 1, 2)  # the parent and two siblings of sphere 3

    def send(source: int) -> None:
        for number in range(count):
            nap()
            while True:
                try:
                    spheres.send(source, 3, (source, number))
                    break
                except OverflowError:
                    time.sleep(0.001)

    def receive(share: int) -> list[tuple[int, int]]:
        return [spheres.receive(3, LOST) for _ in range(share)]

    with ts.KissingSpheres() as spheres, ThreadPoolExecutor(5) as threads:
        receivers = [threads.submit(receive, share) for share in (count, 2 * count)]
        for sender in [threads.submit(send, source) for source in sources]:
            sender.result()
        got = [receiver.result() for receiver in receivers]
    for letters, source in itertools.product(got, sources):
        order = [number for sender, number in letters if sender == source]
        same(order, sorted(order), "the order of messages")
    same(sorted(itertools.chain(*got)), [*itertools.product(sources, range(count))], "messages")
    counts["messages"] += 3 * count


# ---- loading ----


class Rows(Dataset):
    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> Any:
        nap()
        return index, torch.rand(2)


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        return (Rows()[index] for index in range(info.id, ROWS, info.num_workers))


def plain_loader(kind: str, workers: int, persistent: bool, **options: Any) -> DataLoader:
    tensors = TensorDataset(torch.arange(ROWS), torch.arange(2 * ROWS).view(ROWS, 2))
    options |= {"num_workers": workers, "persistent_workers": persistent}
    options |= {"shuffle": kind != "stream", "generator": torch.Generator().manual_seed(5)}
    return DataLoader({"rows": Rows(), "stream": Stream()}.get(kind, tensors), 4, **options)


def listed(loader: DataLoader, batches: int | None = None) -> list[Any]:
    return [[p.tolist() for p in batch] for batch in itertools.islice(loader, batches)]


@functools.cache
def expected_batches(*case: Any) -> list[list[Any]]:
    """Those of two epochs, by worker processes."""
    loader = plain_loader(*case, multiprocessing_context="fork" if case[1] else None)
    return [listed(loader), listed(loader)]


LOADERS: list[Any] = [("tensors", 0, False)]
LOADERS += itertools.product(("rows", "stream", "tensors"), (1, 2), (False, True))


def loading(spheres: ts.KissingSpheres, counts: Counter[str]) -> None:
    """Two epochs, or the beginning of one."""
    case, take = chance.choice(LOADERS), chance.choice((None, None, chance.randrange(1, 6)))
    loader = ts.wrap(plain_loader(*case), chance.choice((spheres, None)))
    # How far ahead the workers were decides what is drawn after an early end.
    for epoch, expected in enumerate(expected_batches(*case)[: 1 if take else 2]):
        same(listed(loader, take), expected[:take], f"{case}, epoch {epoch}, take {take}")
        counts.update({"loops": 1, "batches": len(expected[:take])})


# ---- training ----

# Models that draw random numbers train one at a time: all draw from the process's generator.
ALONE = ("mlp with dropout", "residual net", "transformer with dropout", "lstm with dropout")
TOGETHER = ("cnn with batch norm", "tied, unused, frozen", "mixture of experts", "sparse embedding")
# Work functions that all write to one buffer would be a race of the user's: no batch norm by hand.
CASES: list[Any] = [*itertools.product(ALONE + TOGETHER, ("call", "forward_backward"))]
CASES += itertools.product(TOGETHER[1:], ("by hand",))
making = threading.Lock()


def shard_gradients(model: nn.Module, x: Tensor, y: Tensor) -> tuple[list[Any], Any]:
    params = [p for p in model.parameters() if p.requires_grad]
    loss = F.cross_entropy(model(x), y, reduction="sum") / ROWS
    return params, torch.autograd.grad(loss, params, allow_unused=True)


def by_hand(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The reference of a loop that gives gradients to a `GradientHook`."""
    with reference.one_thread():
        shards = [*zip(x.tensor_split(12), y.tensor_split(12), strict=True)]
        grads = [shard_gradients(model, *shard) for shard in shards]
    for p, column in zip(grads[0][0], zip(*(g for _, g in grads), strict=True), strict=True):
        p.grad = reference.tree(column)
    return torch.zeros(())


def train(name: str, step: Callable[..., Tensor], model: nn.Module) -> str:
    optimizers = zoo.optimizer_of(model, "sgd")
    losses = []
    hooks: list[ts.GradientHook] = []
    for x, y in zoo.batches(ROWS):
        optimizers.zero_grad()
        losses.append(step(model, x, y, hooks, optimizers.each[0]))
        optimizers.step()
    bits = zoo.fingerprint(model, optimizers, losses)
    return bits if name in ALONE else bits.partition(" random:")[0]


@functools.cache
def expected_bits(name: str, way: str) -> str:
    steps = {"call": reference.train_step, "forward_backward": reference.train_step_by_shard}

    def step(model: nn.Module, x: Tensor, y: Tensor, *_: Any) -> Tensor:
        return (
            steps[way](model, x, y, F.cross_entropy, 12) if way in steps else by_hand(model, x, y)
        )

    return train(name, step, zoo.make(name))


def train_on(spheres: ts.KissingSpheres, name: str, way: str) -> str:
    with making:
        model = zoo.make(name)
    parallel = model if way == "by hand" else ts.SphereParallel(model, spheres)

    def step(
        _: nn.Module, x: Tensor, y: Tensor, hooks: list[ts.GradientHook], optimizer: Any
    ) -> Tensor:
        if not hooks:
            hooks.append(ts.GradientHook(optimizer, spheres if way == "by hand" else parallel))
        if way == "forward_backward":
            return parallel.forward_backward(F.cross_entropy, x, y)
        if way == "call":
            loss = F.cross_entropy(parallel(x), y)
            loss.backward()
            return loss
        xs, ys = x.tensor_split(12), y.tensor_split(12)

        def shard(k: int) -> None:
            nap()
            hooks[0].add(k, dict(zip(*shard_gradients(model, xs[k], ys[k]), strict=True)))

        spheres.distribute_work(range(12), shard).wait()
        return torch.zeros(())

    return train(name, step, model)


def training(spheres: ts.KissingSpheres, counts: Counter[str], names: Any = TOGETHER) -> None:
    """Three steps, on the spheres that others use too, or on some of its own."""
    name, way = chance.choice([case for case in CASES if case[0] in names])
    concurrency = chance.choice((0, 1, 2, 3, 5, 12))
    if concurrency:
        with ts.KissingSpheres(concurrency=concurrency) as own:
            bits = train_on(own, name, way)
    else:
        bits = train_on(spheres, name, way)
    same(bits, expected_bits(name, way), f"bits of {name}, {way}, concurrency {concurrency}")
    counts.update({"steps": 3, "models": 1})


def training_alone(spheres: ts.KissingSpheres, counts: Counter[str]) -> None:
    training(spheres, counts, ALONE)


# ---- rounds ----

ALWAYS = (items, items, barriers, stops, messages, loading, loading)
ROUNDS = ((*ALWAYS, training, training), (*ALWAYS, training_alone))


def one_round(number: int, seconds: float, total: Counter[str]) -> int:
    """Each function in a thread of its own, again and again; how many found something wrong."""
    chance.seed(number)
    functions = ROUNDS[number % len(ROUNDS)]
    end, wrong = time.monotonic() + seconds, 0

    def repeat(function: Callable[..., None]) -> Counter[str]:
        counts: Counter[str] = Counter()
        while time.monotonic() < end:
            function(spheres, counts)
        return counts

    spheres = ts.KissingSpheres(concurrency=chance.choice((1, 2, 4, 12)))
    with spheres, ThreadPoolExecutor(len(functions)) as threads:
        for done in [threads.submit(repeat, function) for function in functions]:
            try:
                total.update(done.result())
            except Exception:  # noqa: BLE001 - it is told, and counted
                wrong += 1
                print(f"round {number}, {spheres}:", traceback.format_exc(), flush=True)
    total["rounds"] += 1
    return wrong


def main() -> int:
    """1 if anything was wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seconds", type=float, default=15.0, help="that a round takes")
    options = parser.parse_args()
    warnings.simplefilter("error")
    for known in ("the loop waited", "the shards of this model", "stop", "something drew random"):
        warnings.filterwarnings("ignore", known)  # advice; stop()'s of what it lost; other threads
    has_gil = getattr(sys, "_is_gil_enabled", lambda: True)
    for case in LOADERS:  # while there is one thread
        expected_batches(*case)
    for case in CASES:
        expected_bits(*case)
    total: Counter[str] = Counter()
    wrong, begin, told = 0, time.monotonic(), 0.0
    while (left := begin + 60 * options.minutes - time.monotonic()) > 0:
        faulthandler.dump_traceback_later(options.seconds + LOST, exit=True)
        wrong += one_round(total["rounds"], min(options.seconds, left), total)
        faulthandler.cancel_dump_traceback_later()
        minutes = (time.monotonic() - begin) / 60
        if minutes - told > 1 or minutes >= options.minutes:
            told = minutes
            memory = int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20
            counted = ", ".join(f"{count:,} {what}" for what, count in total.items())
            print(
                f"{minutes:.1f} minutes, GIL: {has_gil()}, {memory} MiB, {wrong} wrong: {counted}",
                flush=True,
            )
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
