"""`Paid`: a layer whose time is sure, for tests of what is measured; `heard`: what comes of it."""

from __future__ import annotations

import contextlib
import time
import warnings

import pytest
import torch
from torch import nn


class Paid(nn.Module):
    """Sleeps for each call, and for each row: what is faster, shards or the whole, is sure."""

    def __init__(self, call: float, row: float) -> None:
        super().__init__()
        self.call, self.row = call, row
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):
        time.sleep(self.call + self.row * len(x))
        return self.norm(x) + torch.rand(len(x), 1)


@contextlib.contextmanager
def heard():
    """The texts of the warnings that plain torch would be faster; full when the block ends."""
    messages = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    texts = (str(warning.message) for warning in caught)
    messages += [text for text in texts if "plain PyTorch would be faster" in text]


@pytest.fixture(autouse=True)
def one_intra_op_thread():
    """Two that meet, where other programs have the cores, take longer than what is paid here."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
