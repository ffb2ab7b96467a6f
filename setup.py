"""Builds the C++ core; everything else about the package stands in pyproject.toml."""

from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, naive_recompile
from setuptools import setup

# Same bits everywhere: no contraction of a*b+c into one rounding, and never -ffast-math.
FLAGS = ["-O3", "-ffp-contract=off", "-pthread", "-Wall", "-Wextra"]

HEADERS = sorted(glob("cpp/*.h") + glob("cpp/bindings/*.h"))


def is_outdated(object_file: str, source: str) -> bool:
    """Also after a change of a header only, which may be any of ours."""
    return any(naive_recompile(object_file, file) for file in (source, *HEADERS))


ParallelCompile("NPY_NUM_BUILD_JOBS", needs_recompile=is_outdated, default=0).install()
setup(
    ext_modules=[
        Pybind11Extension(
            "torch_spheres._core",
            sorted(glob("cpp/*.cpp") + glob("cpp/bindings/*.cpp")),
            include_dirs=["cpp"],
            depends=HEADERS,
            cxx_std=20,
            extra_compile_args=FLAGS,
            extra_link_args=["-pthread"],
        )
    ]
)
