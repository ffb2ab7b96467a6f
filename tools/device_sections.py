"""The sections of device_check.py: each yields what was looked at, what came out, and a verdict.

Each is given the time, of `time.monotonic()`, at which its process is ended: it leaves out what it
cannot do before, and says so.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODELS = {"MNIST CNN": "large", "Transformer": "small", "ResNet-18": "small",
          "GPT-2, 4 layers": "small"}  # by model: which of its batches  # fmt: skip
WANTED = (
    "MNIST CNN",
    "GPT-2, 4 layers",
)  # for these there are targets on as many workers as shards
A_COUNT = 20  # seconds that one number of workers may take
BITS = ("mlp with dropout", "cnn with batch norm", "transformer with dropout")

Result = Iterator[tuple[str, str, bool | None]]
"""What was looked at, what came out, whether that is right; None: a figure, which is not judged."""


def check_bits(until: float) -> Result:
    """Digests of training: equal for every concurrency, on the CPU and on CUDA."""
    del until
    import torch
    from test_cuda import train

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        for name in BITS:
            # 12 shards run on at most 12 spheres; 16 have something to do where there are 144.
            for levels, counts in ((2, range(1, 13)), (3, (1, 16))):
                found: dict[str, list[int]] = {}
                for n in (1, *counts):  # 1 twice: whether the device itself repeats its bits
                    found.setdefault(train(name, device, n, levels=levels)[0], []).append(n)
                what = (
                    f"{name} on {device}, levels={levels}, concurrency {counts[0]} to {counts[-1]}"
                )
                yield what, " / ".join(f"{d[:12]}: {c}" for d, c in found.items()), len(found) == 1
    if len(devices) == 1:
        yield "CUDA", "no device", None


def check_cuda_tests(until: float) -> Result:
    """The tests that are marked cuda."""
    files = [str(p) for p in (ROOT / "tests").glob("test_*.py") if "mark.cuda" in p.read_text()]
    command = [sys.executable, "-P", "-m", "pytest", "-m", "cuda", "-v", "-rfE", *sorted(files)]
    with subprocess.Popen(
        [*command, "-p", "no:cacheprovider", "--timeout=30"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        limit = threading.Timer(until - time.monotonic() - 5, process.kill)
        limit.start()
        last = ""
        for line in process.stdout or ():
            last = line.strip() or last
            if line.startswith(("FAILED", "ERROR")):
                yield line.split(" - ")[0].strip(), line.partition(" - ")[2].strip(), False
        code = process.wait()
        limit.cancel()
    yield "pytest -m cuda", last, code == 0


def check_processes(until: float) -> Result:
    """A process group of one rank: NCCL where there is a GPU, gloo elsewhere."""
    del until
    import torch
    import torch.distributed as dist
    from torch import nn

    import torch_spheres as ts
    from torch_spheres.distributed.group import Ranks
    from torch_spheres.distributed.tree_all_reduce import total_over_ranks

    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend = "nccl" if device == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        meeting = Path(folder, "meeting").as_uri()
        dist.init_process_group(backend, init_method=meeting, rank=0, world_size=1)
        try:
            # What ranks say to each other; a group of one has nobody else to say it to.
            ranks = Ranks(None)
            told = ranks.meet("the check", [1, 2, 3], None).tolist()
            yield f"meeting, {backend}, on {ranks.device}", str(told), told == [[1, 2, 3]]
            objects = ranks.objects({"a": 1}, "the check")
            yield f"objects, {backend}", str(objects), objects == [{"a": 1}]
            columns = [[torch.full((50_000,), float(k), device=device) for k in range(12)]]
            (total,) = total_over_ranks(columns, [columns[0][0]], ranks)
            assert total is not None
            yield f"exchange of sums, {backend}", f"{total[0].item()}", bool((total == 66).all())

            x = torch.randn(96, 20, device=device)

            def gradients(wrap: Callable[[nn.Module], nn.Module]) -> list[torch.Tensor]:
                torch.manual_seed(0)
                model = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 3)).to(device)
                wrapped = wrap(model)
                for _ in range(3):
                    wrapped(x).square().mean().backward()
                return [p.grad.cpu() for p in model.parameters()]

            def inside_ddp(model: nn.Module) -> nn.Module:
                parallel = ts.SphereParallel(model, process_group=False)
                return nn.parallel.DistributedDataParallel(parallel)

            bare = gradients(lambda model: model)
            for name, wrap in (
                ("SphereParallel", ts.SphereParallel),
                ("DDP around it", inside_ddp),
            ):
                pairs = zip(gradients(wrap), bare, strict=True)
                ok = all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in pairs)
                yield f"{name}, {backend}, one rank", "gradients of the bare module", ok
        finally:
            dist.destroy_process_group()


class Photos:
    """Samples that take arithmetic without the GIL, 600 KB each."""

    def __len__(self) -> int:
        return 768

    def __getitem__(self, index: int) -> Any:
        import torch

        return torch.full((3, 224, 224), float(index)).sin_().mul_(0.5)


def check_loader(until: float) -> Result:
    """Batches to the device: `wrap(device=)` against pinned memory and non-blocking copies."""
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    import torch_spheres as ts

    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"

    tensors = TensorDataset(torch.randn(60_000, 784), torch.randint(10, (60_000,)))
    workers = min(4, ts.usable_cores())
    parts = 2
    for name, dataset, size in (
        ("60,000 x 784 floats in memory, batches of 768", tensors, 768),
        ("768 samples of 3 x 224 x 224 computed, batches of 64", Photos(), 64),
    ):

        def plain(n: int, dataset: Any = dataset, size: int = size) -> DataLoader:
            return DataLoader(
                dataset, size, num_workers=n, pin_memory=cuda, persistent_workers=n > 0
            )

        with ts.KissingSpheres() as spheres:
            loaders = {f"DataLoader, {n} workers": plain(n) for n in (0, workers)}
            loaders |= {
                f"wrap, {n} workers": ts.wrap(plain(n), spheres, device=device)
                for n in (0, workers)
            }

            def epoch(loader: DataLoader) -> float:
                begin = time.perf_counter()
                total = torch.zeros((), device=device)
                for batch in loader:
                    x = batch[0] if isinstance(batch, list) else batch
                    total += x.to(device, non_blocking=True).sum()
                total.item()  # waits for the device
                return time.perf_counter() - begin

            now = time.monotonic()
            end, parts = now + (until - now - 5) / parts, parts - 1
            times: dict[str, list[float]] = {key: [] for key in loaders}
            took = 0.0  # by the slowest round; the first one is for warming up
            for turn in range(8):
                begin = time.monotonic()
                if turn > 0 and begin + took > end:
                    break
                for key, loader in loaders.items():
                    seconds = epoch(loader)
                    if turn > 0:
                        times[key].append(seconds)
                took = max(took, time.monotonic() - begin)
        median = {key: statistics.median(t) for key, t in times.items() if t}
        best = min((v for k, v in median.items() if k.startswith("Data")), default=float("nan"))
        if not median:
            yield name, "not measured: no time was left", None
        for key, value in median.items():
            ratio = f"{value * 1e3:.0f} ms an epoch, {best / value:.2f} of the best DataLoader"
            yield f"{name}: {key} to {device}", ratio, None


def check_runtime(until: float) -> Result:
    """`bench_runtime.py --quick`: that it runs; its figures are those of a smoke test."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "runtime.json")
        command = [sys.executable, "-P", str(ROOT / "benchmarks" / "bench_runtime.py"), "--quick"]
        try:
            done = subprocess.run(
                [*command, "--json", str(path)],
                capture_output=True, text=True, check=False, timeout=until - time.monotonic() - 5,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            yield "bench_runtime.py --quick", "no time was left", None
            return
        if done.returncode != 0:
            yield "bench_runtime.py --quick", done.stderr.strip()[-300:], False
            return
        for section in json.loads(path.read_text())["sections"]:
            for row in section["rows"]:
                ratio = "" if row["ratio"] is None else f", ratio {row['ratio']['median']:.2f}"
                yield f"{section['title']}: {row['name']}", f"{row['value']}{ratio}", None


def check_training(until: float) -> Result:
    """Steps of four models on 1 to 16 workers, against plain torch and DDP on as many."""
    from contestants import DDP, PLAIN, REPRODUCIBLE, SHARDS, TUNED, Setup
    from crews import Crews
    from models import TASKS

    import torch_spheres as ts

    peers, ours = (PLAIN, DDP), (REPRODUCIBLE, TUNED)
    # The ends of the scale first: they tell most, if the time runs out.
    counts = [n for n in (1, 16, 8, 4, 12, 2) if n <= ts.usable_cores()]
    for left, name in zip(range(len(MODELS), 0, -1), MODELS, strict=True):
        now = time.monotonic()
        end = now + (until - now) / left - A_COUNT  # what one does not need is the next ones'
        if now > end:
            yield name, "not measured: no time was left", None
            continue
        rows: int = getattr(TASKS[name], MODELS[name])
        setups = [Setup(way, name, rows, n) for n in counts for way in (*peers, *ours)]
        one: dict[str, float] = {}
        with Crews(setups) as crews:
            for n in counts:
                title = f"{name}, {rows} rows, {n} worker{'s' * (n > 1)}"
                title += " (12 of ours: there are 12 shards)" * (n > SHARDS)
                if time.monotonic() > end:
                    yield title, "not measured: no time was left", None
                    continue
                there = {c.setup.way: c for c in crews.there if c.setup.workers == n}
                median = seconds_of_a_step(there)
                for way, value in median.items():
                    one.setdefault(way, value) if n == 1 else None
                    text = f"{value * 1e3:.1f} ms a step"
                    if n > 1 and way in one:
                        text += f", {one[way] / value:.2f} times as fast as on 1"
                    if way in ours:
                        plain, ddp = (median[peer] / value for peer in peers)
                        text += f"; plain / ours {plain:.2f}, DDP / ours {ddp:.2f}"
                    if (n, way) == (SHARDS, REPRODUCIBLE) and name in WANTED:
                        text += " (8 times one worker and 1.5 times plain torch are wanted)"
                    yield f"{title}: {way}", text, None


def seconds_of_a_step(crews: dict[str, Any]) -> dict[str, float]:
    """By way: the median of a few rounds in which each runs a step, in rotating order."""
    for crew in crews.values():
        until = time.monotonic() + 4
        while not crew.ask("warm") and time.monotonic() < until:
            pass
    times: dict[str, list[float]] = {way: [] for way in crews}
    for turn in range(3):
        ways = [*crews]
        for way in (*ways[turn:], *ways[:turn]):
            times[way].append(crews[way].ask("run", 1))
    return {way: statistics.median(t) for way, t in times.items()}


SECTIONS: dict[str, tuple[Callable[[float], Result], float]] = {
    "bits": (check_bits, 90),
    "cuda-tests": (check_cuda_tests, 120),
    "processes": (check_processes, 60),
    "loader": (check_loader, 60),
    "runtime": (check_runtime, 60),
    "training": (check_training, 480),
}
"""What is checked, and the seconds that it may take at most."""
