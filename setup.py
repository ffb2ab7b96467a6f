"""Builds the C++ core; everything else about the package stands in pyproject.toml."""

from glob import glob
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, naive_recompile
from setuptools import setup

# Same bits everywhere: no contraction of a*b+c into one rounding, and never -ffast-math.
FLAGS = ["-O3", "-ffp-contract=off", "-pthread", "-Wall", "-Wextra"]

CORE, BINDINGS = sorted(glob("cpp/*.cpp")), sorted(glob("cpp/bindings/*.cpp"))
HEADERS = sorted(glob("cpp/*.h") + glob("cpp/bindings/*.h"))


def as_one(name: str, sources: list[str]) -> str:
    """A file that includes them all: what each of them includes takes most of the time."""
    file = Path("build", f"{name}.cpp")
    file.parent.mkdir(exist_ok=True)
    text = "".join(f'#include "{source}"\n' for source in sources)
    if not file.exists() or file.read_text() != text:
        file.write_text(text)
    return str(file)


def is_outdated(object_file: str, source: str) -> bool:
    """Also after a change of what the file includes, which may be any of ours."""
    return any(naive_recompile(object_file, file) for file in (source, *BINDINGS, *HEADERS))


ParallelCompile("NPY_NUM_BUILD_JOBS", needs_recompile=is_outdated, default=0).install()
setup(
    ext_modules=[
        Pybind11Extension(
            "torch_spheres._core",
            [as_one("bindings", BINDINGS), *CORE],
            include_dirs=[".", "cpp"],
            depends=[*BINDINGS, *HEADERS],
            cxx_std=20,
            extra_compile_args=FLAGS,
            extra_link_args=["-pthread"],
        )
    ]
)
