"""Builds and runs the C++ core's own tests: with ThreadSanitizer, with AddressSanitizer, plain.

All that were selected are built at once, by as many compilers as there are cores, before the first
of them runs, and files of tests in one program where that is possible: what each of them includes
takes most of the time. `pytest --long` has each repeat what it repeats many times more.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections import deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import effort
import pytest

ROOT = Path(__file__).parents[2]
CORE = sorted((ROOT / "cpp").glob("*.cpp"))
SUMS = ROOT / "cpp" / "gradient_sum.cpp"
"""Compiles for long; needs nothing else of the core, and nothing else there needs it."""
TESTS = sorted((ROOT / "tests" / "cpp").glob("*_test.cpp"))
COMPILER = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++20", "-ffp-contract=off", "-pthread", "-Wall", "-Wextra", "-Werror", "-I", "cpp"]
VARIANTS = {
    "thread": ["-Og", "-g1", "-fsanitize=thread"],
    "address": [
        "-Og",
        "-g1",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=undefined",
    ],
    "plain": ["-O3"],  # as in setup.py
}
# ThreadSanitizer has nothing to say of what no two threads share. Bits depend on how the compiler
# optimises, and the order of events on how fast the code is: two files run as users have them.
NOT_SHARED = {"gradient_sum_test", "topology_test"}
AS_SHIPPED = {"gradient_sum_test", "stress_test"}
RUNS = [
    pytest.param(source, variant, id=f"{source.stem}-{variant}")
    for variant in VARIANTS
    for source in TESTS
    if source.stem not in (NOT_SHARED if variant == "thread" else set())
    if source.stem in AS_SHIPPED or variant != "plain"
]
ENVIRONMENT = {
    **os.environ,
    "TSAN_OPTIONS": "halt_on_error=1:second_deadlock_stack=1",
    "ASAN_OPTIONS": "detect_leaks=1",
    "TORCH_SPHERES_TEST_EFFORT": str(effort.rounds(1)),
}
LIMIT = effort.rounds(400)
"""Seconds that a file's tests may take: they hang."""
MAIN = f"""#include "{ROOT}/tests/cpp/check.h"
int main(int argc, char** argv) {{ return torch_spheres::testing::run_all_tests(argc, argv); }}
"""
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


def run(command: list[str], timeout: float = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, env=ENVIRONMENT
    )


def include(files: Iterable[Path]) -> str:
    return "".join(f'#include "{file}"\n' for file in files)


def needs_only_sums(source: Path) -> bool:
    return source.stem == f"{SUMS.stem}_test"


def program_of(source: Path) -> str:
    """The one that has the tests of a file."""
    if needs_only_sums(source):
        return source.stem
    # That header replaces `operator new`, for the whole program.
    return "no_memory_tests" if "no_memory.h" in source.read_text() else "core_tests"


def compile_to(target: Path, variant: str, *arguments: str) -> None:
    cached = ["ccache"] if shutil.which("ccache") else []
    command = [*cached, COMPILER, *FLAGS, *VARIANTS[variant], *arguments, "-o", str(target)]
    done = run(command)
    if done.returncode:
        pytest.fail(f"{' '.join(done.args)}\n{done.stderr}", pytrace=False)


class Toolchain:
    """Compiles programs, the core once per variant, and knows how they have to be started.

    Where tests run in several processes they share `folder`, and what is compiled in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ready: dict[str, list[str]] = {}
        self.skip: dict[str, str] = {}

    def prefix(self, variant: str) -> list[str]:
        """What to put before a program's name; skips the test if the variant cannot run here."""
        self.probe(variant)
        if variant in self.skip:
            pytest.skip(self.skip[variant])
        return self.ready[variant]

    def probe(self, variant: str) -> bool:
        """Whether programs of the variant can be built and run here."""
        if variant not in self.ready and variant not in self.skip:
            self.skip.update(self._probe(variant))
        return variant in self.ready

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

    def program(self, source: Path, variant: str) -> Path:
        return self.folder / f"{program_of(source)}.{variant}"

    def build(self, wanted: Iterable[tuple[Path, str]]) -> None:
        """Builds the programs with these files, unless another process has; waits where it does."""
        with (self.folder / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            texts: dict[tuple[str, str], str] = {}  # of what is compiled as one: name, variant
            rests: dict[tuple[str, str], str] = {}  # what the programs among them are linked with
            for source, variant in wanted:
                if not self.probe(variant) or self.program(source, variant).exists():
                    continue
                name, rest = program_of(source), "sums" if needs_only_sums(source) else "core"
                texts[name, variant] = texts.get((name, variant), MAIN) + include([source])
                texts[rest, variant] = include(f for f in CORE if (f == SUMS) == (rest == "sums"))
                rests[name, variant] = rest

            def compile_text(which: tuple[str, str]) -> None:
                source = self.folder / "{}.{}.cpp".format(*which)
                source.write_text(texts[which])
                compile_to(source.with_suffix(".o"), which[1], "-c", str(source))

            def link(which: tuple[str, str]) -> None:
                name, variant = which
                objects = [f"{self.folder}/{part}.{variant}.o" for part in (name, rests[which])]
                compile_to(self.folder / f"{name}.{variant}", variant, *objects)

            with ThreadPoolExecutor(os.cpu_count()) as pool:
                deque(pool.map(compile_text, texts), maxlen=0)
                deque(pool.map(link, rests), maxlen=0)


@pytest.fixture(scope="module")
def toolchain(request, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # each process has its own below it
    (folder / "core").mkdir(exist_ok=True)
    found = Toolchain(folder / "core")
    selected = [item for item in request.session.items if item.parent is request.node]
    calls = [item.callspec.params for item in selected if item.originalname == test_core.__name__]
    found.build((call["source"], call["variant"]) for call in calls)
    return found


def test_there_are_files():
    assert len(TESTS) >= 2
    assert {source.stem for source in TESTS} > NOT_SHARED | AS_SHIPPED


@pytest.mark.timeout(3 * LIMIT)
@pytest.mark.parametrize(("source", "variant"), RUNS)
def test_core(toolchain, source, variant):
    prefix = toolchain.prefix(variant)
    done = run([*prefix, str(toolchain.program(source, variant)), source.name], LIMIT)
    output = done.stdout + done.stderr
    print(output)
    assert done.returncode == 0, output
    assert "Sanitizer" not in output


@pytest.mark.parametrize("source", [*CORE, *TESTS], ids=lambda source: source.stem)
def test_clang_with_its_own_library_takes_it(source, tmp_path):
    clang = [shutil.which("clang++") or "clang++", "-stdlib=libc++"]
    probe = tmp_path / "nothing.cpp"
    probe.write_text(NOTHING)
    if shutil.which("clang++") is None or run([*clang, str(probe), "-o", os.devnull]).returncode:
        pytest.skip("clang or its libc++ is not here")
    done = run([*clang, *FLAGS, "-fsyntax-only", str(source)])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("variant", "source"), [("thread", RACE), ("address", OVERFLOW)])
def test_the_sanitizers_really_find_things(toolchain, variant, source):
    prefix = toolchain.prefix(variant)
    code, program = toolchain.folder / f"bad.{variant}.cpp", toolchain.folder / f"bad.{variant}"
    code.write_text(source)
    compile_to(program, variant, str(code))
    done = run([*prefix, str(program)])
    assert done.returncode != 0
    assert "Sanitizer" in done.stderr
