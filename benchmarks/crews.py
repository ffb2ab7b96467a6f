"""Contestants in processes of their own: started, asked one at a time, and ended.

Whoever is not asked sleeps on its pipe, and leaves the cores to the one that is.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

PATIENCE = 600  # seconds for one answer; whoever needs more hangs

Setup = Any
"""What a contestant is: a frozen dataclass with `processes`, whose fields these are sent."""


class Missing(Exception):  # noqa: N818 - not an error
    """This build of torch_spheres does not have that way to train."""


class Crew:
    """The processes of one contestant, one or DDP's, as their parent sees them: pipes."""

    def __init__(self, setup: Setup, pipes: Sequence[Connection], meeting: Path) -> None:
        self.setup = setup
        self._pipes = list(pipes)
        for rank, pipe in enumerate(pipes):
            pipe.send(asdict(setup) | {"rank": rank, "meeting": str(meeting)})

    def join(self) -> None:
        """Waits until all are ready to be asked.

        Raises:
            Missing: there is no such way in this build.
        """
        self._answers()

    def ask(self, command: str, *arguments: object) -> Any:
        """The first process's answer; all are told the same and all have to answer."""
        return self.ask_all(command, *arguments)[0]

    def ask_all(self, command: str, *arguments: object) -> list[Any]:
        for pipe in self._pipes:
            with suppress(ConnectionError):  # it has died: so say the answers
                pipe.send((command, arguments))
        return self._answers()

    def _answers(self) -> list[Any]:
        answers: dict[Connection, Any] = {}
        while len(answers) < len(self._pipes):
            ready = wait([pipe for pipe in self._pipes if pipe not in answers], PATIENCE)
            if not ready:
                raise TimeoutError(f"{self.setup} has not answered for {PATIENCE} seconds")
            for pipe in cast("list[Connection]", ready):
                answers[pipe] = self._receive(pipe)
        return [answers[pipe] for pipe in self._pipes]

    def _receive(self, pipe: Connection) -> Any:
        try:
            outcome, answer = pipe.recv()
        except (EOFError, ConnectionError):
            raise RuntimeError(f"a process of {self.setup} has died") from None
        if outcome == "missing":
            raise Missing(answer)
        if outcome == "failed":
            raise RuntimeError(f"{self.setup} failed:\n{answer}")
        return answer

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()


class Crews:
    """Starts a crew for each of some setups, and ends them: use it in a ``with`` block.

    `there` are those that can be asked, `missing` says why others cannot. The processes are forked
    from one that has imported torch and done nothing else, which saves seconds each; `apart` starts
    each from nothing, for those whose memory is looked at. `script` is what they run, a file beside
    this one that calls `serving.main`.
    """

    def __init__(
        self, setups: Sequence[Setup], *, apart: bool = False, script: str = "contestants.py"
    ) -> None:
        self.there: list[Crew] = []
        self.missing: dict[Setup, str] = {}
        self._setups = setups
        self._apart = apart
        self._script = Path(__file__).with_name(script)
        self._crews: list[Crew] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._folder = tempfile.TemporaryDirectory(prefix="crews-")

    def __enter__(self) -> Self:
        try:
            self._start()
            for crew in self._crews:
                try:
                    crew.join()
                    self.there.append(crew)
                except Missing as reason:
                    self.missing[crew.setup] = str(reason)
        except BaseException:
            self._end()
            raise
        return self

    @property
    def pids(self) -> list[int]:
        """Of the processes that were started; with `apart` those of the contestants."""
        return [process.pid for process in self._processes]

    def _start(self) -> None:
        ends: list[Connection] = []
        for i, setup in enumerate(self._setups):
            pipes = [multiprocessing.Pipe() for _ in range(setup.processes)]
            ends += [theirs for _, theirs in pipes]
            meeting = Path(self._folder.name, f"meeting-{i}")
            self._crews.append(Crew(setup, [ours for ours, _ in pipes], meeting))
        for group in [[end] for end in ends] if self._apart else [ends]:
            files = [end.fileno() for end in group]
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, str(self._script), *map(str, files)],
                    stdin=subprocess.DEVNULL,
                    pass_fds=files,
                    start_new_session=True,  # Ctrl-C is for the parent, who ends them all
                )
            )
        for end in ends:
            end.close()

    def _end(self) -> None:
        for crew in self._crews:
            crew.close()
        for process in self._processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # an orderly end takes torch a second
            process.wait()
        self._folder.cleanup()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()
