"""The demo of the hierarchy, as it is called."""

from __future__ import annotations

import re
from pathlib import Path

import fork_server
import pytest
import trace_support

SCRIPT = Path(__file__).parents[2] / "examples" / "hierarchy_demo.py"


def run(*arguments, folder):
    slow = "ignore", "the shards of this model are so"  # depends on the machine
    return fork_server.run(SCRIPT, *arguments, cwd=folder, warn=(("error",), slow))


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_it_runs_both_kinds_of_work_and_saves_what_it_saw(tmp_path, levels):
    done = run(
        "--levels", levels, "--items", 50, "--work-us", 20, "--concurrency", 3, folder=tmp_path
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for kind in ("native", "Python"):
        line = rf"^{kind} items: 0\.001 s of work in \S+ s, \S+ at once$"
        assert re.search(line, done.stdout, re.MULTILINE)
    assert re.search(r"^all +\d+ +100 ", done.stdout, re.MULTILINE)  # items, in the table
    assert "saved hierarchy_demo.json" in done.stdout.splitlines()[-1]
    assert (tmp_path / "hierarchy_demo.png").read_bytes().startswith(b"\x89PNG")
    tracks = trace_support.check_file(trace_support.load(tmp_path / "hierarchy_demo.json"))
    assert "sphere root" in tracks


def test_files_go_where_they_are_wanted(tmp_path):
    done = run(
        "--items", 5, "--plot", "rings.svg", "--trace", tmp_path / "run.json", "--theme", "dark",
        folder=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "<svg" in (tmp_path / "rings.svg").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"rings.svg", "run.json"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--levels", "5"], "'5'|5"),
        (["--items", "0"], "must be 1 to 10,000,000, got '0'"),
        (["--work-us", "-1"], "'-1'|-1"),
        (["--concurrency", "two"], "got 'two'"),
        (["--plot", "/nowhere/rings.png"], "no such folder: /nowhere"),
        (["--plot", "rings.txt"], "must end in .png, .svg or .pdf, got 'rings.txt'"),
        (["--trace", "/nowhere/run.json"], "no such folder: /nowhere"),
        (["--theme", "blue"], "invalid choice: 'blue'"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path):
    done = run(*arguments, folder=tmp_path)
    assert done.returncode == 2
    assert re.search(message, done.stderr) and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_without_a_compiler_it_is_said(tmp_path):
    done = fork_server.run(SCRIPT, cwd=tmp_path, env={"PATH": ""})
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("hierarchy_demo.py: the native work needs a C compiler")
