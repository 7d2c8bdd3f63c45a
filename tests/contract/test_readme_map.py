"""The README's file map: one line per file at the root of the package, per folder of it, and per tool.

The map is the fenced block below the heading "File map"; a line is a path from the repository's root and what it is for.
"""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def read_map(readme: str) -> dict[str, str]:
    """Path -> what the map says about it."""
    block = re.search(r"^#+ File map\s*\n.*?^```\w*\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    assert block, "README.md has no fenced block below a heading 'File map'"
    lines = [line.split(maxsplit=1) for line in block[1].splitlines() if line.strip()]
    return {line[0]: line[1] if len(line) > 1 else "" for line in lines}


def mapped() -> dict[str, str]:
    return read_map((ROOT / "README.md").read_text())


def test_every_file_and_folder_is_on_the_map():
    files = [*ROOT.glob("symbiotic_titan/*.py"), *ROOT.glob("tools/*.py")]
    folders = [path.parent for path in ROOT.glob("symbiotic_titan/*/__init__.py")]
    expected = {path.relative_to(ROOT).as_posix() for path in files if path.name != "__init__.py"}
    expected |= {path.relative_to(ROOT).as_posix() + "/" for path in folders}
    assert not expected - mapped().keys()


def test_the_map_names_nothing_that_does_not_exist():
    missing = [
        path
        for path in mapped()
        if not (ROOT / path).exists() or path.endswith("/") != (ROOT / path).is_dir()
    ]
    assert not missing


def test_every_line_of_the_map_says_what_the_path_is_for():
    assert not [path for path, words in mapped().items() if not words]
