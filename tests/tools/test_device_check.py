"""The tool for machines with a GPU, run on what is here: rows are written, failures are told."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def check(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    spec = importlib.util.spec_from_file_location("device_check", TOOLS / "device_check.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "device_check", module)
    spec.loader.exec_module(module)
    return module


def test_a_section_s_rows_are_in_both_files(check, tmp_path):
    table = check.Table(tmp_path)
    check.run_section("processes", 100, None, table)
    assert len(table.rows) == 5 and all(row.ok for row in table.rows), table.rows
    saved = json.loads((tmp_path / "device_check.json").read_text())
    assert [row["section"] for row in saved] == ["processes"] * 5
    assert (tmp_path / "device_check.md").read_text().count("| ok |") == 5


SECTIONS = """
import os, signal, time
def check_endlessly(seconds):
    while True:
        time.sleep(1)
        yield 'one more', '1', None
def check_once(seconds):
    yield 'first', '1', None
    os.killpg(0, signal.SIGKILL)
SECTIONS = {'endless': (check_endlessly, 60), 'once': (check_once, 60)}
"""


@pytest.fixture
def made_up(check, tmp_path, monkeypatch):
    """The tool with sections of the tests'."""
    (tmp_path / "device_sections.py").write_text(SECTIONS)
    (tmp_path / "device_check.py").write_text((TOOLS / "device_check.py").read_text())
    monkeypatch.setattr(check, "ROOT", tmp_path / "nothing")
    monkeypatch.setattr(check, "__file__", str(tmp_path / "device_check.py"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return check


def test_a_section_that_is_cut_off_is_told(made_up, tmp_path):
    table = made_up.Table(tmp_path)
    made_up.run_section("endless", 2, None, table)
    assert table.rows[-1].result.startswith("cut off after 2 s") and table.rows[-1].ok is False


def test_a_section_that_fails_is_told(check, tmp_path):
    table = check.Table(tmp_path)
    check.run_section("no such section", 60, None, table)
    assert table.rows[-1].ok is False and "exit code 2" in table.rows[-1].result
    assert "invalid choice: 'no such section'" in table.rows[-1].result


def test_rows_are_there_when_the_section_is_cut_off(made_up, tmp_path):
    """As they come, not when all have come."""
    table = made_up.Table(tmp_path)
    made_up.run_section("once", 60, None, table)
    assert [(row.what, row.ok) for row in table.rows] == [
        ("first", None),
        ("the section broke", False),
    ]
    assert "| once | first | 1 |  |" in (tmp_path / "device_check.md").read_text()


def test_no_time_for_a_section_is_told(check, tmp_path, monkeypatch, capsys):
    where = ["--output", str(tmp_path), "--no-build", "--only", "bits"]
    monkeypatch.setattr(sys, "argv", ["device_check.py", "--seconds", "8", *where])
    assert check.main() == 0
    assert "[bits] not begun: no time was left" in capsys.readouterr().out
    assert "no time was left" in (tmp_path / "device_check.md").read_text()
