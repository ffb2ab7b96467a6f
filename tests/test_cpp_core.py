"""Builds and runs the C++ core's own tests: plain, with ThreadSanitizer, with AddressSanitizer."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROGRAMS = sorted((ROOT / "tests" / "cpp").glob("*_test.cpp"))
COMPILER = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++20", "-ffp-contract=off", "-pthread", "-Wall", "-Wextra", "-Werror", "-I", "cpp"]
VARIANTS = {
    "plain": ["-O2"],
    "thread": ["-O1", "-g1", "-fsanitize=thread"],
    "address": [
        "-O1",
        "-g1",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=undefined",
    ],
}
ENVIRONMENT = {
    **os.environ,
    "TSAN_OPTIONS": "halt_on_error=1:second_deadlock_stack=1",
    "ASAN_OPTIONS": "detect_leaks=1",
}
# In one place, so that a race or overflow that goes unnoticed fails the tests of the harness.
RACE = """
#include <thread>
int shared = 0;
int main() {
  std::thread other([] { for (int i = 0; i < 100000; ++i) ++shared; });
  for (int i = 0; i < 100000; ++i) ++shared;
  other.join();
  return shared == 0;
}
"""
OVERFLOW = """
#include <vector>
int main(int argc, char**) {
  std::vector<int> four(4);
  return four.data()[3 + argc] == 12345;
}
"""
NOTHING = """
#include <thread>
int main() { std::thread([] {}).join(); return 0; }
"""


def run(command: list[str], timeout: float = 110) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, env=ENVIRONMENT
    )


def compile_to(target: Path, variant: str, *arguments: str) -> None:
    done = run([COMPILER, *FLAGS, *VARIANTS[variant], *arguments, "-o", str(target)], 300)
    if done.returncode:
        pytest.fail(f"{' '.join(done.args)}\n{done.stderr}", pytrace=False)


@contextlib.contextmanager
def one_process_at_a_time(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Toolchain:
    """Compiles the core once per variant, and knows how its programs have to be started.

    Where tests run in several processes they share `folder`, and what is compiled in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ready: dict[str, list[str]] = {}
        self.skip: dict[str, str] = {}

    def prefix(self, variant: str) -> list[str]:
        """What to put before a program's name; skips the test if the variant cannot run here."""
        if variant not in self.ready and variant not in self.skip:
            self.skip.update(self._probe(variant))
        if variant in self.skip:
            pytest.skip(self.skip[variant])
        return self.ready[variant]

    def _probe(self, variant: str) -> dict[str, str]:
        if shutil.which(COMPILER) is None:
            return {variant: f"no C++ compiler: {COMPILER} was not found"}
        stem = f"nothing.{variant}.{os.getpid()}"  # each process finds out for itself
        source, program = self.folder / f"{stem}.cpp", self.folder / stem
        source.write_text(NOTHING)
        built = run([COMPILER, *FLAGS, *VARIANTS[variant], str(source), "-o", str(program)])
        if built.returncode:
            return {variant: f"{COMPILER} cannot build for '{variant}': {built.stderr.strip()}"}
        # ThreadSanitizer needs its shadow addresses free, which randomisation may have taken.
        said = ""
        for prefix in ([], ["setarch", "-R"]):
            if prefix and shutil.which(prefix[0]) is None:
                continue
            tried = run([*prefix, str(program)])
            if tried.returncode == 0:
                self.ready[variant] = prefix
                return {}
            said = (tried.stdout + tried.stderr).strip()
        return {variant: f"a program built for '{variant}' does not run here: {said}"}

    def core(self, variant: str) -> list[str]:
        """Object files of cpp/*.cpp."""
        sources = sorted((ROOT / "cpp").glob("*.cpp"))
        targets = [self.folder / f"{source.stem}.{variant}.o" for source in sources]
        ready = self.folder / f"core.{variant}.ready"
        with one_process_at_a_time(self.folder / f"core.{variant}.lock"):
            if not ready.exists():
                with ThreadPoolExecutor(2) as pool:
                    for done in [
                        pool.submit(compile_to, target, variant, "-c", str(source))
                        for source, target in zip(sources, targets, strict=True)
                    ]:
                        done.result()
                ready.touch()
        return [str(target) for target in targets]


@pytest.fixture(scope="module")
def toolchain(tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # each process has its own below it
    (folder / "core").mkdir(exist_ok=True)
    return Toolchain(folder / "core")


def test_there_are_programs():
    assert len(PROGRAMS) >= 2


@pytest.mark.timeout(600)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("source", PROGRAMS, ids=lambda path: path.stem)
def test_core(toolchain, source, variant):
    prefix = toolchain.prefix(variant)
    program = toolchain.folder / f"{source.stem}.{variant}"
    compile_to(program, variant, str(source), *toolchain.core(variant))
    done = run([*prefix, str(program)], 400)
    output = done.stdout + done.stderr
    print(output)
    assert done.returncode == 0, output
    assert "Sanitizer" not in output


@pytest.mark.parametrize(("variant", "source"), [("thread", RACE), ("address", OVERFLOW)])
def test_the_sanitizers_really_find_things(toolchain, variant, source):
    prefix = toolchain.prefix(variant)
    code, program = toolchain.folder / f"bad.{variant}.cpp", toolchain.folder / f"bad.{variant}"
    code.write_text(source)
    compile_to(program, variant, str(code))
    done = run([*prefix, str(program)])
    assert done.returncode != 0
    assert "Sanitizer" in done.stderr
