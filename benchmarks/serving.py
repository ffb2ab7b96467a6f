"""The far side of `crews.py`: a process that does what it is told through a pipe."""

from __future__ import annotations

import gc
import os
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

Make = Callable[[dict[str, Any]], object]
"""Makes a contestant of the order that comes first; its public methods are the commands."""


def serve(pipe: Connection, make: Make) -> None:
    """Answers commands, ``(method, arguments)``, until the pipe is closed.

    An answer is a pair: ``ok`` and what was returned, ``missing`` or ``failed`` and why.
    """
    try:
        contestant = make(pipe.recv())
        pipe.send(("ok", None))
        while True:
            command, arguments = pipe.recv()
            pipe.send(("ok", getattr(contestant, command)(*arguments)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except NotImplementedError as error:
        pipe.send(("missing", str(error)))
    except Exception:  # noqa: BLE001 - the parent raises it
        pipe.send(("failed", traceback.format_exc()))


def main(make: Make, prepare: Callable[[], object]) -> None:
    """Serves the pipe whose file descriptor is given, or each of several in a fork of its own.

    `prepare` imports, before the forks, what all of them would import.
    """
    pipes = [Connection(int(argument)) for argument in sys.argv[1:]]
    if len(pipes) == 1:
        return serve(pipes[0], make)
    prepare()
    gc.freeze()  # or each collection before a measurement goes through all of torch's modules
    children = []
    for mine in pipes:
        child = os.fork()
        if child == 0:
            for pipe in pipes:
                if pipe is not mine:
                    pipe.close()  # so that its end is seen when its own process ends
            return serve(mine, make)
        children.append(child)
    for pipe in pipes:
        pipe.close()
    for child in children:
        os.waitpid(child, 0)
    return None


def kibibytes(path: str) -> dict[str, int]:
    """The lines ``Name: number kB`` of a file, in bytes."""
    found = {}
    for line in Path(path).read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if value.endswith(" kB"):
            found[name] = 1024 * int(value.split()[0])
    return found
