"""`python -m torch_spheres.top`: in a pseudo-terminal and without one; exit codes."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from terminal import LIMIT, Program, Screen, script
from top_support import HEADER, SPHERES, TOP, watched

from torch_spheres.top import _parser
from torch_spheres.watching.report import ADDRESS


def run(*command: str, options: tuple[str, ...] = (), **more: Any) -> subprocess.CompletedProcess:
    """Without a terminal."""
    return subprocess.run(
        [*TOP, *options, *command],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
        env={k: v for k, v in os.environ.items() if k not in (ADDRESS, "RANK")} | more,
    )


def tables(screen: Screen) -> int:
    return sum(line.startswith("all ") for line in screen.lines)


# ---- in a terminal ----


def test_the_spheres_of_a_script_are_shown_below_its_output() -> None:
    text = """
print("begins", sys.stdout.isatty(), sys.stderr.isatty(), os.get_terminal_size().columns)
told()
with ts.KissingSpheres(concurrency=2) as spheres, spheres.live() as live:  # top shows it
    assert not live.active
    live.advance(777)
    spheres.map(abs, range(500))
    print("epoch 1")
    print("error 1", file=sys.stderr)
    print("not end", end="", flush=True)
    told()
    print("ed")
    with ts.KissingSpheres(levels=3) as others:
        others.map(abs, range(40))
        told()
sys.exit(42)
"""
    with watched(text, columns=90, rows=60) as p:
        p.until(lambda s: "begins True True 90" in s.text)
        assert tables(p.screen) == 0  # nothing to show yet
        p.type("go\n")
        p.until(lambda s: "not end" in s.text and "500 items" in s.text and "777 sam" in s.text)
        assert re.search(r"pid \d+: 13 spheres, 2 of 12 leaves at once, running", p.screen.text)
        p.type("go\n")
        p.until(lambda s: "no. 2: 157 spheres" in s.text and "40 items" in s.text)
        assert tables(p.screen) == 2
        p.type("go\n")
        assert p.end() == 42
        lines = p.screen.text.splitlines()
        first = next(i for i, line in enumerate(lines) if re.match(r"pid \d+", line))
        for line in ("epoch 1", "error 1", "not ended"):
            assert line in lines[:first]
        assert tables(p.screen) == 2 and p.screen.text.count("ended 0:") == 2
        assert "500 items" in p.screen.text and "40 items" in p.screen.text
        assert p.screen.cursor_shown and p.screen.wraps and p.screen.column == 0


def test_a_progress_bar_and_bytes_pass_as_they_are() -> None:
    text = r"""
for i in range(100):
    sys.stderr.write(f"\rbar {i:3}%")
    sys.stderr.flush()
told()
sys.stderr.write("\n")
sys.stdout.flush()
os.write(1, b"\xff\xfe \x1b[31mred\x1b[0m \xc3\xa9\n" + b"x" * 200 + b"\n")
os.write(1, b"".join(b"line %d\n" % i for i in range(20_000)))
"""
    with watched(text, header=HEADER, rows=30) as p:
        p.until(lambda s: "bar  99%" in s.text)
        p.type("go\n")
        assert p.end() == 0
        assert "\x1b[31mred\x1b[0m \u00e9\r\n" in p.raw
        assert "x" * 200 in p.raw
        assert [line for line in p.screen.lines if line.startswith("line ")] == [
            f"line {i}" for i in range(20_000)
        ]
        assert "no KissingSpheres were started by" in p.screen.text


@pytest.mark.parametrize("columns", [10, 40])
def test_small_terminals_and_resizing(columns: int) -> None:
    text = """
with ts.KissingSpheres() as spheres:
    told()
    while os.get_terminal_size().columns != 100:  # it comes after what shows that top has it
        time.sleep(0.01)
    print("size", *os.get_terminal_size())
    told()
"""
    with watched(text, columns=columns, rows=6) as p:
        p.until(lambda s: "pid" in s.text)
        p.resize(100, 50)
        p.until(lambda s: tables(s) == 1)
        p.type("go\n")
        p.until(lambda s: "size 100 50" in s.text)
        p.type("go\n")
        assert p.end() == 0
        assert p.screen.cursor_shown and p.screen.wraps


def test_stdout_in_a_file_is_the_commands_own(tmp_path: Path) -> None:
    text = """
print("to the file", sys.stdout.isatty(), flush=True)
with ts.KissingSpheres() as spheres:
    spheres.map(abs, range(5))
    told()
"""
    with (tmp_path / "out").open("w") as out, watched(text, stdout=out) as p:
        p.until(lambda s: tables(s) == 1)
        p.type("go\n")
        assert p.end() == 0
        assert "to the file" not in p.screen.text
    assert (tmp_path / "out").read_text() == "to the file False\n"


def test_processes_of_the_command_are_told_apart() -> None:
    text = """
if "RANK" not in os.environ:
    command = [sys.executable, "-P", "-c", sys.argv[1], sys.argv[1]]
    children = [
        subprocess.Popen(command, env={**os.environ, "RANK": str(rank)}) for rank in range(2)
    ]
    with ts.KissingSpheres(levels=1) as spheres:
        told()
    for child in children:
        child.kill()  # its figures stay
        child.wait()
else:
    spheres = ts.KissingSpheres().start()
    spheres.map(abs, range(100 + int(os.environ["RANK"])))
    pid = os.fork()
    if pid == 0:  # as a loader's worker
        with ts.KissingSpheres(levels=1) as own:
            own.map(abs, range(50))
        os._exit(0)
    os.waitpid(pid, 0)
    time.sleep(100)
"""
    body = SPHERES + text
    command = [*TOP, "--", sys.executable, "-P", "-c", body, body]
    with Program(command, rows=80, columns=100) as p:
        p.until(
            lambda s: (
                re.search(r"^pid \d+: 1 sphere", s.text, re.M)
                and "100 items" in s.text
                and "101 items" in s.text
                and s.text.count("50 it") == 2
            )
        )
        names = re.findall(r"^(rank (\d), pid \d+|pid \d+): (\d+) sphere", p.screen.text, re.M)
        assert sorted((rank, spheres) for _, rank, spheres in names) == [
            ("", "1"),
            ("0", "1"),
            ("0", "13"),
            ("1", "1"),
            ("1", "13"),
        ]
        assert len({name for name, _, _ in names}) == 5
        p.type("go\n")
        assert p.end() == 0
        assert p.screen.text.count(", ended") == 5


def test_a_killed_command_ends_top() -> None:
    text = """
spheres = ts.KissingSpheres().start()
spheres.map(abs, range(60))
here, there = os.pipe()
pid = os.fork()
if pid == 0:  # has all that its parent had, but for the connection by now
    os.write(there, b"x")
    time.sleep(100)
os.read(here, 1)
print("child", pid, flush=True)
told()
os.kill(os.getpid(), signal.SIGKILL)
"""
    with watched(text) as p:
        p.until(lambda s: re.search(r"child \d+\s", s.text) and "60 items" in s.text)
        child = int(re.search(r"child (\d+)", p.screen.text)[1])  # type: ignore[index]
        try:
            p.type("go\n")
            assert p.end() == -signal.SIGKILL
            assert "ended" in p.screen.text and "60 items" in p.screen.text
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_command_without_spheres_is_said_to_have_none() -> None:
    with Program([*TOP, "--", "sh", "-c", "echo hello; exit 4"], columns=200) as p:
        assert p.end() == 4
        assert p.screen.text.splitlines()[0] == "hello"
        assert "no KissingSpheres were started by sh -c echo hello" in p.screen.text


def test_without_rich_there_is_an_error_and_plain_works() -> None:
    hide = "import sys; sys.modules['rich'] = sys.modules['rich.console'] = None; "
    start = hide + "from torch_spheres.top import main; sys.exit(main(sys.argv[1:]))"
    with Program([*script(start), "--", "true"], columns=200) as p:
        assert p.end() == 2
        assert 'pip install "torch_spheres[live]"' in p.screen.text and "--plain" in p.screen.text
    with Program([*script(start), "--plain", "--", "sh", "-c", "exit 6"]) as p:
        assert p.end() == 6


# ---- without a terminal ----


def test_lines_where_there_is_no_terminal() -> None:
    text = """
with ts.KissingSpheres(concurrency=2) as spheres:
    spheres.map(abs, range(70))
    print("out", sys.stdout.isatty())
    print("error", file=sys.stderr)
"""
    # (Not ten seconds, which importing may take: a line would come while they run.)
    assert _parser().parse_args([]).plain_seconds == 10
    done = run("--plain-seconds", "1000", "--", *script(SPHERES + text))
    assert (done.returncode, done.stdout) == (0, "out False\n")
    error, *lines = done.stderr.splitlines()
    assert error == "error" and len(lines) == 1
    assert re.match(r"spheres: pid \d+: 13 spheres, .* ended 0:00:0\d: 70 items", lines[0])


def test_lines_come_every_few_seconds() -> None:
    # It ends when the second line has come: the parent of both reads them.
    text = """
spheres = ts.KissingSpheres(levels=1).start()
print("started", flush=True)
told()
"""
    command = [*TOP, "--plain-seconds", "0.05", "--", *script(SPHERES + text)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin and process.stdout and process.stderr
        assert process.stdout.readline() == "started\n"
        lines = [process.stderr.readline() for _ in range(3)]
        assert all("1 sphere, 1 of 1 leaf at once, running" in line for line in lines)
        process.stdin.write("go\n")
        process.stdin.flush()
        process.stderr.read()
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--", "no-such-command"], 127, "no-such-command: No such file or directory"),
        (["--", "/"], 126, "/: Permission denied"),
        ([], 2, "say -- and the command"),
        (["--"], 2, "say -- and the command"),
        (
            ["python", "train.py"],
            2,
            "arguments: python train.py; say -- and the command",
        ),
        (["--refresh-per-second", "0", "--", "true"], 2, "must be more than 0, got 0.0"),
        (["--plain-seconds", "x", "--", "true"], 2, "invalid float value"),
        (["--", "sh", "-c", "exit 3"], 3, "no KissingSpheres"),
        (["--", "sh", "-c", "exit 130"], 130, "no KissingSpheres"),
        (["--", "sh", "-c", "kill -TERM $$"], -signal.SIGTERM, "no KissingSpheres"),
        (["--", "sh", "-c", "kill -KILL $$"], -signal.SIGKILL, "no KissingSpheres"),
        (["--", "sh", "-c", "kill -SEGV $$"], -signal.SIGSEGV, "no KissingSpheres"),
    ],
)
def test_exit_codes(arguments: list[str], code: int, text: str) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert text in done.stderr


def test_top_under_top_is_one_too_many() -> None:
    done = run("--", *TOP, "--", "true")
    assert done.returncode == 2 and "under torch_spheres.top already" in done.stderr


def test_an_address_where_nobody_listens_does_no_harm(tmp_path: Path) -> None:
    text = "ts.KissingSpheres().start().map(abs, [1])\nprint('fine')"
    done = subprocess.run(
        script(SPHERES + text),
        env={**os.environ, ADDRESS: str(tmp_path / "gone")},
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "fine\n", "")


# ---- the README ----


def test_the_command_as_the_readme_has_it(tmp_path: Path) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    line = re.search(r"^python -m torch_spheres\.top.*$", readme, re.M)
    assert line is not None
    command = shlex.split(line[0])
    assert command[-1].endswith(".py")
    text = "spheres = ts.KissingSpheres()\nspheres.map(abs, range(3))"
    (tmp_path / command[-1]).write_text(SPHERES + text)
    command = [sys.executable if word == "python" else word for word in command]
    with Program(command, cwd=tmp_path, environment={"PYTHONSAFEPATH": "1"}) as p:
        assert p.end() == 0
        assert "3 items" in p.screen.text
