"""One way to load one workload, as a process of its own that does what it is told through a pipe.

`crews.py` starts it. torch_spheres is imported only if the way is ours, so that no peer is
measured, for better or worse, with the library loaded.
"""

from __future__ import annotations

import gc
import importlib
import statistics
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

import serving
import torch
from image_models import mnist_cnn
from loader_datasets import TENSORS_WHOLE, WORKLOADS, Samples, Workload
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, default_collate

DATALOADER, SPHERES, SPHERES_PROCESS = "DataLoader", "wrap", 'wrap(workers="process")'
SPDL, NODES = "SPDL", "torchdata.nodes"

PAUSE = 0.05  # seconds; what the last contestant has left behind ends meanwhile


@dataclass(frozen=True)
class Setup:
    way: str
    workload: str
    samples: int
    workers: int
    """Worker processes, logical workers or threads, as the way has it; 0: the loop's own thread."""
    concurrency: int
    """Spheres that run at once, and torch's threads."""
    persistent: bool = False
    prefetch: int | None = None
    start: str | None = None
    """How processes are started; None: as this version of Python and this system do."""

    @property
    def processes(self) -> int:
        """That the benchmark starts; workers are theirs."""
        return 1


# ---- names of the contestants, in tables, results and pictures ----

OURS = "wrap, with workers"
OURS_NO_WORKERS = "wrap, num_workers=0"
OURS_PROCESS = 'wrap, workers="process", persistent'
NO_WORKERS = "DataLoader, num_workers=0"
PROCESSES = "DataLoader, processes"
FORKSERVER = "DataLoader, processes, forkserver"
PERSISTENT = "DataLoader, persistent processes"
PREFETCH = "DataLoader, persistent processes, prefetch_factor=8"
WHOLE = "DataLoader, num_workers=0, dataset with __getitems__"

PLAIN = (NO_WORKERS, PROCESSES, PERSISTENT, PREFETCH)
"""Loaders that a user may set up without another dataset."""

_FIELDS: dict[str, dict[str, Any]] = {
    OURS: {"way": SPHERES},
    OURS_NO_WORKERS: {"way": SPHERES, "workers": 0},
    OURS_PROCESS: {"way": SPHERES_PROCESS, "persistent": True},
    NO_WORKERS: {"workers": 0},
    PROCESSES: {},
    FORKSERVER: {"start": "forkserver"},
    PERSISTENT: {"persistent": True},
    PREFETCH: {"persistent": True, "prefetch": 8},
    WHOLE: {"workers": 0},
    SPDL: {"way": SPDL},
    NODES: {"way": NODES},
}


def setup(name: str, workload: str, samples: int, workers: int, concurrency: int) -> Setup:
    """The contestant of that name."""
    usual = {"way": DATALOADER, "workers": workers}
    if name == WHOLE:
        workload = TENSORS_WHOLE
    return Setup(
        workload=workload, samples=samples, concurrency=concurrency, **(usual | _FIELDS[name])
    )


# ---- the ways ----


def data_loader(setup: Setup, dataset: Samples, workload: Workload) -> DataLoader[Any]:
    more: dict[str, Any] = {}
    if setup.workers > 0:
        more = {
            "persistent_workers": setup.persistent,
            "prefetch_factor": setup.prefetch,
            "multiprocessing_context": setup.start,
        }
    return DataLoader(
        dataset,
        workload.batch,
        shuffle=True,
        num_workers=setup.workers,
        collate_fn=workload.collate,
        **more,
    )


def on_spheres(setup: Setup, loader: DataLoader[Any]) -> DataLoader[Any]:
    import torch_spheres as ts

    # What the advice says is in the table.
    warnings.filterwarnings("ignore", message="the loop waited for data")
    spheres = ts.KissingSpheres(2, concurrency=setup.concurrency)
    workers = "process" if setup.way == SPHERES_PROCESS else "sphere"
    return ts.wrap(loader, spheres, workers=workers)


def installed(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise NotImplementedError(
            f"not installed: pip install --no-deps {package}, which leaves torch alone"
        ) from None


class Threads:
    """A batch for each task of a pool of threads, in order, and two batches ahead of the loop."""

    def __init__(self, setup: Setup, dataset: Samples, workload: Workload) -> None:
        self._dataset, self._workers = dataset, setup.workers
        self._sampler = BatchSampler(RandomSampler(dataset), workload.batch, drop_last=False)

    def _load(self, indices: list[int]) -> Any:
        return default_collate([self._dataset[i] for i in indices])


class Spdl(Threads):
    """A pipeline for each epoch. Tasks of one sample took longer for all workloads."""

    def __init__(self, setup: Setup, dataset: Samples, workload: Workload) -> None:
        super().__init__(setup, dataset, workload)
        self._pipelines = installed("spdl.pipeline", "spdl-core")

    def __iter__(self) -> Iterator[Any]:
        builder = self._pipelines.PipelineBuilder().add_source(self._sampler)
        builder = builder.pipe(self._load, concurrency=self._workers, output_order="input")
        pipeline = builder.add_sink(2).build(num_threads=self._workers, max_failures=0)
        with pipeline.auto_stop():
            yield from pipeline.get_iterator()


class Nodes(Threads):
    def __init__(self, setup: Setup, dataset: Samples, workload: Workload) -> None:
        super().__init__(setup, dataset, workload)
        nodes = installed("torchdata.nodes", "torchdata")
        node = nodes.SamplerWrapper(self._sampler)
        node = nodes.ParallelMapper(node, self._load, num_workers=setup.workers, method="thread")
        self._loader = nodes.Loader(nodes.Prefetcher(node, prefetch_factor=2))

    def __iter__(self) -> Iterator[Any]:
        return iter(self._loader)


def build(setup: Setup) -> Iterable[Any]:
    workload = WORKLOADS[setup.workload]
    dataset = workload.make(setup.samples)
    if setup.way == SPDL:
        return Spdl(setup, dataset, workload)
    if setup.way == NODES:
        return Nodes(setup, dataset, workload)
    loader = data_loader(setup, dataset, workload)
    return loader if setup.way == DATALOADER else on_spheres(setup, loader)


# ---- what a contestant can be told to do ----


@dataclass(frozen=True)
class Epoch:
    """`work` has to be the same for all contestants."""

    seconds: float
    work: tuple[int, int, int]
    """Batches, rows, and the sum of all labels."""
    loss: float = 0.0
    """Of the last batch, if something is trained."""


class Contestant:
    """The public methods are the commands that come through the pipe."""

    def __init__(self, setup: Setup) -> None:
        self._concurrency = setup.concurrency
        torch.set_num_threads(setup.concurrency)
        self._loader = build(setup)
        torch.manual_seed(1)  # the same weights and shuffles for all

    def epoch(self) -> dict[str, Any]:
        """The loop that does nothing else; an `Epoch`."""
        return asdict(self._timed(train=False))

    def train(self) -> dict[str, Any]:
        """The loop of examples/mnist.py, without spheres; an `Epoch`."""
        if not hasattr(self, "_model"):  # made here, because it takes a hundred MiB of torch
            self._model = mnist_cnn()
            self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-3)
        return asdict(self._timed(train=True))

    def train_on_spheres(self) -> dict[str, Any]:
        """The same, with the model on the loader's spheres, or on some of its own."""
        if not hasattr(self, "_model"):
            import torch_spheres as ts

            model = mnist_cnn()
            self._optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
            of_loader = getattr(self._loader, "spheres", None)
            spheres = of_loader or ts.KissingSpheres(2, concurrency=self._concurrency)
            self._model = ts.SphereParallel(model, spheres)
        return self.train()

    def first(self, times: int) -> float:
        """Seconds from ``iter()`` until the first batch is there; the median of some.

        Whoever needs seconds does it once.
        """
        seconds: list[float] = []
        while len(seconds) < times and sum(seconds) < 1:
            gc.collect()
            time.sleep(PAUSE)
            begin = time.perf_counter()
            iterator = iter(self._loader)
            batch = next(iterator)
            seconds.append(time.perf_counter() - begin)
            del iterator, batch
        return statistics.median(seconds)

    def how(self) -> str:
        """How a wrapped loader has loaded."""
        if not hasattr(self._loader, "stats"):
            return ""
        return f"way: {self._loader.stats().way}"

    def _timed(self, *, train: bool) -> Epoch:
        gc.collect()
        gc.disable()
        try:
            time.sleep(PAUSE)
            begin = time.perf_counter()
            batches = rows = labels = 0
            loss = torch.zeros(())
            for x, y in self._loader:
                if train:
                    loss = self._step(x, y)
                batches, rows, labels = batches + 1, rows + len(x), labels + int(y.sum())
            return Epoch(time.perf_counter() - begin, (batches, rows, labels), loss.item())
        finally:
            gc.enable()

    def _step(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self._optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self._model(x), y)
        loss.backward()
        self._optimizer.step()
        return loss.detach()


# ---- the process ----


def make(order: dict[str, Any]) -> Contestant:
    return Contestant(Setup(**{field.name: order[field.name] for field in fields(Setup)}))


def prepare() -> None:
    import torch._dynamo  # noqa: F401 - the optimizers do it later


if __name__ == "__main__":
    serving.main(make, prepare)
