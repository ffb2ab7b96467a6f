"""What watched processes send to `torch_spheres.top`, where it arrives, and what is remembered."""

from __future__ import annotations

import gc
import json
import os
import selectors
import socket
import stat
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from system_support import eventually
from terminal import LIMIT, script

import torch_spheres as ts
from torch_spheres.watching.inbox import Inbox
from torch_spheres.watching.readings import Reading
from torch_spheres.watching.report import ADDRESS, Reporter

SPHERES = """
import os, signal, sys, threading
import torch_spheres as ts
"""


def test_the_socket_is_for_this_user_and_survives_nonsense() -> None:
    with selectors.DefaultSelector() as selector:
        with Inbox(selector) as inbox:
            folder = Path(inbox.path).parent
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            with ts.KissingSpheres(levels=1) as spheres:
                reading = Reading.of(spheres).to_json()
            good = {"pid": 5, "rank": None, "number": 0, "reading": reading}
            bad: list[Any] = [b"\xff", b"{}", b"[]", b"7", json.dumps({**good, "reading": [1]})]
            peers = []
            for message in [*bad, json.dumps(good)]:
                peer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                peer.connect(inbox.path)
                peer.send(message if isinstance(message, bytes) else message.encode())
                peers.append(peer)
            inbox.drain()
            assert [(view.name, view.ended) for view in inbox.views] == [("pid 5", False)]
            for peer in peers:
                peer.close()
            inbox.drain()
            assert [view.ended for view in inbox.views] == [True]
        assert not folder.exists()


def test_a_display_that_does_not_read_holds_nobody_up() -> None:
    with selectors.DefaultSelector() as selector, Inbox(selector) as inbox:
        text = """
from torch_spheres.watching import report
spheres = ts.KissingSpheres().start()
for _ in range(5000):
    report.report(spheres)  # far more than the socket holds
print("done", flush=True)
"""
        done = subprocess.run(
            script(SPHERES + text),
            env={**os.environ, ADDRESS: inbox.path},
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
        inbox.drain()
        (view,) = inbox.views
        assert view.ended and view.reading.spheres == 13


class Peer:
    """A process of which the test says what it sends."""

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.connect(inbox.path)
        self.running = Reading.of(ts.KissingSpheres(levels=2))
        self.running = replace(self.running, running=True, elapsed_ns=1)

    def send(self, number: int, *, running: bool) -> None:
        self._send(number, replace(self.running, running=running).to_json())

    def gone(self, number: int) -> None:
        self._send(number, None)

    def _send(self, number: int, reading: Any) -> None:
        message = {"pid": 5, "rank": None, "number": number, "reading": reading}
        self._socket.send(json.dumps(message).encode())
        self._inbox.drain()

    def close(self) -> None:
        self._socket.close()
        self._inbox.drain()


def test_spheres_that_have_stopped_are_forgotten_while_their_process_goes_on() -> None:
    def numbers() -> list[int]:
        names = [view.name.removeprefix("pid 5, no. ") for view in inbox.views]
        return [0 if name == "pid 5" else int(name) - 1 for name in names]

    with selectors.DefaultSelector() as selector, Inbox(selector) as inbox:
        peer = Peer(inbox)
        peer.send(0, running=True)
        for number in range(1, 301):
            peer.send(number, running=True)
            peer.send(number, running=False)
        assert numbers() == [0, *range(237, 301)]
        assert [view.condition for view in inbox.views] == ["running"] + ["stopped"] * 64
        peer.send(0, running=False)  # the last to stop, though the first to come
        assert numbers() == [0, *range(238, 301)]
        peer.send(238, running=True)  # started again: no longer one to be forgotten
        peer.send(7, running=True)  # and one that was forgotten
        for number in (301, 302, 303):
            peer.send(number, running=False)
        assert numbers() == [0, 238, *range(241, 301), 7, 301, 302, 303]
        peer.gone(238)
        peer.gone(1)  # forgotten long ago
        assert numbers() == [0, 238, *range(242, 301), 7, 301, 302, 303]
        assert [v.condition for v in inbox.views[:2]] == ["stopped", "ended"]
        peer.close()
        assert len(inbox.views) == 64 and {v.condition for v in inbox.views} == {"ended"}
        assert 7 in numbers()


def test_spheres_that_are_garbage_are_reported_as_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch_spheres.watching.report.PERIOD", 0.001)
    with selectors.DefaultSelector() as selector, Inbox(selector) as inbox:

        def conditions() -> list[str]:
            inbox.drain()
            return [view.condition for view in inbox.views]

        reporter = Reporter(inbox.path)
        kept, stopped, dropped = (ts.KissingSpheres(levels=1).start() for _ in range(3))
        for spheres in (kept, stopped, dropped):
            reporter.tell(spheres)
        stopped.stop()
        eventually(lambda: conditions() == ["running", "stopped", "running"])
        # The reporter's messages find no room now, the last one included.
        full, end = reporter._socket, time.monotonic() + LIMIT
        assert full is not None
        message = json.dumps({"pid": 5, "rank": None, "number": 9, "reading": None}).encode()
        with pytest.raises(BlockingIOError):
            while time.monotonic() < end:
                full.send(message)
        del stopped, dropped, spheres
        gc.collect()
        for _ in range(3):
            reporter._send_news()
        eventually(lambda: conditions() == ["running", "ended", "ended"])
        with reporter._lock:  # it forgets them right after it has sent that they are gone
            assert list(reporter._spheres) == [0] and list(reporter._sent) == [0]
        kept.stop()
        reporter.close()


@pytest.mark.parametrize("place", ["socket.socket", "atexit.register", "weakref.ref", "Reading.of"])
def test_a_signals_handler_may_stop_the_spheres_while_they_are_reported(place: str) -> None:
    text = f"""
from torch_spheres.watching import report
interrupted = []
real = report.{place}
def meanwhile(*arguments):
    if not interrupted:
        interrupted.append(True)
        signal.raise_signal(signal.SIGTERM)
    return real(*arguments)
spheres = ts.KissingSpheres(levels=1)
signal.signal(signal.SIGTERM, lambda *_: spheres.stop())
report.{place} = meanwhile
spheres.start()
assert interrupted and not spheres.running
report.{place} = real
print([t.name for t in threading.enumerate() if t.name == "spheres report"], flush=True)
"""
    with selectors.DefaultSelector() as selector, Inbox(selector) as inbox:
        done = subprocess.run(
            script(SPHERES + text),
            env={**os.environ, ADDRESS: inbox.path},
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )
        assert (done.returncode, done.stdout) == (0, "['spheres report']\n"), done.stderr
        inbox.drain()
        (view,) = inbox.views
        assert view.ended and not view.reading.running and "no." not in view.name


@pytest.mark.parametrize(
    "prepare",
    [
        "resource.setrlimit(resource.RLIMIT_NOFILE, (used, hard))",
        "del socket.SOCK_SEQPACKET",
        "del socket.AF_UNIX",
        "threading.Thread.start = refuse",
    ],
)
def test_spheres_start_where_the_display_cannot_be_told(prepare: str) -> None:
    text = f"""
import gc, resource, socket
from torch_spheres.watching import report
begin = threading.Thread.start
def refuse(thread):
    if thread.name == "spheres report":
        raise RuntimeError("can't start new thread")
    begin(thread)
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
used = len(os.listdir("/proc/self/fd")) - 1  # but for that of the folder
{prepare}
for _ in range(100):
    with ts.KissingSpheres(levels=1) as spheres:
        assert spheres.map(abs, [-1]) == [1]
gc.collect()
assert len(report._reporter._spheres) <= 1
print("fine")
"""
    with selectors.DefaultSelector() as selector, Inbox(selector) as inbox:
        done = subprocess.run(
            script(SPHERES + text),
            env={**os.environ, ADDRESS: inbox.path},
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "fine\n", "")
        inbox.drain()
        assert inbox.views == []
