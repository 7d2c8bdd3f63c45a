"""Every command in the code blocks of the README and of docs/ starts a program that exists, on configs that exist.

tests/integration/test_documented_commands.py runs them.
"""

import os
import re
import shlex
from pathlib import Path

import pytest

from symbiotic_titan.cli import COMMANDS

ROOT = Path(__file__).parents[2]
SYMBIOTIC = ".venv/bin/symbiotic"
OURS = ("./", "tools/", "tests/", SYMBIOTIC)
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands(markdown: str) -> list[list[str]]:
    """Words of every command line in fenced blocks that runs something of ours; assignments in front are kept."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", markdown, re.MULTILINE | re.DOTALL)
    text = "".join(blocks).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in text.splitlines() if is_command(line)]
    return [[word for word in line if word != "$"] for line in lines]


def is_command(line: str) -> bool:
    """Whether the first word, after ``$``, assignments and a Python, is a path of ours."""
    words = [w for w in line.split() if w != "$" and not re.match(r"[A-Z_]+=", w)]
    if words and words[0].rpartition("/")[2].startswith("python"):
        words = words[1:]
    # Lines of the file map name a folder's files with nothing else but words: a path and a sentence is no command.
    return bool(words) and words[0].startswith(OURS) and not re.match(r"\S+ {2,}[A-Za-z]", line)


def problems(words: list[str]) -> list[str]:
    """What is wrong with one command."""
    found = []
    program = next(w for w in words if w.startswith(OURS))
    is_interpreted = any(w.rpartition("/")[2].startswith("python") for w in words)
    if program == SYMBIOTIC:
        found += [f"{name}: no such subcommand" for name in words[1:2] if name not in COMMANDS]
    elif not (ROOT / program).is_file():
        found.append(f"{program}: no such file")
    elif not is_interpreted and not os.access(ROOT / program, os.X_OK):
        found.append(f"{program}: not executable")
    for word in words:
        path = word.partition("=")[2] or word
        if path.startswith(("train_configs/", "docs/")) and not (ROOT / path).is_file():
            found.append(f"{path}: no such config")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_of_a_page_name_existing_programs_and_configs(page):
    listed = commands(page.read_text(encoding="utf-8"))
    assert not [f"{' '.join(words)}: {p}" for words in listed for p in problems(words)]


def test_pages_that_are_about_commands_have_some():
    for name, least in (("data.md", 5), ("released_models.md", 4), ("concepts/method.md", 5)):
        assert len(commands((ROOT / "docs" / name).read_text(encoding="utf-8"))) >= least, name


def test_the_readme_begins_with_the_main_job_and_the_tests():
    listed = commands((ROOT / "README.md").read_text(encoding="utf-8"))
    assert listed[:2] == [["./run_train.sh"], ["tests/run.sh"]]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("./run_nothing.sh", "./run_nothing.sh: no such file"),
        ("$ NGPU=2 tools/nothing.py --x 1  # two", "tools/nothing.py: no such file"),
        (
            "CONFIG_FILE=train_configs/no.toml ./run_train.sh",
            "train_configs/no.toml: no such config",
        ),
        (".venv/bin/python tools/nothing.py", "tools/nothing.py: no such file"),
        (".venv/bin/symbiotic nothing --x 1", "nothing: no such subcommand"),
        ("tests/conftest.py", "tests/conftest.py: not executable"),
    ],
)
def test_a_wrong_command_is_noticed(line, problem):
    (words,) = commands(f"text\n```bash\n{line}\n```\n")
    assert problems(words) == [problem]
