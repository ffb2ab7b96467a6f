"""What mkdocstrings cannot know about this package's sources; `mkdocs.yml` names this extension."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Literal blocks as Markdown has them, and functions that have the name of their module."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Takes the colons away that introduce code, or one of two where they end a sentence.

        (In reStructuredText and in `help()` they stand there; Markdown would print them.)
        """
        if obj.docstring is not None:
            text = re.sub(r"^ *::$\n", "", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = re.sub(r" ?::$", ":", text, flags=re.MULTILINE)

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """A public name is the function, as it is at run time, and not a module of that name."""
        for name in pkg.exports or ():
            member = pkg.members.get(str(name))
            if isinstance(member, griffe.Module) and str(name) in member.members:
                pkg.members[str(name)] = griffe.Alias(str(name), member[str(name)], parent=pkg)
