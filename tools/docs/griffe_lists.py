"""Docstrings for the API pages: griffe reads Google's style, and lists of names with explanations become lists of Markdown."""

import re
from typing import Any

from docstring_markdown import paragraph
from griffe import Class, Extension, Function, Module, Object

_SECTION = re.compile(r"[A-Z]\w+:$")


def with_lists(docstring: str) -> str:
    """``docstring`` with lists and tables of plain text as Markdown. Sections such as ``Raises:`` and code stay as they are."""
    parts = []
    for part in re.split(r"\n\s*\n", docstring):
        lines = part.splitlines()
        is_kept = not lines or _SECTION.match(lines[0]) or lines[0].startswith(" ")
        parts.append(part if is_kept else paragraph(lines))
    return "\n\n".join(parts)


class NamedLists(Extension):
    """Runs on every module, class and function that is documented."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if isinstance(obj, Module | Class | Function) and obj.docstring is not None:
            obj.docstring.value = with_lists(obj.docstring.value)
