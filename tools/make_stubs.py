"""Writes torch_spheres/_core.pyi from the built extension; --check compares instead."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

# What the generator says less precisely than type checkers want it.
CORRECTIONS = [
    (r"^    (\w+): typing\.ClassVar\[\w+\]$", r"    \1 = ..."),  # members of an enum
    (r"^    @classmethod\n    def __new__\(cls, value\):\s*\.\.\.\n", ""),
    (r"(\w+): (\w+) = None", r"\1: \2 | None = None"),
    (r"\btuple\b(?!\[)", "tuple[typing.Any, ...]"),
    (r"\bSequence\b(?!\[)", "Sequence[typing.Any]"),
    (r"\bCallable\b(?!\[)", "Callable[..., typing.Any]"),
]
TARGET = Path(__file__).parent.parent / "torch_spheres" / "_core.pyi"


def generate() -> str:
    """Runs the stub generator on the installed extension and formats what it made."""
    with tempfile.TemporaryDirectory() as folder:
        # From another folder, so that the installed package is imported and not the source.
        command = [sys.executable, "-m", "pybind11_stubgen", "torch_spheres._core"]
        command += ["--exit-code", "--output-dir", folder]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
        made = Path(folder) / "torch_spheres" / "_core.pyi"
        text = made.read_text()
        for pattern, better in CORRECTIONS:
            text = re.sub(pattern, better, text, flags=re.MULTILINE)
        made.write_text(text)
        config = TARGET.parent.parent / "pyproject.toml"
        ruff = [sys.executable, "-m", "ruff", "format", "--quiet", "--config", str(config)]
        subprocess.run([*ruff, str(made)], check=True)
        return made.read_text()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if the file is not up to date")
    args = parser.parse_args()
    stubs = generate()
    if not args.check:
        TARGET.write_text(stubs)
    elif not TARGET.exists() or TARGET.read_text() != stubs:
        raise SystemExit(f"{TARGET} is not what the extension has: run python tools/make_stubs.py")


if __name__ == "__main__":
    main()
