"""Builds tbb_peer.cpp against oneTBB and talks to it."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common import CXX

SOURCE = Path(__file__).resolve().parent / "tbb_peer.cpp"


class NotInstalledError(Exception):
    """No compiler or no oneTBB here."""


class Peer:
    """The running program; one request at a time."""

    def __init__(self, process: subprocess.Popen[str], version: str) -> None:
        self._process = process
        self.version = version

    def time(self, variant: str, items: int) -> float:
        """Seconds of one run."""
        return self.times(variant, items, repeats=1, pause_us=0)[0]

    def times(self, variant: str, items: int, repeats: int, pause_us: int) -> list[float]:
        """Seconds of each repeat."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{variant} {items} {repeats} {pause_us}\n")
        self._process.stdin.flush()
        return [int(ns) / 1e9 for ns in self.answer().split()]

    def answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the oneTBB program ended with {self._process.wait()}")
        return line.strip()


@contextmanager
def peer(concurrency: int) -> Iterator[Peer]:
    """The oneTBB program on `concurrency` threads, its main thread among them.

    Raises:
        NotInstalledError: no compiler, or no oneTBB.
    """
    flags, version = locate()
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder) / "tbb_peer")
        build = [CXX, "-std=c++20", "-O3", str(SOURCE), "-o", program, *flags, "-pthread"]
        subprocess.run(build, check=True)
        process = subprocess.Popen(
            [program, str(concurrency)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        with process:
            running = Peer(process, version)
            running.answer()  # "ready"
            try:
                yield running
            finally:
                assert process.stdin is not None
                process.stdin.close()  # it ends when there are no more requests


def locate() -> tuple[list[str], str]:
    """Compiler flags and version: of the Python packages tbb and tbb-devel, or of the system."""
    if shutil.which(CXX) is None:
        raise NotInstalledError(f"no compiler: {CXX} is not installed")
    try:
        header = _installed("tbb-devel", "/oneapi/tbb/parallel_for.h")
        library = _installed("tbb", "/libtbb.so.12")
    except importlib.metadata.PackageNotFoundError:
        test = subprocess.run(
            [CXX, "-std=c++20", "-x", "c++", "-", "-o", "/dev/null", "-ltbb"],
            input="#include <oneapi/tbb/version.h>\nint main() { TBB_runtime_version(); }\n",
            text=True,
            capture_output=True,
            check=False,
        )
        if test.returncode != 0:
            raise NotInstalledError(
                "no oneTBB: `pip install tbb-devel`, or libtbb-dev of Debian"
            ) from None
        return ["-ltbb"], "the system's"
    include = header.parents[2]
    flags = [f"-isystem{include}", str(library), f"-Wl,-rpath,{library.parent}"]
    return flags, importlib.metadata.version("tbb")


def _installed(package: str, ending: str) -> Path:
    for file in importlib.metadata.files(package) or []:
        if f"/{file.as_posix()}".endswith(ending):
            return Path(str(file.locate())).resolve()
    raise NotInstalledError(f"the package {package} has no {ending}")
