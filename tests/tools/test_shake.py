"""tools/shake.py counts what fails, says so by its status, and does shake."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

SHAKE = Path(__file__).parents[2] / "tools" / "shake.py"
TESTS = """
import sys

def test_threads_take_turns_at_once():
    assert sys.getswitchinterval() < 1e-4

def test_wrong():
    assert False
"""


def shake(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_some.py").write_text(TESTS)
    command = [sys.executable, str(SHAKE), "--processes", "0", "--output", str(folder), *arguments]
    return subprocess.run(
        [*command, str(folder / "test_some.py")], capture_output=True, text=True, timeout=100
    )


def test_what_failed_is_counted_and_its_output_kept(tmp_path):
    done = shake(tmp_path, "--rounds", "2")
    assert done.returncode == 1
    assert re.search(r"2 of 2  \S*test_some::test_wrong\n", done.stdout)
    assert "turns" not in done.stdout
    assert "assert False" in (tmp_path / "1.log").read_text()


def test_what_passes_leaves_nothing(tmp_path):
    done = shake(tmp_path, "--rounds", "1", "-k", "turns")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 tests failed" in done.stdout
    assert not [*tmp_path.glob("*.log")]


def test_no_tests_is_no_success(tmp_path):
    done = shake(tmp_path, "-k", "nothing_of_this_name")
    assert done.returncode == 1
    assert "pytest ended with status 5" in done.stderr
