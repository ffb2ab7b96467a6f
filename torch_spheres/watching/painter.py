"""Lines as text for a terminal, by rich: its colours, its widths."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TextIO

from torch_spheres.watching.frame import Line
from torch_spheres.watching.region import Painter

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.segment import Segment

__all__ = ["painter"]


def painter(file: TextIO, without: str) -> Painter:
    """One for this terminal.

    Args:
        file: what will be written to.
        without: how to do without it, for the error's text.

    Raises:
        ImportError: rich is not installed.
    """
    try:
        from rich.console import Console
    except ImportError as error:
        raise ImportError(
            'a live display in a terminal needs rich: pip install "torch_spheres[live]"; '
            f"{without} prints plain lines without it"
        ) from error
    return _RichPainter(Console(file=file, highlight=False, soft_wrap=False))


class _RichPainter:
    def __init__(self, console: Console) -> None:
        from rich.segment import Segment
        from rich.style import Style
        from rich.text import Text

        self._console = console
        self._segment, self._style, self._text = Segment, Style, Text

    def __call__(self, lines: Sequence[Line], unfinished: str, width: int) -> list[str]:
        # rich's table would take ten times as long, which four times a second is too much.
        console = self._console
        console.width = width
        with console.capture() as captured:
            text = self._text.from_ansi(unfinished.expandtabs())
            console.print(text, no_wrap=True, overflow="crop", crop=True)
            console.print(_Segments(self._segments(lines)), end="")
        return captured.get().splitlines()

    def _segments(self, lines: Sequence[Line]) -> Iterable[Segment]:
        for line in lines:
            for text, style in line:
                yield self._segment(text, self._style.parse(style) if style else None)
            yield self._segment.line()


class _Segments:
    """What rich takes for something that it can print."""

    def __init__(self, segments: Iterable[Segment]) -> None:
        self._segments = segments

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterable[Segment]:
        return self._segments
