"""`python -m torch_spheres.top` and signals: passed on, or sent to both by the terminal."""

from __future__ import annotations

import os
import signal

import pytest
from terminal import FOREVER, Program, script
from top_support import HEADER, TOP, watched


def test_ctrl_c_reaches_the_command_once_and_top_waits_for_it() -> None:
    text = """
count = 0
def note(number, frame):
    global count
    count += 1
signal.signal(signal.SIGINT, note)
with ts.KissingSpheres() as spheres:
    print("ready")
    while count < 1:
        time.sleep(0.01)
    print("interrupted")
    told()
print("count", count)
sys.exit(9)
"""
    with watched(text) as p:
        p.until(lambda s: "ready" in s.text and "pid" in s.text)
        p.type("\x03")
        p.until(lambda s: "interrupted" in s.text)
        assert p.process.poll() is None
        p.type("go\n")
        assert p.end() == 9
        assert "count 1" in p.screen.text


def test_ctrl_c_ends_a_script_and_top_of_the_same_signal() -> None:
    with watched("ts.KissingSpheres().start()\nprint('ready')\n" + FOREVER) as p:
        p.until(lambda s: "ready" in s.text and "pid" in s.text)
        p.type("\x03")
        assert p.end() == -signal.SIGINT
        assert "KeyboardInterrupt" in p.screen.text
        assert p.screen.cursor_shown and p.screen.wraps and p.screen.column == 0


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGHUP"])
def test_signals_are_forwarded(name: str) -> None:
    text = f"""
got = []
signal.signal(signal.{name}, lambda number, frame: got.append(number))
print("ready", flush=True)
while not got:
    time.sleep(0.01)
print("got", signal.Signals(*got).name, flush=True)
sys.exit(11)
"""
    with watched(text, header=HEADER) as p:
        p.until(lambda s: "ready" in s.text)
        p.signal(getattr(signal, name))
        assert p.end() == 11
        assert f"got {name}" in p.screen.text


def test_what_is_ignored_stays_ignored() -> None:
    """As under nohup."""
    text = (
        HEADER
        + """
print("ignored", signal.getsignal(signal.SIGHUP) is signal.SIG_IGN, flush=True)
told()
"""
    )
    ignoring = ["sh", "-c", 'trap "" HUP; exec "$@"', "sh"]
    with Program([*ignoring, *TOP, "--", *script(text)]) as p:
        p.until(lambda s: "ignored True" in s.text)
        p.signal(signal.SIGHUP)
        p.type("go\n")
        assert p.end() == 0


def test_ctrl_z_stops_both_and_they_go_on() -> None:
    with watched("ts.KissingSpheres().start()\nprint('ready')\ntold()\nprint('went on')") as p:
        p.until(lambda s: "ready" in s.text and "pid" in s.text)
        p.type("\x1a")
        stopped = os.waitid(os.P_PID, p.process.pid, os.WSTOPPED)
        assert stopped is not None and stopped.si_code == os.CLD_STOPPED
        assert p.read()
        os.killpg(os.getpgid(p.process.pid), signal.SIGCONT)
        p.type("go\n")
        assert p.end() == 0
        assert "went on" in p.screen.text
