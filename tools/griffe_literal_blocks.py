"""Literal blocks of docstrings as Markdown has them.

The docstrings introduce code with `::`, as reStructuredText does and `help()` shows. Markdown needs
only the indentation, and would print the colons. `mkdocs.yml` names this extension.
"""

from __future__ import annotations

import re
from typing import Any

import griffe


class LiteralBlocks(griffe.Extension):
    """Takes the two colons away, or one of them where they end a sentence."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """For each object that has been read, before its docstring is parsed."""
        if obj.docstring is not None:
            text = re.sub(r"^ *::$\n", "", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = re.sub(r" ?::$", ":", text, flags=re.MULTILINE)
