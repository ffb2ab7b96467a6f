"""C functions as work items, for tests and benchmarks; compiled when first asked for."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from torch_spheres import NativeFunction

SOURCE = Path(__file__).with_suffix(".c")


@functools.cache
def _library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "native_items.so"
        compiler = os.environ.get("CC", "cc")
        subprocess.run(
            [compiler, "-std=c11", "-O2", "-shared", "-fPIC", SOURCE, "-o", built], check=True
        )
        return ctypes.CDLL(str(built))


def _function(name: str, context: int = 0, owner: Any = None) -> NativeFunction:
    address = ctypes.cast(_library()[name], ctypes.c_void_p).value
    assert address is not None
    return NativeFunction(address, context, owner)


def nothing() -> NativeFunction:
    """Does nothing with its item."""
    return _function("nothing")


class Tally(ctypes.Structure):
    """Counts and sums the items that its function is called with."""

    _fields_ = (("count", ctypes.c_int64), ("sum", ctypes.c_int64))

    def function(self) -> NativeFunction:
        """Counts for this tally, and keeps it alive."""
        return _function("tally", ctypes.addressof(self), owner=self)
