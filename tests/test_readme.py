"""Every Python snippet of the README runs as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import fork_server
import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_there_are_snippets():
    assert len(SNIPPETS) >= 4


@pytest.mark.parametrize("index", range(len(SNIPPETS)))
def test_snippet(index, tmp_path):
    script = tmp_path / "snippet.py"
    script.write_text(SNIPPETS[index])
    if "tensorboard" in SNIPPETS[index]:
        pytest.importorskip("tensorboard")  # of the test extra; not there for every Python
    # (Without the GIL Python says so when a package, such as fontTools, turns it on.)
    # (torch 2.11's profiler has advice for whoever reads a cycle's events later.)
    warn = (
        ("error",),
        ("ignore", "The global interpreter lock"),
        ("ignore", "Warning: Profiler clears events"),
    )
    quiet = {"KINETO_LOG_LEVEL": "9"}  # torch's profiler tells when it begins
    done = fork_server.run(script, cwd=tmp_path, env=quiet, warn=warn)
    assert (done.returncode, done.stderr) == (0, "")


def test_imports_warn_of_nothing():
    options = ["-P", "-W", "error", "-W", "ignore:The global interpreter lock:RuntimeWarning"]
    command = [sys.executable, *options, "-c", "import torch_spheres"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_files_that_the_readme_names_exist():
    names = re.findall(r"`((?:tests|examples|benchmarks|cpp|torch_spheres)/[\w./-]+)`", README)
    names += re.findall(r"\b(tools/\w+\.py|docs/\w+\.\w+)", README)
    assert names
    for name in names:
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("name", ["existing_loop.py", "wrap_loader.py"])
def test_example_runs(name):
    done = fork_server.run(ROOT / "examples" / name)
    assert done.returncode == 0, done.stderr
    assert "bit for bit" in done.stdout and "NO" not in done.stdout
