"""docs/troubleshooting.md quotes messages that the programs have: each stands in a string of the source, with any value where the page has
an ellipsis."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/troubleshooting.md"
SHELL = ("run_train.sh", "tools/setup_env.sh")
ANY = "…"
# Letters of its own that a string must have to count for a whole message.
ENOUGH = 10


def messages(page: str) -> list[str]:
    """Code with a space in it, in the first column of the tables."""
    firsts = re.findall(r"^\| (.+?) \| .* \| .* \|$", page, re.MULTILINE)
    return [code for first in firsts for code in re.findall(r"`([^`]+)`", first) if " " in code]


def strings_of(source: str) -> Iterator[str]:
    """Every string of a Python file, with ``ANY`` for what is filled in."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            yield "".join(p.value if isinstance(p, ast.Constant) else ANY for p in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@cache
def all_strings() -> tuple[str, ...]:
    found: list[str] = []
    for path in (*ROOT.glob("symbiotic_titan/**/*.py"), ROOT / "tools/launch.py"):
        found += strings_of(path.read_text(encoding="utf-8"))
    for name in SHELL:
        text = (ROOT / name).read_text(encoding="utf-8").replace('" \\\n', '"\n')
        found.append(re.sub(r"\$\{[^}]*\}|\$\w+", ANY, re.sub(r'"\n\s+"', " ", text)))
    return tuple(found)


def pattern_of(text: str, anything: str) -> re.Pattern[str]:
    return re.compile(anything.join(map(re.escape, text.split(ANY))), re.DOTALL)


def longest_part(text: str) -> str:
    """Between two values; to look for it first spares most searches."""
    return max(text.split(ANY), key=len)


@cache
def templates() -> tuple[tuple[str, str], ...]:
    """(longest part, text) of the strings with values that have letters enough of their own."""
    texts = [text for text in all_strings() if ANY in text]
    enough = [t for t in texts if len(t.replace(ANY, "").replace(" ", "")) >= ENOUGH]
    return tuple((longest_part(text), text) for text in enough)


def is_said(message: str) -> bool:
    """Whether a string contains the message, or is the message with values."""
    part, wanted = longest_part(message), pattern_of(message, ".*?")
    if any(part in text and wanted.search(text) for text in all_strings()):
        return True
    return any(
        part in message and pattern_of(text, ".+?").fullmatch(message) for part, text in templates()
    )


@pytest.mark.parametrize("message", messages(PAGE.read_text(encoding="utf-8")))
def test_a_message_of_the_page_is_one_that_is_printed(message):
    assert is_said(message)


def test_a_message_that_nothing_prints_is_noticed():
    assert is_said("nothing to do: the run is at step …")
    assert not is_said("nothing to do: the run is at stage …")
    assert not is_said("the flux capacitor … is empty")
