"""The live display, driven in a pseudo-terminal.

Nothing depends on speed: programs wait for the test's word (a line on stdin, a file) and the test
waits for what the screen shows, with limits that only a hang reaches.
"""

from __future__ import annotations

import io
import os
import re
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
from system_support import eventually
from terminal import FOREVER, Program, Screen, script

import torch_spheres as ts

SUBTREES = ["root", *map(str, range(12)), "all"]
HEADER = """
import contextlib, io, logging, os, signal, subprocess, sys, threading, time
import torch_spheres as ts
def told():
    assert sys.stdin.readline() == "go\\n"
"""


def live_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("spheres ")]


def program(text: str, **options: Any) -> Program:
    return Program(script(HEADER + text), **options)


def rows(screen: Screen) -> dict[str, list[str]]:
    """Lines of the last table on the screen, by sphere."""
    found: dict[str, list[str]] = {}
    inside = False
    for line in screen.text.splitlines():
        name, *cells = line.split() or [""]
        if name == "sphere":
            found, inside = {}, True
        elif inside and name in SUBTREES:
            found[name] = cells
            inside = name != "all"
    return found


def test_a_line_per_kissing_sphere_totals_and_samples() -> None:
    text = """
gate = threading.Event()
with ts.KissingSpheres(concurrency=3) as spheres, spheres.live() as live:
    spheres.map(abs, range(100))
    live.advance(1234)
    work = spheres.distribute_work(range(24), lambda _: gate.wait(60))
    told()
    gate.set()
    work.wait()
print("after")
"""
    with program(text) as p:
        shown = p.until(
            lambda s: (
                "3 at work" in s.text
                and "1,234 samples" in s.text
                and "21" in rows(s).get("all", [])
            )
        )
        table = rows(shown)
        assert list(table) == SUBTREES
        assert "13 spheres, 3 of 12 leaves at once, running" in shown.text
        assert sum(cells[0] == "processing" for cells in table.values()) == 3
        # state, items, stolen, queue, busy, bar
        waiting = [int(table[name][3]) for name in SUBTREES[:-1]]
        assert sum(waiting) == 21 and table["all"][:6] == [
            "3",
            "at",
            "work",
            "100",
            *table["all"][4:6],
        ]
        p.type("go\n")
        assert p.end() == 0
        assert rows(p.screen)["all"][3] == "124"
        assert p.screen.text.splitlines().count("after") == 1
        assert p.screen.text.rstrip().endswith("after")
        assert p.screen.cursor_shown and p.screen.wraps
        assert len(re.findall("13 spheres", p.screen.text)) == 1  # drawn over itself


@pytest.mark.parametrize(("levels", "spheres"), [(1, "1 sphere, "), (3, "157 "), (4, "1,885 ")])
def test_more_or_fewer_levels(levels: int, spheres: str) -> None:
    text = f"""
spheres = ts.KissingSpheres(levels={levels}, concurrency=2)
with spheres, spheres.live():
    spheres.map(abs, range(3000))
    told()
"""
    with program(text) as p:
        shown = p.until(lambda s: "3,000" in rows(s).get("all", []))
        assert spheres in shown.text
        assert list(rows(shown)) == (["root", "all"] if levels == 1 else SUBTREES)
        p.type("go\n")
        assert p.end() == 0


def test_prints_come_above_the_display_whole_and_in_order() -> None:
    text = """
handler = logging.StreamHandler()  # keeps the stderr that is there now
with ts.KissingSpheres() as spheres, spheres.live() as live:
    told()
    for i in range(300):
        print("line", i)
        print("error", i, file=sys.stderr)
    print("[bold]no markup[/bold]", "x" * 100)
    print("half a", end=" ", flush=True)
    told()
    print("line")
    sys.stdout.writelines(["several\\n", "lines\\n"])
    for i in range(50):
        sys.stderr.write(f"\\rbar {i}")
    sys.stderr.write("\\n")
    handler.emit(logging.makeLogRecord({"msg": "logged past us"}))
    told()
    subprocess.run(["echo", "from a child process"], check=True)
    told()
    assert isinstance(sys.stdout.fileno(), int) and sys.stdout.isatty()
    print("not ended", end="")
print(" until after it")
"""
    with program(text) as p:
        p.until(lambda s: "all" in rows(s))
        p.type("go\n")
        p.until(lambda s: "half a" in s.text)
        p.type("go\n")
        p.until(lambda s: "logged past us" in s.text)
        p.type("go\n")
        p.until(lambda s: "from a child process" in s.text)
        p.type("go\n")
        assert p.end() == 0
    lines = p.screen.text.splitlines()
    table = lines.index(next(line for line in lines if line.startswith("13 spheres")))
    above = [line for line in lines[:table] if line.split()[:1] in (["line"], ["error"])]
    assert above == [f"{word} {i}" for i in range(300) for word in ("line", "error")] + ["line"] * (
        "line" in above
    )
    for line in ("half a line", "several", "lines", "bar 49", "logged past us"):
        assert line in lines[:table], line
    assert "from a child process" in lines[:table]
    marked = lines.index("[bold]no markup[/bold] " + "x" * 57)  # wrapped by the terminal
    assert lines[marked + 1] == "x" * 43
    assert lines[-1] == "not ended until after it"


@pytest.mark.parametrize(
    ("columns", "height", "shown"),
    [
        (10, 24, lambda s: rows(s).keys() >= set(SUBTREES) and max(map(len, s.lines)) <= 10),
        (10, 5, lambda s: "13 spheres" in s.text),
        (1, 1, lambda s: "1" in s.text),
        (40, 8, lambda s: "13 spheres" in s.text and "7 items" in s.text and not rows(s)),
        (300, 80, lambda s: list(rows(s)) == SUBTREES),
    ],
)
def test_terminals_of_any_size(columns: int, height: int, shown: Callable[[Screen], bool]) -> None:
    text = """
with ts.KissingSpheres() as spheres, spheres.live():
    spheres.map(abs, range(7))
    while not sys.stdin.readline():
        pass
"""
    with program(text, columns=columns, rows=height) as p:
        p.until(shown)
        p.type("go\n")
        assert p.end() == 0
        assert p.screen.cursor_shown and p.screen.wraps


def test_a_terminal_that_is_resized() -> None:
    text = """
with ts.KissingSpheres() as spheres, spheres.live():
    told()
"""
    with program(text, columns=100, rows=40) as p:
        p.until(lambda s: "█" in s.text or "·" in s.text)
        p.resize(30, 40)
        p.until(lambda s: "·" not in s.text and list(rows(s)) == SUBTREES)
        assert max(len(line) for line in p.screen.lines) <= 30
        p.resize(30, 6)
        p.until(lambda s: not rows(s) and "13 spheres" in s.text)
        p.resize(100, 40)
        p.until(lambda s: list(rows(s)) == SUBTREES)
        p.type("go\n")
        assert p.end() == 0
        assert p.screen.cursor_shown and p.screen.wraps


@pytest.mark.parametrize("ending", ["ctrl-c", "exception", "exit", "forgotten", "kill"])
def test_the_terminal_is_restored_however_the_script_ends(ending: str) -> None:
    ends = {"ctrl-c": FOREVER, "kill": FOREVER, "exception": "1 / 0", "exit": "sys.exit(7)"}
    text = f"""
spheres = ts.KissingSpheres()
with contextlib.ExitStack() as stack:
    spheres.start()
    live = spheres.live().__enter__()
    if "{ending}" != "forgotten":
        stack.push(live)
        stack.push(spheres)
    told()
    print("told")
    {ends.get(ending, "")}
"""
    codes = {"ctrl-c": -signal.SIGINT, "exception": 1, "exit": 7, "forgotten": 0, "kill": -9}
    with program(text) as p:
        p.until(lambda s: "all" in rows(s))
        p.type("go\n")
        p.until(lambda s: "told" in s.text.splitlines())
        if ending == "ctrl-c":
            p.type("\x03")
        elif ending == "kill":
            p.signal(signal.SIGKILL)
        assert p.end() == codes[ending]
        text = p.screen.text
        assert p.screen.cursor_shown and p.screen.wraps
        if ending == "kill":
            return
        assert p.screen.column == 0 and len(re.findall("13 spheres", text)) == 1
        error = {"ctrl-c": "KeyboardInterrupt", "exception": "ZeroDivisionError"}.get(ending, "")
        assert error in text.splitlines()[-1] if error else text.rstrip().endswith("items (0/s)")


def test_it_ends_by_itself_when_the_spheres_stop() -> None:
    text = """
spheres = ts.KissingSpheres()
with spheres.live() as live:  # before they start
    told()
    spheres.map(abs, range(5))
    told()
    spheres.stop()
    while live.active:
        time.sleep(0.01)
    assert type(sys.stdout) is type(sys.__stdout__), sys.stdout
    live.advance(3)
    print("goes on")
    with spheres.live() as other, contextlib.redirect_stdout(io.StringIO()):
        assert other.active
    print("twice")
assert not [t for t in threading.enumerate() if t.name.startswith("spheres ")]
"""
    with program(text) as p:
        p.until(lambda s: "not started" in s.text)
        p.type("go\n")
        p.until(lambda s: "5" in rows(s).get("all", []))
        p.type("go\n")
        assert p.end() == 0
        first, then = p.screen.text.split("goes on")
        assert "stopped" in first and "13 spheres" in then


def test_two_displays_are_one_too_many() -> None:
    with ts.KissingSpheres(levels=1) as spheres, ts.KissingSpheres(levels=1) as others:
        one, two = (s.live(plain=True, file=io.StringIO()) for s in (spheres, others))
        with one, pytest.raises(RuntimeError, match=r"levels=1.*shown already.*torch_spheres.top"):
            two.__enter__()
        shown = others.live(plain=True, file=io.StringIO())
        with shown:
            assert shown.active
        assert not shown.active
        with pytest.raises(RuntimeError, match="has ended; call live"):
            shown.__enter__()
    assert live_threads() == []


def test_without_rich_a_terminal_gets_an_error_and_lines_still_work() -> None:
    text = """
sys.modules["rich"] = sys.modules["rich.console"] = None
with ts.KissingSpheres() as spheres:
    try:
        with spheres.live():
            pass
    except ImportError as error:
        print(error)
    assert type(sys.stdout) is type(sys.__stdout__)
    with spheres.live(plain=True, plain_seconds=0.01):
        told()
"""
    with program(text, columns=200) as p:
        p.until(lambda s: s.text.count("spheres: 13 spheres") > 1)
        p.type("go\n")
        assert p.end() == 0
        assert 'needs rich: pip install "torch_spheres[live]"' in p.screen.text
        assert "plain=True" in p.screen.text


def test_importing_the_package_does_not_import_rich() -> None:
    with program("print('rich' in sys.modules, 'json' in sys.modules)") as p:
        assert p.end() == 0
        assert p.screen.text.startswith("False")


def test_stdout_in_a_file_is_left_alone(tmp_path: Any) -> None:
    text = """
with ts.KissingSpheres() as spheres, spheres.live():
    print("for the file")
    print("for the terminal", file=sys.stderr)
    told()
"""
    with (tmp_path / "out").open("w") as out, program(text, stdout=out) as p:
        p.until(lambda s: "all" in rows(s) and "for the terminal" in s.text)
        p.type("go\n")
        assert p.end() == 0
    assert (tmp_path / "out").read_text() == "for the file\n"


def test_a_forked_child_has_no_display_and_prints_past_it() -> None:
    text = """
with ts.KissingSpheres() as spheres, spheres.live() as live:
    told()
    pid = os.fork()
    if pid == 0:
        assert not live.active
        assert not [t for t in threading.enumerate() if t.name.startswith("spheres ")]
        assert "of another process" in spheres._repr_html_()
        print("from the child", flush=True)
        with ts.KissingSpheres() as own, own.live(plain=True, file=io.StringIO()) as other:
            assert other.active
        live.close()
        sys.stdout.flush()
        os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
    told()
"""
    with program(text) as p:
        p.until(lambda s: "all" in rows(s))
        p.type("go\n")
        p.until(lambda s: "from the child" in s.text)
        p.type("go\n")
        assert p.end() == 0
        assert len(re.findall("13 spheres", p.screen.text)) == 1


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
