"""The models that the training benchmarks train: how to make one, its batches and its loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import image_models as images
import sequence_models as sequences
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

Batch = tuple[tuple[Tensor, ...], Tensor]
"""The model's positional arguments, and the targets; all have rows."""

GPT_WORDS, GPT_LENGTH = 1024, 64
TABLES, ENTRIES, BAG, DENSE = 8, 10_000, 4, 13


@dataclass(frozen=True)
class Task:
    """A model and what it is trained on. The loss is a mean over the batch's rows."""

    name: str
    make: Callable[[], nn.Module]
    batch: Callable[[int, Generator], Batch]
    loss: Callable[[Tensor, Tensor], Tensor]
    small: int
    """Rows of a small batch; a multiple of 48, so that 1, 2, 4, 8, 12 or 16 can share it."""

    @property
    def large(self) -> int:
        return 4 * self.small

    def seeded(self) -> nn.Module:
        """The same weights each time."""
        torch.manual_seed(0)
        return self.make()


# ---- batches: random numbers of the right shapes, since only the time matters ----


def digits(rows: int, generator: Generator) -> Batch:
    x = torch.randn(rows, 1, 28, 28, generator=generator)
    return (x,), torch.randint(10, (rows,), generator=generator)


def photos(rows: int, generator: Generator) -> Batch:
    x = torch.randn(rows, 3, 64, 64, generator=generator)
    return (x,), torch.randint(images.CLASSES, (rows,), generator=generator)


def text(vocabulary: int, length: int) -> Callable[[int, Generator], Batch]:
    def batch(rows: int, generator: Generator) -> Batch:
        words = torch.randint(vocabulary, (rows, length + 1), generator=generator)
        return (words[:, :-1].contiguous(),), words[:, 1:].contiguous()

    return batch


def clicks(rows: int, generator: Generator) -> Batch:
    dense = torch.randn(rows, DENSE, generator=generator)
    indices = torch.randint(ENTRIES, (rows, TABLES, BAG), generator=generator)
    return (dense, indices), torch.randint(2, (rows,), generator=generator).float()


def next_word(output: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), targets.flatten())


# ---- the ten ----

ZOO = (
    Task("MNIST MLP", images.mnist_mlp, digits, F.cross_entropy, 768),
    Task("MNIST CNN", images.mnist_cnn, digits, F.cross_entropy, 768),
    Task("Transformer", sequences.RowTransformer, digits, F.cross_entropy, 768),
    Task("LSTM", sequences.RowLstm, digits, F.cross_entropy, 768),
    Task("ResNet-18", images.resnet18, photos, F.cross_entropy, 96),
    Task("ViT-tiny", images.VisionTransformer, photos, F.cross_entropy, 192),
    Task("MobileNetV3-small", images.mobilenet_v3_small, photos, F.cross_entropy, 192),
    Task("ConvNeXt", images.convnext, photos, F.cross_entropy, 96),
    Task(
        "GPT-2, 4 layers",
        lambda: sequences.Gpt(GPT_WORDS, GPT_LENGTH, width=192, depth=4, heads=6),
        text(GPT_WORDS, GPT_LENGTH),
        next_word,
        96,
    ),
    Task(
        "Recommender",
        lambda: sequences.Recommender(TABLES, ENTRIES, width=32, dense=DENSE),
        clicks,
        F.binary_cross_entropy_with_logits,
        768,
    ),
)

# ---- for bench_memory.py: 50 million parameters ----

LARGE = Task(
    "GPT-2, 50 M parameters",
    lambda: sequences.Gpt(8192, 32, width=640, depth=9, heads=10),
    text(8192, 32),
    next_word,
    144,
)

TASKS = {task.name: task for task in (*ZOO, LARGE)}
