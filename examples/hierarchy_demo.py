"""Runs a hierarchy of spheres on work in C and in Python, and shows what each sphere did.

    python examples/hierarchy_demo.py --levels 3 --items 2000 --work-us 300

Every seventh item takes four times as long, so that there is something to steal. Prints how much
ran at once and the statistics, and saves a picture, and a trace for https://ui.perfetto.dev.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch_spheres as ts

SOURCE = """
#include <stdint.h>
#include <time.h>

static int64_t now(void) {  // of this thread on a core, in nanoseconds
  struct timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return t.tv_sec * 1000000000LL + t.tv_nsec;
}

void work(void *nanoseconds, int64_t item) {
  int64_t end = now() + *(int64_t *)nanoseconds * (item % 7 == 0 ? 4 : 1);
  while (now() < end) {}
}
"""


def number(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 10_000_000:
        raise argparse.ArgumentTypeError(f"must be 1 to 10,000,000, got {text!r}")
    return int(text)


def file(text: str) -> Path:
    if not Path(text).absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"no such folder: {Path(text).parent}")
    return Path(text)


def picture(text: str) -> Path:
    if Path(text).suffix.lower() not in (".png", ".svg", ".pdf"):
        raise argparse.ArgumentTypeError(f"must end in .png, .svg or .pdf, got {text!r}")
    return file(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--levels", type=int, choices=(1, 2, 3, 4), default=2)
    parser.add_argument("--items", type=number, default=600, help="of each kind")
    parser.add_argument("--work-us", type=number, default=200, help="microseconds, of most items")
    parser.add_argument("--concurrency", type=number, help="leaves at once; default: the cores")
    parser.add_argument("--plot", type=picture, default="hierarchy_demo.png", metavar="FILE")
    parser.add_argument("--trace", type=file, default="hierarchy_demo.json", metavar="FILE")
    parser.add_argument("--theme", choices=("light", "dark"), default="light")
    return parser.parse_args()


def native_work(folder: str, microseconds: int) -> ts.NativeFunction:
    """The C function, compiled; items that run it do not need Python's lock."""
    source, library = Path(folder) / "work.c", Path(folder) / "work.so"
    source.write_text(SOURCE, encoding="ascii")
    try:
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", source, "-o", library], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"hierarchy_demo.py: the native work needs a C compiler: {error}")
    loaded, context = ctypes.CDLL(str(library)), ctypes.c_int64(1000 * microseconds)
    address = ctypes.cast(loaded.work, ctypes.c_void_p).value
    return ts.NativeFunction(address, ctypes.addressof(context), owner=(loaded, context))


def main(args: argparse.Namespace) -> None:
    def python_work(item: int) -> None:
        end = time.thread_time_ns() + 1000 * args.work_us * (4 if item % 7 == 0 else 1)
        while time.thread_time_ns() < end:
            pass

    worth = args.work_us * sum(4 if item % 7 == 0 else 1 for item in range(args.items)) / 1e6
    with (
        tempfile.TemporaryDirectory() as folder,
        ts.KissingSpheres(args.levels, concurrency=args.concurrency) as spheres,
    ):
        kinds = {"native": native_work(folder, args.work_us), "Python": python_work}
        with spheres.trace() as trace:
            for kind, work in kinds.items():
                begin = time.perf_counter()
                spheres.distribute_work(range(args.items), work)
                spheres.wait()
                seconds = time.perf_counter() - begin
                print(f"{kind} items: {worth:.3f} s of work in {seconds:.3f} s", end=", ")
                print(f"{worth / seconds:.2f} at once", flush=True)
        spheres.print_stats()
        trace.save(args.trace)
        spheres.plot(trace=trace, theme=args.theme).figure.savefig(args.plot, dpi=150)
        print(f"saved {args.trace} (for https://ui.perfetto.dev) and {args.plot}")


if __name__ == "__main__":
    try:
        main(parse())
    except ImportError as error:  # no matplotlib
        sys.exit(f"hierarchy_demo.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
