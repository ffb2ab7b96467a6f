"""How often the first square root in a new process is wrong, with and without torch_spheres.

Many processes at once each make a tensor and take its root, on two threads, twice. That the two
differ is a bug of MKL in torch (https://github.com/pytorch/pytorch/issues/188792), and what
torch_spheres/runtime/mkl_warmup.py is for. It takes minutes: most of it is to import torch.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

SCRIPT = """
import torch
{imports}
torch.set_num_threads(2)
x = torch.linspace(1e-9, 1e-6, 4608)
print(int((x.sqrt() != x.sqrt()).any()))
"""


def differing(imports: str, runs: int, at_once: int) -> int:
    """How many of so many processes had two results."""
    command = [sys.executable, "-P", "-c", SCRIPT.format(imports=imports)]
    wrong = done = 0
    while done < runs:
        wave = [
            subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            for _ in range(min(at_once, runs - done))
        ]
        for process in wave:
            out, _ = process.communicate()
            if process.returncode != 0:
                raise RuntimeError(f"a process ended with {process.returncode}")
            wrong += int(out)
        done += len(wave)
    return wrong


def main() -> None:
    """Prints both counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=300, help="processes of each kind")
    parser.add_argument("--at-once", type=int, default=3)
    options = parser.parse_args()
    for name, imports in (("torch alone", ""), ("with torch_spheres", "import torch_spheres")):
        wrong = differing(imports, options.runs, options.at_once)
        print(f"{name}: {wrong} of {options.runs} processes differ", flush=True)


if __name__ == "__main__":
    main()
