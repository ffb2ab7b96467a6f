"""The live display: in a pseudo-terminal, in a stand-in for a notebook, and as lines.

Nothing depends on speed: programs wait for the test's word and the test waits for what the screen
shows, with limits that only a hang reaches.
"""

from __future__ import annotations

import io
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from system_support import eventually
from terminal import Program, Screen, script

import torch_spheres as ts
from torch_spheres.observe import displays

SUBTREES = ["root", *map(str, range(12)), "all"]
HEADER = """
import contextlib, logging, os, sys, threading, time
handler = logging.StreamHandler()  # has the stderr of before the display
logging.getLogger("x").addHandler(handler)
import torch_spheres as ts
"""


def program(text: str, **streams: Any) -> Program:
    return Program(HEADER + text, **streams)


def rows(screen: Screen) -> dict[str, list[str]]:
    """Cells of the last table on the screen, by sphere; none while it is being drawn."""
    _, _, table = screen.text.rpartition("sphere  busy")
    found = {line.split()[0]: line.split()[1:] for line in table.splitlines()[1:] if line}
    return found if "/s)" in table else {}


def live_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name == "spheres live"]


# ---- in a terminal ----


def test_a_line_per_kissing_sphere_totals_and_samples() -> None:
    text = """
gate = threading.Event()
with ts.KissingSpheres(concurrency=3) as spheres, spheres.live() as live:
    spheres.map(abs, range(100))
    live.advance(1234)
    work = spheres.distribute_work(range(24), lambda _: gate.wait(60))
    input()
    gate.set()
    work.wait()
print("after")
"""
    with program(text) as p:
        p.until(lambda s: {"3", "21"} <= {*rows(s).get("all", [])} and "1,234 samples" in s.text)
        table = rows(p.screen)
        assert list(table)[:14] == SUBTREES
        assert "13 spheres, 3 of 12 leaves at once, running" in p.screen.text
        assert sum(cells[-1] == "processing" for cells in table.values()) == 3
        # busy, bar, items, queue, stolen, state
        assert sum(int(table[name][3]) for name in SUBTREES[:-1]) == 21
        assert table["all"][2:4] == ["100", "21"] and table["all"][-3:] == ["3", "at", "work"]
        p.go()
        assert p.end() == 0
        assert rows(p.screen)["all"][2:4] == ["124", "0"]
        assert p.screen.text.splitlines()[-1] == "after" and p.screen.cursor_shown
        assert p.screen.text.count("13 spheres") == 1  # drawn over itself


@pytest.mark.parametrize(
    ("levels", "columns", "lines"), [(1, 80, 24), (2, 12, 5), (2, 1, 1), (3, 300, 80), (4, 80, 24)]
)
def test_hierarchies_and_terminals_of_any_size(
    levels: int, columns: int, lines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("LINES", str(lines))
    file = io.StringIO()
    with (
        ts.KissingSpheres(levels, concurrency=2) as spheres,
        spheres.live(100, file=file, plain=False),
    ):
        spheres.map(abs, range(3000))
        before = len(file.getvalue())
        eventually(lambda: len(file.getvalue()) > before)
    screen = Screen(columns + 1, file.getvalue())  # one more: nothing is wrapped
    assert max(map(len, screen.lines)) <= columns
    if columns >= 80:
        assert list(rows(screen))[:-1] == (["root", "all"] if levels == 1 else SUBTREES)
        assert rows(screen)["all"][2] == "3,000"
        assert f"{spheres.total_spheres:,} sphere" in screen.text


def test_prints_come_above_the_display_whole_and_in_order() -> None:
    text = """
with ts.KissingSpheres() as spheres, spheres.live() as live:
    for i in range(100):
        print("line", i)
        print("error", i, file=sys.stderr)
    print("[bold]no markup[/bold] :smile:", "x" * 100)
    sys.stdout.writelines(["several\\n", "lines\\n"])
    logging.getLogger("x").warning("logged")
    inside = logging.StreamHandler()
    logging.getLogger("y").addHandler(inside)
    input()
    print("not ended", end="")
streams = sys.stdout, sys.stderr
assert streams == (sys.__stdout__, sys.__stderr__), streams
assert handler.stream is inside.stream is sys.stderr
print("after")
"""
    with program(text) as p:
        p.until(lambda s: "logged" in s.text.splitlines() and "all" in rows(s))
        p.go()
        assert p.end() == 0, p.screen.text
    lines = p.screen.text.splitlines()
    table = lines.index(next(line for line in lines if line.startswith("13 spheres")))
    long = "[bold]no markup[/bold] :smile: " + "x" * 100
    assert lines[:table] == [
        *(f"{word} {i}" for i in range(100) for word in ("line", "error")),
        *(long[:100], long[100:], "several", "lines", "logged", "not ended"),
    ]
    assert lines[-1] == "after"


def test_stdout_in_a_file_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    master, slave = os.openpty()
    with (tmp_path / "out").open("w") as out, os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", terminal)
        with ts.KissingSpheres(levels=1) as spheres, spheres.live():
            print("for the file")
            print("for the terminal", file=sys.stderr)
        assert sys.stdout is out and sys.stderr is terminal
        screen = Screen(text=os.read(master, 65536).decode())
    os.close(master)
    assert screen.lines[0] == "for the terminal" and list(rows(screen))[:2] == ["root", "all"]
    assert (tmp_path / "out").read_text() == "for the file\n"


ENDINGS = {
    # Not one long sleep: Python does not see a signal that comes just before it until it is over.
    "interrupt": ("while True: time.sleep(0.01)", -signal.SIGINT, "KeyboardInterrupt"),
    "terminate": ("while True: time.sleep(0.01)", -signal.SIGTERM, ""),
    "break": ("break", 0, "0 items (0/s)"),
    "forgotten": ("stack.pop_all()", 0, "0 items (0/s)"),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_terminal_is_as_it_was_however_the_program_ends(ending: str) -> None:
    action, code, last = ENDINGS[ending]
    text = f"""
spheres = ts.KissingSpheres().start()
for _ in range(2):
    with contextlib.ExitStack() as stack:
        stack.callback(spheres.stop)
        forgotten = stack.enter_context(spheres.live())
        input()
        print("told")
        {action}
    break
"""
    with program(text) as p:
        p.until(lambda s: "all" in rows(s))
        p.go()
        p.until(lambda s: "told" in s.text.splitlines() and "all" in rows(s))
        if ending in ("interrupt", "terminate"):
            p.process.send_signal(-code)
        assert p.end() == code
        assert p.screen.cursor_shown
        if last:
            assert p.screen.column == 0 and p.screen.text.count("13 spheres") == 1
            assert p.screen.text.rstrip().splitlines()[-1].startswith(last)


def test_a_forked_child_has_no_display_and_prints_past_it() -> None:
    text = """
with ts.KissingSpheres() as spheres, spheres.live() as live:
    pid = os.fork()
    if pid == 0:
        streams = sys.stdout, sys.stderr, handler.stream
        assert streams == (sys.__stdout__, sys.__stderr__, sys.__stderr__), streams
        assert not live.active
        assert "of another process" in spheres._repr_html_()
        with ts.KissingSpheres() as own, own.live(plain=True) as other:
            assert other.active
        live.close()
        os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
    assert live.active
"""
    with program(text) as p:
        assert p.end() == 0, p.screen.text
        assert p.screen.text.count("13 spheres") == 1


def test_a_terminal_that_goes_away_ends_the_display_with_a_warning() -> None:
    master, slave = os.openpty()
    file = os.fdopen(slave, "w")
    with ts.KissingSpheres(levels=1) as spheres:
        shown = spheres.live(file=file, plain=False)
        shown.__enter__()
        os.close(master)
        eventually(lambda: not shown.active)
        with pytest.warns(RuntimeWarning, match="ended early: OSError"):
            shown.close()
    with pytest.raises(OSError):
        file.close()  # what was not written yet cannot be


# ---- life ----


def test_it_ends_by_itself_when_the_spheres_stop() -> None:
    spheres = ts.KissingSpheres(levels=1)
    with spheres.live(1000, file=io.StringIO(), plain=False) as live:
        time.sleep(0.01)
        assert live.active  # spheres that do not run yet
        spheres.start()
        spheres.stop()  # it may have seen nothing of the time between
        eventually(lambda: not live.active)
        live.advance(3)
        lines = {"file": io.StringIO(), "plain": True, "plain_seconds": 0.001}
        with spheres.live(**lines) as other:
            time.sleep(0.01)
            assert other.active  # spheres that have stopped may start again
            spheres.start()
            spheres.stop()
            eventually(lambda: not other.active)
    assert live_threads() == []


def test_two_displays_are_one_too_many() -> None:
    with ts.KissingSpheres(levels=1) as spheres, ts.KissingSpheres(levels=1) as others:
        one, two = (s.live(plain=True, file=io.StringIO()) for s in (spheres, others))
        with one, pytest.raises(RuntimeError, match=r"levels=1.*is shown already"):
            two.__enter__()
        with two:
            assert two.active
        assert not two.active
        with pytest.raises(RuntimeError, match="has ended; call live"):
            two.__enter__()
    assert live_threads() == []


def test_ranks_but_the_first_show_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with ts.KissingSpheres(levels=1) as spheres, spheres.live() as live:
        assert not live.active
        live.advance(3)


def test_without_rich_a_terminal_gets_an_error_and_lines_still_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    master, slave = os.openpty()
    with os.fdopen(slave, "w") as terminal, ts.KissingSpheres(levels=1) as spheres:
        for options in ({"file": terminal}, {"file": io.StringIO(), "plain": False}):
            with (
                pytest.raises(ImportError, match=r'pip install "\.\[live\]".*plain=True'),
                spheres.live(**options),
            ):
                pass
        for options in ({"file": terminal, "plain": True}, {"file": io.StringIO()}):
            with spheres.live(**options) as live:
                assert live.active
    os.close(master)


def test_importing_the_package_imports_neither_rich_nor_ipython() -> None:
    text = "import sys, torch_spheres; print({'rich', 'IPython'} & {*sys.modules})"
    done = subprocess.run(script(text), capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# ---- as lines ----


def test_lines_where_there_is_no_terminal() -> None:
    file = io.StringIO()
    spheres = ts.KissingSpheres(concurrency=2)
    with spheres, spheres.live(1000, file=file, plain_seconds=0.001) as live:
        live.update(samples=7)
        live.advance(3)
        spheres.map(abs, range(9))
        eventually(lambda: "9 items" in file.getvalue())
    assert re.fullmatch(
        r"spheres: 13 spheres, 2 of 12 leaves at once, running 0:\d\d:\d\d: 9 items \([\d,]+/s\), "
        r"10 samples \([\d,]+/s\), \d+ stolen, 0 queued, \d at work, \d+% busy",
        file.getvalue().splitlines()[-1],
    )


def test_a_short_run_prints_no_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with ts.KissingSpheres(levels=1) as spheres, spheres.live():
        spheres.map(abs, range(9))
    assert capsys.readouterr() == ("", "")


# ---- in a notebook ----


def test_a_notebooks_picture_is_there_at_once_and_updated_in_place(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a stand-in for IPython, which a kernel would have to be started for."""
    shown: list[tuple[str, dict[str, str]]] = []

    class Handle:
        def update(self, data: dict[str, str], *, raw: bool) -> None:
            shown.append(("update", data))

    def display(data: dict[str, str], *, raw: bool, display_id: bool) -> Handle:
        assert raw and display_id
        shown.append(("display", data))
        return Handle()

    ipython, module = ModuleType("IPython"), ModuleType("IPython.display")
    shell = SimpleNamespace(kernel=object())
    ipython.get_ipython = lambda: shell  # type: ignore[attr-defined]
    module.display = display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    monkeypatch.setitem(sys.modules, "rich.console", None)  # nor is it needed
    with ts.KissingSpheres() as spheres:
        with spheres.live(100) as live:
            assert [how for how, _ in shown] == ["display"]
            spheres.map(abs, range(4321))
            eventually(lambda: "4,321" in shown[-1][1]["text/html"])
            live.advance(5)
        assert {how for how, _ in shown[1:]} == {"update"}
        assert "<td>4,321</td>" in shown[-1][1]["text/html"]
        assert (
            "5 samples" in shown[-1][1]["text/html"] and "5 samples" in shown[-1][1]["text/plain"]
        )
        assert capsys.readouterr() == ("", "")
        count = len(shown)
        shell.kernel = None  # IPython in a terminal
        for options in ({}, {"plain": True}, {"file": io.StringIO()}):
            with spheres.live(**options):
                pass
            shell.kernel = object()
        assert len(shown) == count


# ---- arguments ----


@pytest.mark.parametrize("value", ["4", None, 0, -1, float("nan"), float("inf")])
def test_numbers_that_are_none(value: Any) -> None:
    spheres = ts.KissingSpheres(levels=1)
    for name in ("refresh_per_second", "plain_seconds"):
        with pytest.raises((TypeError, ValueError), match=f"{name} must be .*{value!r}"):
            spheres.live(**{name: value})


@pytest.mark.parametrize("file", ["stderr", 2, b"x", io.BytesIO(), object()])
def test_files_that_are_none(file: Any) -> None:
    spheres = ts.KissingSpheres(levels=1)
    with pytest.raises(TypeError, match=r"file must be a text file, such as .*, or None"):
        spheres.live(file=file)
    with pytest.raises(TypeError, match="plain must be True, False or None, got 'no'"):
        spheres.live(plain="no")  # type: ignore[arg-type]


def test_handlers_that_ask_for_stderr_each_time_are_left_alone():
    before, above = io.StringIO(), io.StringIO()
    logger, kept = logging.getLogger("of this test"), logging.StreamHandler(before)
    logger.handlers = [logging.lastResort, kept]  # whose stream is a property without a setter
    try:
        swapped = {id(before): above, id(sys.stderr): above}
        displays._replace_streams_of_handlers(lambda stream: swapped.get(id(stream), stream))
        assert kept.stream is above and logging.lastResort.stream is sys.stderr
    finally:
        logger.handlers = []
        displays._replace_streams_of_handlers(lambda s: sys.stderr if s is above else s)
