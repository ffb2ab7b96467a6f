"""What ranks print, but for what gloo of older releases of torch says on stdout when they meet."""

from __future__ import annotations

from typing import TextIO


def printed(out: str) -> str:
    """Without gloo's lines."""
    return "".join(line for line in out.splitlines(keepends=True) if "peer ranks" not in line)


def next_line(stream: TextIO) -> str:
    """The next line that is none of gloo's."""
    while "peer ranks" in (line := stream.readline()):
        pass
    return line
