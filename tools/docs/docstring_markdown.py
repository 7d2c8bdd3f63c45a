"""Docstrings as Markdown: lists, examples and tables of plain text keep their lines, and no character of them becomes markup."""

import inspect
import re
import textwrap

_CODE_SPAN = re.compile(r"(`+[^`]+`+)")
# ``--section.key``, not in quotes.
_OPTION = re.compile(r"(?<![\w'\"{/-])--[a-z][\w.-]*\w")
_BULLET = re.compile(r"\s*[-*] ")
# ``name: what it is``, ``name    what it is``, ``name (B, T) int64  what it is``; several names share a line with commas.
_NAMED = re.compile(
    r"(?P<names>[a-z_]\w*(?:, [a-z_]\w*)*)(?::\s+| {2,}| (?=\([A-Z]))(?P<text>\S.*)"
)
# Columns that are aligned with spaces, below a line's beginning.
_ALIGNED = re.compile(r"\S {3,}\S")
_LABEL = re.compile(r"Examples?:\s+(?=\S)")


def escaped(text: str) -> str:
    """``text`` with, outside its code spans, options as code and the characters that begin tags as entities."""
    parts = _CODE_SPAN.split(text)
    for number in range(0, len(parts), 2):
        plain = parts[number].replace("&", "&amp;").replace("<", "&lt;")
        parts[number] = _OPTION.sub(r"`\g<0>`", plain)
    return "".join(parts)


def one_line(text: str) -> str:
    """``text`` on one line, for a cell of a table."""
    return escaped(" ".join(text.split())).replace("|", "\\|")


def named_items(lines: list[str]) -> list[tuple[str, str]]:
    """(names, text) of each item, where the paragraph is a list of names with explanations; else nothing."""
    if not lines or not _NAMED.match(lines[0]):
        return []
    items: list[tuple[str, str]] = []
    for line in lines:
        found = _NAMED.match(line)
        if found:
            # A column of shapes and types comes before the explanation.
            columns = re.split(r" {2,}", found["text"].strip(), maxsplit=1)
            items.append((found["names"], ": ".join(columns)))
        else:
            names, text = items[-1]
            items[-1] = (names, f"{text} {line.strip()}")
    is_column = re.match(r"\w+ {4,}", lines[0]) is not None
    return items if len(items) > 1 or is_column else []


def items_list(items: list[tuple[str, str]]) -> str:
    return "\n".join(f"- `{names}`: {escaped(text)}" for names, text in items)


def code_block(lines: list[str]) -> str:
    return "\n".join(["```text", *textwrap.dedent("\n".join(lines)).splitlines(), "```"])


def paragraph(lines: list[str]) -> str:
    """One paragraph: a list of named things, a bulleted list after an introduction, an example, or plain text."""
    if items := named_items(lines):
        return items_list(items)
    if label := _LABEL.match(lines[0]):
        first = " " * label.end() + lines[0][label.end() :]
        return f"{label[0].strip()}\n\n{code_block([first, *lines[1:]])}"
    indented = [number for number, line in enumerate(lines) if line.startswith("  ")]
    if indented and indented == [*range(1, len(lines))] and not _ALIGNED.search(lines[0]):
        return f"{escaped(lines[0])}\n\n{code_block(lines[1:])}"
    if len(indented) == len(lines) or any(map(_ALIGNED.search, lines)):
        return code_block(lines)
    bullets = [number for number, line in enumerate(lines) if _BULLET.match(line)]
    if bullets:
        before, after = lines[: bullets[0]], lines[bullets[0] :]
        parts = [escaped("\n".join(part)) for part in (before, after) if part]
        return "\n\n".join(parts)
    return escaped("\n".join(line.strip() for line in lines))


def as_markdown(docstring: str) -> str:
    """A whole docstring, paragraph by paragraph."""
    text = inspect.cleandoc(docstring).strip()
    return "\n\n".join(paragraph(part.splitlines()) for part in re.split(r"\n\s*\n", text) if part)
