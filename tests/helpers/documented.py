"""Every command that a document of this repository names, as words.

A document is a page (Markdown), a config or script with comments at its head, or a program with a docstring. A command is a line of
a code block, a span of code with an option, or, in comments and docstrings, a line that is indented or comes after a label such as
``Command:``. A trailing ``\\`` goes on in the next line; what comes after three spaces, or after ``#``, is a remark. Lines with ``[``
or ``...`` describe a form and are left out. LOG.md is left out too: an entry holds for the commit that it names.
"""

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from symbiotic_titan.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[2]

PAGES = ("*.md", "docs/**/*.md", "benchmarks/*.md")
CONFIGS = ("train_configs/**/*.toml", "docs/examples/*.toml")
SCRIPTS = ("run_train.sh", "tests/run.sh", "tools/setup_env.sh", "tools/gpu_check.sh")
PROGRAMS = ("symbiotic_titan/cli.py", "symbiotic_titan/commands/*.py", "tools/**/*.py", "tests/**/*.py")  # fmt: skip

_LABEL = re.compile(r"[A-Z]\w+:\s+(?:add (?=--))?")
_ASSIGNMENT = re.compile(r"([A-Z][A-Z_]*)=(\S*?);?")
_REMARK = re.compile(r"\s{3,}\S.*|\s+# .*|\s*$")
_FORM = re.compile(r"\[|\.\.\.|…")
_FILE = re.compile(r"(?:\./)?(?:tools|tests|\.ci)/[\w./]*\w|(?:\./)?run_train\.sh")
_OUTPUT = re.compile(r"outputs/|\$out/")
_FENCED = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
_PLACEHOLDER = re.compile(r"\b[A-Z_]{2,}\b(?!=)")


@dataclass(frozen=True)
class Command:
    """``words[0]`` is a path in the repository, ``symbiotic`` (then a subcommand follows), ``-m MODULE`` or an installed program."""

    document: str
    line: int
    environment: tuple[tuple[str, str], ...]
    words: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join([*(f"{key}={value}" for key, value in self.environment), *self.words])

    @property
    def place(self) -> str:
        return f"{self.document}:{self.line}"

    @property
    def is_ours(self) -> bool:
        """Whether it trains or is a subcommand of ``symbiotic``."""
        return self.words[0] in ("run_train.sh", "symbiotic")

    def is_part_of(self, other: "Command") -> bool:
        """Whether ``other`` is the same with as many or more options; all folders below ``outputs`` are equal."""
        ours, theirs = (["OUT" if _OUTPUT.match(w) else w for w in c.words] for c in (self, other))
        return (
            self.words[0] == other.words[0]
            and self.environment == other.environment
            and set(ours) <= set(theirs)
        )


def parse(text: str) -> tuple[tuple[tuple[str, str], ...], tuple[str, ...]] | None:
    """(environment, words) where ``text`` runs something of this repository."""
    try:
        words = shlex.split(text)
    except ValueError:  # a sentence with an apostrophe
        return None
    environment = []
    words = words[1:] if words[:1] == ["$"] else words
    while words and (found := _ASSIGNMENT.fullmatch(words[0])):
        environment.append((found[1], found[2]))
        words = words[1:]
    program = _program(words)
    return None if program is None else (tuple(environment), tuple(program))


def _program(words: list[str]) -> list[str] | None:
    """The command without its interpreter and the environment's folder; None where it is not ours."""
    if not words:
        return None
    first, *rest = words[0].removeprefix("./").removeprefix(".venv/bin/"), *words[1:]
    if first in ("bash", "python"):
        if rest[:1] == ["-m"] and len(rest) > 1:
            return ["-m", *rest[1:]]
        return _program(rest) if rest and _FILE.fullmatch(rest[0]) else None
    if first == "symbiotic":
        return [first, *rest] if rest else None
    if first == "torchrun" or (first in ("pip", "pre-commit", "tensorboard") and rest):
        return [first, *rest] if words[0] != first or first == "torchrun" else None
    if not _FILE.fullmatch(words[0]) or not (ROOT / first).is_file():
        return None
    name = Path(first).stem.replace("_", "-")
    is_old_path = first.startswith("tools/") and "/" not in first[6:] and name in COMMANDS
    return ["symbiotic", name, *rest] if is_old_path else [first, *rest]


def _commands(document: str, lines: Iterator[tuple[int, str]]) -> Iterator[Command]:
    """Of lines that are commands if they begin like one."""
    variables: dict[str, str] = {}
    joined, start = "", 0
    for number, text in lines:
        joined, start = (f"{joined} {text.strip()}", start) if joined else (text.strip(), number)
        if joined.endswith("\\"):
            joined = joined.rstrip("\\").rstrip()
            continue
        whole, joined = joined, ""
        assigned = [_ASSIGNMENT.fullmatch(word) for word in whole.split()]
        if assigned and all(assigned):
            variables |= {found[1]: found[2] for found in assigned if found}
            continue
        whole = _REMARK.sub("", whole)
        for name, value in variables.items():
            whole = re.sub(rf"\${name}\b", value, whole)
        if not _FORM.search(whole) and (parsed := parse(whole)):
            yield Command(document, start, *parsed)


def _page_lines(text: str) -> Iterator[tuple[int, str]]:
    """Code blocks of a Markdown page that have no other language than the shell's, then spans of code with an option."""
    for block in _FENCED.finditer(text):
        if block[1] in ("", "bash"):
            first = text.count("\n", 0, block.start(2)) + 1
            yield from enumerate(block[2].splitlines(), first)
    plain = _FENCED.sub(lambda block: "\n" * block[0].count("\n"), text)
    for number, line in enumerate(plain.splitlines(), 1):
        if line.startswith("    "):
            yield number, line
    for span in re.finditer(r"`([^`]+)`", plain):
        words = " ".join(span[1].split())
        if " -" in words and not _PLACEHOLDER.search(words):
            yield plain.count("\n", 0, span.start()) + 1, words


def _indented(lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Of a comment or docstring, lines that are indented or labelled, without the label."""
    for number, line in lines:
        text = line.strip()
        label = _LABEL.match(text)
        if label or line.startswith("  "):
            yield number, text[label.end() :] if label else text


def _comment_lines(text: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.startswith("#"):
            return
        yield number, line.removeprefix("#").removeprefix(" ")


def _string_lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines of the docstring of a Python file, and of texts that it gives a name: its usage."""
    for node in ast.parse(text).body:
        value = getattr(node, "value", None)
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            yield from enumerate(value.value.splitlines(), node.lineno)


def commands_of(document: str, text: str) -> list[Command]:
    """In the order in which the document has them."""
    if document.endswith(".md"):
        lines = _page_lines(text)
    elif document.endswith(".py"):
        lines = _indented(_string_lines(text))
    else:
        lines = _indented(_comment_lines(text))
    return sorted(_commands(document, lines), key=lambda command: command.line)


@cache
def documented() -> tuple[Command, ...]:
    """All commands of all documents, pages first."""
    found: list[Command] = []
    for pattern in (*PAGES, *CONFIGS, *SCRIPTS, *PROGRAMS):
        for path in sorted(ROOT.glob(pattern)):
            document = str(path.relative_to(ROOT))
            if document not in ("LOG.md",) and not document.startswith("tests/fixtures"):
                found += commands_of(document, path.read_text(encoding="utf-8"))
    return tuple(found)


@cache
def commands_of_ci() -> tuple[Command, ...]:
    """Of .ci/run. Its function ``symbiotic`` takes several commands with ``--`` between them."""
    text = (ROOT / ".ci/run").read_text(encoding="utf-8").replace("\\\n", " ")
    found: list[Command] = []
    for number, line in enumerate(text.splitlines(), 1):
        whole = re.split(r" *(?:>|&$|&>)", line.replace('"$python"', "python"))[0]
        parts = re.split(r"\s+--\s+", whole)
        words = [parts[0], *(f"symbiotic {part}" for part in parts[1:])]
        words += re.findall(r"\$\((tools/[^)]*)\)", line)
        found += [Command(".ci/run", number, *parsed) for word in words if (parsed := parse(word))]
    return tuple(found)
