"""The file map of CONTRIBUTING.md: the rooms of the package, floor by floor as ``test_layout.FLOORS`` has them, then the other folders.

The map is the fenced block below the heading "File map"; a line is a path from the repository's root and what it is for.
"""

import re
from pathlib import Path

from tests.contract.test_layout import FLOORS
from tests.helpers.structure import PACKAGE, ROOT


def read_map(page: str) -> dict[str, str]:
    """Path -> what the map says about it."""
    block = re.search(r"^#+ File map\s*\n.*?^```\w*\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert block, "CONTRIBUTING.md has no fenced block below a heading 'File map'"
    lines = [line.split(maxsplit=1) for line in block[1].splitlines() if line.strip()]
    return {line[0]: line[1] if len(line) > 1 else "" for line in lines}


def mapped() -> dict[str, str]:
    return read_map((ROOT / "CONTRIBUTING.md").read_text())


def path_of(room: str) -> str:
    path = f"{PACKAGE}/{room.replace('.', '/')}"
    return f"{path}/" if (ROOT / path).is_dir() else f"{path}.py"


def test_the_package_is_mapped_floor_by_floor():
    floors = {path_of(room): words for floor in FLOORS for room, words in floor.items()}
    rooms = {path: words for path, words in mapped().items() if path.startswith(PACKAGE)}
    assert list(rooms.items()) == list(floors.items())


def test_every_folder_of_the_repository_is_on_the_map():
    found = {Path(name).parts[0] for name in mapped()}
    folders = {path.parent.relative_to(ROOT).parts[0] for path in ROOT.glob("*/**/*.py")}
    assert not {f for f in folders if not f.startswith(".")} - found - {"outputs", "build"}


def test_the_map_names_nothing_that_does_not_exist():
    missing = [
        path
        for path in mapped()
        if not (ROOT / path).exists() or path.endswith("/") != (ROOT / path).is_dir()
    ]
    assert not missing


def test_every_line_of_the_map_says_what_the_path_is_for():
    assert not [path for path, words in mapped().items() if not words]
