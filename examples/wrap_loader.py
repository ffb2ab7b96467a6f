"""The loader you have, on threads of this process: before and after, batch for batch."""

from __future__ import annotations

import argparse
import time
import zlib

import torch
from torch.utils.data import DataLoader, Dataset

import torch_spheres as ts


class Drawings(Dataset):
    """Compressed tensors to be unpacked and augmented: as images would be, without a library."""

    shape = (3, 128, 128)

    def __init__(self, rows: int) -> None:
        self.files = [
            zlib.compress(torch.rand(self.shape).mul(row % 7).round().numpy().tobytes())
            for row in range(rows)
        ]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        pixels = bytearray(zlib.decompress(self.files[index]))  # without the GIL
        image = torch.frombuffer(pixels, dtype=torch.float32).view(self.shape)
        return image + 0.1 * torch.randn_like(image), index


def main() -> None:
    loader = DataLoader(Drawings(256), batch_size=32, shuffle=True, num_workers=2)
    with ts.KissingSpheres(levels=2) as spheres:
        wrapped = ts.wrap(loader, spheres)  # the one line

        torch.manual_seed(0)
        begin = time.perf_counter()
        before = [batch for epoch in range(2) for batch in loader]
        middle = time.perf_counter()
        torch.manual_seed(0)
        after = [batch for epoch in range(2) for batch in wrapped]
        end = time.perf_counter()

        same = all(
            torch.equal(x, other_x) and torch.equal(y, other_y)
            for (x, y), (other_x, other_y) in zip(before, after, strict=True)
        )
        print(f"worker processes {middle - begin:.2f} s, sphere threads {end - middle:.2f} s")
        print(f"{len(after)} batches, with the same noise: {'bit for bit' if same else 'NO'}")

        # In the middle of an epoch: what was loaded ahead is not lost.
        iterator = iter(wrapped)
        next(iterator)
        state = wrapped.state_dict()
        rest = [y.tolist() for _, y in iterator]
        wrapped.load_state_dict(state)
        print("resumed:", "the same batches" if rest == [y.tolist() for _, y in wrapped] else "NO")
        print(wrapped.stats())


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()  # --help
    main()
