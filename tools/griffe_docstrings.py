"""What mkdocstrings cannot know about this package's sources; `mkdocs.yml` names this extension."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Literal blocks as Markdown has them."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Takes the colons away that introduce code, or one of two where they end a sentence.

        (In reStructuredText and in `help()` they stand there; Markdown would print them.)
        """
        if obj.docstring is not None:
            text = re.sub(r"^ *::$\n", "", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = re.sub(r" ?::$", ":", text, flags=re.MULTILINE)
