"""Lines as text for a terminal: rich knows its colours, and how wide any text is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

from torch_spheres.watching.frame import Line
from torch_spheres.watching.region import Painter

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

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
        from rich.text import Text

        self._console = console
        self._text = Text
        self._escapes: dict[str, tuple[str, str]] = {"": ("", "")}

    def __call__(self, lines: Sequence[Line], unfinished: str, width: int) -> list[str]:
        # rich's table would take twenty times as long, which four times a second is too much: rich
        # is asked once for each style, and for text that is not ours.
        first = self._cropped(unfinished, width) if unfinished else ""
        return [first, *(self._line(line, width) for line in lines)]

    def _line(self, line: Line, room: int) -> str:
        parts = []
        for text, style in line:
            if style not in self._escapes:
                self._escapes[style] = self._ask(style)
            before, after = self._escapes[style]
            parts.append(f"{before}{text[:room]}{after}")
            room -= len(text)  # characters are one column wide, as all of ours are
            if room <= 0:
                break
        return "".join(parts)

    def _ask(self, style: str) -> tuple[str, str]:
        before, _, after = self._render(self._text("x", style=style)).partition("x")
        return before, after

    def _cropped(self, text: str, width: int) -> str:
        self._console.width = width
        return self._render(self._text.from_ansi(text.expandtabs()))

    def _render(self, text: Text) -> str:
        with self._console.capture() as captured:
            self._console.print(text, no_wrap=True, overflow="crop", crop=True)
        return captured.get().rstrip("\n")
