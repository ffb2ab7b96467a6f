"""What tests of outputs share: rows for uneven and even shards, and a value that is no tensor."""

from __future__ import annotations

import enum

import torch

ROWS = 26  # uneven: two shards of three rows
X = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(0))
EVEN = X[:24]  # two rows each: sizes say nothing


class Side(enum.Enum):
    LEFT, RIGHT = 0, 1
