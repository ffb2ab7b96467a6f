"""The fused tree sum of gradients against torch's additions and a plain parallel read.

python benchmarks/bench_gradients.py [--quick] [--json PATH] [--concurrency N]
"""

from __future__ import annotations

import ctypes
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from common import (
    CXX,
    Ratio,
    Report,
    Row,
    Section,
    arguments,
    best_of,
    compare,
    duration,
    race,
    timed,
)
from torch import Tensor

import torch_spheres as ts
from torch_spheres import KissingSpheres

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Sizes:
    rounds: int
    large: int
    deep: int
    other: int
    small_bytes: tuple[int, ...]
    small_seconds: float
    """How long one sample of a small sum lasts: as many calls as fit."""


FULL = Sizes(15, 25_000_000, 1_000_000, 5_000_000, (1 << 10, 10 << 10, 100 << 10, 1 << 20), 0.02)
QUICK = Sizes(3, 300_000, 10_000, 100_000, (1 << 10, 10 << 10, 100 << 10, 1 << 20), 0.001)


# ---- what is summed ----


@dataclass(frozen=True)
class Buffers:
    """Shards, and two tensors like them: for our sum, and for the peers'."""

    shards: list[Tensor]
    out: Tensor
    accumulator: Tensor

    @property
    def nbytes(self) -> int:
        """Of one shard."""
        return self.out.nbytes


def allocated(count: int, numel: int, dtype: torch.dtype = torch.float32) -> Buffers:
    """One tensor each, where torch puts them: large ones all start at the same page offset."""
    *shards, out, accumulator = [torch.empty(numel, dtype=dtype) for _ in range(count + 2)]
    for shard in shards:
        shard.uniform_(-1, 1)
    return Buffers(shards, out.zero_(), accumulator.zero_())


def staggered(count: int, numel: int) -> Buffers:
    """Rows of one tensor, whose addresses all differ modulo 4096, by a multiple of 64."""
    page, step = 4096, 4096 // (count + 2) // 64 * 64
    stride = (4 * numel + page - 1) // page * page + page + step
    rows = torch.zeros((count + 2) * stride // 4).as_strided((count + 2, numel), (stride // 4, 1))
    rows[:count].uniform_(-1, 1)
    assert len({row.data_ptr() % page for row in rows}) == count + 2
    *shards, out, accumulator = rows
    return Buffers(shards, out, accumulator)


# ---- the same sum in plain torch ----


@contextmanager
def intra_op_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def reference(shards: Sequence[Tensor]) -> Tensor:
    """The fixed tree of 12 or 144 shards, as the design page writes it."""

    def node(group: Sequence[Tensor]) -> Tensor:
        if len(group) == 1:
            return group[0].float() if group[0].dtype in HALF else group[0]
        c = [node(group[g::12]) for g in range(12)]
        a, b, d = ((c[i] + c[i + 1]) + (c[i + 2] + c[i + 3]) for i in (0, 4, 8))
        return (a + b) + d

    return node(shards).to(shards[0].dtype)


def verify(buffers: Buffers, spheres: KissingSpheres) -> None:
    """Raises AssertionError unless our sum has the bits of plain torch's."""
    buffers.out.fill_(float("nan"))
    ts.tree_sum(buffers.shards, out=buffers.out, spheres=spheres)
    same = torch.equal(buffers.out.view(torch.uint8), reference(buffers.shards).view(torch.uint8))
    assert same, "the sums of the fixed tree differ in their bits: nothing is worth timing"


def add_in_turn(buffers: Buffers, torch_threads: int) -> float:
    """Eleven `add_` for twelve shards; the first shard's copy is not timed."""
    with intra_op_threads(torch_threads):
        buffers.accumulator.copy_(buffers.shards[0])
        return timed(lambda: add_rest(buffers))


def add_rest(buffers: Buffers) -> None:
    accumulator = buffers.accumulator
    for shard in buffers.shards[1:]:
        accumulator.add_(shard)


def add_in_pairs(c: Sequence[Tensor], out: Tensor, scratch: Sequence[Tensor]) -> None:
    """The fixed tree with `add`, into memory that is there already."""
    quads = (out, *scratch[:2])
    for total, i in zip(quads, (0, 4, 8), strict=True):
        torch.add(c[i], c[i + 1], out=total)
        torch.add(c[i + 2], c[i + 3], out=scratch[2])
        total.add_(scratch[2])
    out.add_(quads[1]).add_(quads[2])


# ---- measurements ----


def large(spheres: KissingSpheres, buffers: Buffers, layout: str, rounds: int) -> list[Section]:
    """Sums of many megabytes, against torch and against reading the same memory."""
    verify(buffers, spheres)
    threads = spheres.concurrency
    shards, peer_out = buffers.shards, buffers.accumulator
    numel = buffers.out.numel()
    stacked = torch.empty(len(shards), numel)
    scratch = [torch.empty(numel) for _ in range(3)]

    def stack_and_sum() -> None:
        torch.stack(shards, out=stacked)
        torch.sum(stacked, 0, out=peer_out)

    ours = "tree_sum"
    reader()  # compiled before anything is timed
    with ThreadPoolExecutor(threads) as executor:
        readers = {
            "read, a share for each thread": partial(read_shares, executor, shards, threads),
            "read, whole buffers in turn": partial(read_pieces, executor, shards, 1),
            "read, quarters in turn": partial(read_pieces, executor, shards, 4),
        }
        calls: dict[str, Callable[[], object]] = {
            ours: lambda: ts.tree_sum(shards, out=buffers.out, spheres=spheres),
            "stack and sum(0)": stack_and_sum,
            "add in the same tree": lambda: add_in_pairs(shards, peer_out, scratch),
            "sum(0) of rows": lambda: torch.sum(rows_of(shards, stacked), 0, out=peer_out),
            **readers,
        }
        samples = race(
            {
                f"eleven add_, {threads} threads": partial(add_in_turn, buffers, threads),
                "eleven add_, 1 thread": partial(add_in_turn, buffers, 1),
                **{name: partial(timed, call) for name, call in calls.items()},
            },
            rounds,
        )
    title = f"12 float32 buffers of {numel:,} elements, {layout}, {threads} threads"
    times = Section(title, "time of the peer / time of tree_sum")
    notes = {
        "stack and sum(0)": "into memory that is there already",
        "add in the same tree": "into memory that is there already; the same bits as tree_sum",
        "sum(0) of rows": "for shards that are rows of one tensor from the start",
    }
    peers = {name: s for name, s in samples.items() if name not in readers}
    targets = {name: 3.0 for name in peers if name.startswith("eleven")}
    compare(times, peers, ours, targets, notes)

    bandwidth = Section(f"{title}: bandwidth", "bandwidth of tree_sum / that of the fastest read")
    bandwidth.samples = {name: list(samples[name]) for name in readers}
    read = best_of(samples, list(readers))
    bytes_read = len(shards) * buffers.nbytes
    for name in readers:
        value = gigabytes(bytes_read, samples[name])
        bandwidth.add(Row(name, value, note="the ceiling" if name == read else ""))
    for name, moved in (
        (f"{ours}, 12 reads + 1 write", bytes_read + buffers.nbytes),
        (f"{ours}, the 12 reads only", bytes_read),
    ):
        ratio = Ratio.of(
            [moved / t for t in samples[ours]], [bytes_read / t for t in samples[read]]
        )
        value = gigabytes(moved, samples[ours])
        bandwidth.add(Row(name, value, ratio, ">= 0.85", ratio.median >= 0.85))
    return [times, bandwidth]


def rows_of(shards: Sequence[Tensor], otherwise: Tensor) -> Tensor:
    """The shards as one tensor if they are rows of one, else a tensor like that."""
    first, second = shards[0], shards[1]
    if first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr():
        return otherwise
    stride = second.storage_offset() - first.storage_offset()
    return first.as_strided((len(shards), first.numel()), (stride, 1))


def read_shares(executor: ThreadPoolExecutor, shards: Sequence[Tensor], threads: int) -> None:
    """Each thread reads its part of every buffer."""

    def read(thread: int) -> None:
        for shard in shards:
            read_part(shard, thread, threads)

    list(executor.map(read, range(threads)))


def read_pieces(executor: ThreadPoolExecutor, shards: Sequence[Tensor], pieces: int) -> None:
    """Whoever is free reads the next piece of a buffer."""
    list(
        executor.map(
            lambda i: read_part(shards[i // pieces], i % pieces, pieces),
            range(len(shards) * pieces),
        )
    )


def read_part(shard: Tensor, part: int, parts: int) -> None:
    begin, end = (shard.numel() * i // parts for i in (part, part + 1))
    reader()(shard.data_ptr() + 4 * begin, end - begin)


@cache
def reader() -> Callable[[int, int], float]:
    """Compiles read_memory.cpp. The function reads so many floats from an address on."""
    source = Path(__file__).resolve().parent / "read_memory.cpp"
    with tempfile.TemporaryDirectory() as folder:
        library = str(Path(folder) / "read_memory.so")
        build = [CXX, "-std=c++20", "-O3", "-march=native", "-shared", "-fPIC", str(source)]
        subprocess.run([*build, "-o", library], check=True)
        function = ctypes.CDLL(library).read_range
    function.argtypes = ctypes.c_void_p, ctypes.c_size_t
    function.restype = ctypes.c_double
    return function


def gigabytes(moved: int, seconds: Sequence[float]) -> str:
    return f"{moved / statistics.median(seconds) / 1e9:.1f} GB/s"


def small(spheres: KissingSpheres, sizes: Sizes) -> Section:
    threads = spheres.concurrency
    section = Section(
        f"12 small float32 buffers, {threads} threads",
        "time of the faster add_ / time of tree_sum",
    )
    for nbytes in sizes.small_bytes:
        buffers = allocated(12, nbytes // 4)
        verify(buffers, spheres)
        shards, out = buffers.shards, buffers.out
        ours = partial(ts.tree_sum, shards, out=out, spheres=spheres)
        peer = partial(add_rest, buffers)
        calls = max(1, int(sizes.small_seconds / min(timed(peer) for _ in range(3))))
        samples = race(
            {
                "tree_sum": partial(per_call, ours, calls, threads),
                f"add_, {threads} threads": partial(per_call, peer, calls, threads),
                "add_, 1 thread": partial(per_call, peer, calls, 1),
            },
            sizes.rounds,
        )
        name = f"{nbytes // 1024} KiB each"
        section.samples |= {f"{name}: {who}": times for who, times in samples.items()}
        fastest = best_of(samples, [who for who in samples if who != "tree_sum"])
        ratio = Ratio.of(samples[fastest], samples["tree_sum"])
        others = (f"{who} {median(times)}" for who, times in samples.items() if who != "tree_sum")
        section.add(
            Row(
                name,
                median(samples["tree_sum"]),
                ratio,
                ">= 1",
                ratio.median >= 1,
                ", ".join(others),
            )
        )
    return section


def median(seconds: Sequence[float]) -> str:
    return duration(statistics.median(seconds))


def per_call(call: Callable[[], object], calls: int, torch_threads: int) -> float:
    """Seconds of a call, over many of them; the first, which may start threads, is not timed."""

    def repeat() -> None:
        for _ in range(calls):
            call()

    with intra_op_threads(torch_threads):
        call()
        return timed(repeat) / calls


def others(spheres: KissingSpheres, sizes: Sizes) -> Section:
    """A deeper tree, and the other element types."""
    section = Section(
        f"a deeper tree and other types, {spheres.concurrency} threads",
        "time of add_ / time of tree_sum; no target",
    )
    cases = [
        (144, sizes.deep, torch.float32, ""),
        (12, sizes.other, torch.float64, ""),
        (12, sizes.other, torch.bfloat16, "tree_sum rounds once, add_ eleven times"),
        (12, sizes.other, torch.float16, "tree_sum rounds once, add_ eleven times"),
    ]
    for count, numel, dtype, note in cases:
        buffers = allocated(count, numel, dtype)
        verify(buffers, spheres)
        ours = partial(ts.tree_sum, buffers.shards, out=buffers.out, spheres=spheres)
        peer = partial(add_in_turn, buffers, spheres.concurrency)
        samples = race({"tree_sum": partial(timed, ours), "add_": peer}, sizes.rounds)
        name = f"{count} x {numel:,} {str(dtype).removeprefix('torch.')}"
        section.samples |= {f"{name}: {who}": times for who, times in samples.items()}
        section.add(
            Row(
                name,
                median(samples["tree_sum"]),
                Ratio.of(samples["add_"], samples["tree_sum"]),
                note=f"{count - 1} add_: {median(samples['add_'])}" + (note and f"; {note}"),
            )
        )
    return section


def main() -> None:
    options = arguments("gradients", "The fused tree sum against torch's additions.")
    sizes = QUICK if options.quick else FULL
    torch.set_grad_enabled(False)
    torch.set_num_threads(options.concurrency)
    settings = {"concurrency": options.concurrency, "quick": options.quick, **vars(sizes)}
    report = Report("bench_gradients", settings)
    with KissingSpheres(2, concurrency=options.concurrency) as spheres:
        for make, layout in ((staggered, "staggered"), (allocated, "as torch allocates them")):
            for section in large(spheres, make(12, sizes.large), layout, sizes.rounds):
                report.add(section)
        report.add(small(spheres, sizes))
        report.add(others(spheres, sizes))
    report.save(options.json)


if __name__ == "__main__":
    main()
