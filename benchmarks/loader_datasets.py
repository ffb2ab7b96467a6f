"""What bench_loader.py loads: tensors, JPEGs in memory, a transform in Python, and MNIST as tensors
or as images that are turned."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

SIDE, CROP = 256, 224  # pixels: as they are stored, and as they are loaded
CLASSES = 10
MODULUS = 65521
LOOP = 2300  # rounds of Python's loop, some 200 microseconds
WAIT = 0.02  # seconds that a sample takes to come

Samples = Dataset[Any]


class Whole(TensorDataset):
    """Fetches a batch with one index: what one writes by hand to make a plain loader fast."""

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        return tuple(tensor[indices] for tensor in self.tensors)


class Jpegs(Dataset[tuple[Tensor, int]]):
    """Decodes and resizes; Pillow does both without the GIL.

    The files are one block of memory, and not an object each whose count of references every access
    would write to: forked workers share its pages as long as nobody does.
    """

    def __init__(self, files: list[bytes]) -> None:
        self._ends = np.cumsum([0, *map(len, files)])
        self._block = b"".join(files)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        begin, end = self._ends[index], self._ends[index + 1]
        with Image.open(io.BytesIO(self._block[begin:end])) as image:
            small = image.resize((CROP, CROP), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(small)).permute(2, 0, 1), index % CLASSES


class PurePython(Dataset[tuple[Tensor, int]]):
    """A loop of arithmetic in Python, which has the GIL all the time."""

    def __init__(self, samples: int) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        # (Read once: without a GIL, Python 3.14's threads wait for each other where they count the
        # references to a large number that stands in the code.)
        total, modulus = index, MODULUS
        for k in range(LOOP):
            total = (31 * total + k) % modulus
        return torch.tensor([total / modulus]), index % CLASSES


class Waiting(Dataset[tuple[Tensor, int]]):
    """As from a slow disk or another machine; nobody computes meanwhile."""

    def __init__(self, samples: int) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        time.sleep(WAIT)
        return torch.tensor([index / self._samples]), index % CLASSES


def tensors(samples: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(samples, 784, generator=generator)
    return rows, torch.randint(CLASSES, (samples,), generator=generator)


def jpegs(samples: int) -> Samples:
    """Smooth ones: coarse noise, enlarged; 14 KB each."""
    from PIL import Image

    random = np.random.default_rng(1)
    files = []
    for _ in range(samples):
        noise = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        file = io.BytesIO()
        image.save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return Jpegs(files)


def digits(samples: int) -> tuple[Tensor, Tensor]:
    """The first of examples/mnist.py's training set, in a fixed random order."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
    from mnist_data import load_mnist

    data = load_mnist(None)
    chosen = torch.randperm(len(data.train_y), generator=torch.Generator().manual_seed(1))[:samples]
    return data.train_x[chosen], data.train_y[chosen]


class Turned(Dataset[tuple[Tensor, int]]):
    """Digits as images, each turned by some degrees: an augmentation as torchvision's are."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self._images = (images * 255).clamp(0, 255).to(torch.uint8).squeeze(1).numpy()
        self._labels = labels.tolist()

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        image = Image.fromarray(self._images[index])
        turned = image.rotate(index % 31 - 15, Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(turned, dtype=np.float32))
        return pixels.unsqueeze(0).div_(255), self._labels[index]


def as_it_is(batch: Any) -> Any:
    """A `collate_fn` for batches that are whole already."""
    return batch


@dataclass(frozen=True)
class Workload:
    make: Callable[[int], Samples]
    """Of so many samples."""
    batch: int
    collate: Callable[[Any], Any] | None = None
    """None: torch's own."""


TENSORS, TENSORS_WHOLE = "Tensors", "Tensors, a batch at once"
SMALL_TENSORS, WAITING = "Tensors, small batches", "waiting"
JPEGS, PYTHON = "JPEGs", "pure Python"
MNIST, MNIST_WHOLE, TURNED = "MNIST", "MNIST, a batch at once", "MNIST, turned images"

WORKLOADS = {
    TENSORS: Workload(lambda n: TensorDataset(*tensors(n)), 768),
    TENSORS_WHOLE: Workload(lambda n: Whole(*tensors(n)), 768, as_it_is),
    SMALL_TENSORS: Workload(lambda n: TensorDataset(*tensors(n)), 32),
    WAITING: Workload(Waiting, 4),
    JPEGS: Workload(jpegs, 32),
    PYTHON: Workload(PurePython, 64),
    MNIST: Workload(lambda n: TensorDataset(*digits(n)), 96),
    MNIST_WHOLE: Workload(lambda n: Whole(*digits(n)), 96, as_it_is),
    TURNED: Workload(lambda n: Turned(*digits(n)), 384),
}
