"""Links from pages to other files of the repository, which work on a code host, and on the site too: the files become pages of it.

A page of ``docs/`` links to ``../benchmarks/x.md`` or ``examples/x.py`` as any Markdown file of the repository does. On the site a linked
Markdown file or a notebook is a page, a program or config is a page with its text, a folder is a list of its files, and an image is copied.
"""

import json
import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
IMAGES = {".png", ".jpg", ".jpeg", ".svg", ".gif", ".webp"}
# Folder -> title and first sentences of its list.
FOLDERS = {
    "benchmarks": (
        "Measurements",
        "Every page says on which hardware, at which commit and by which command its figures were made.",
    )
}
_LANGUAGES = {".py": "python", ".toml": "toml", ".sh": "bash", ".json": "json", ".yaml": "yaml"}
# Code is read over; a link's text may hold code.
_TOKENS = re.compile(
    r"^(?P<fence> *(?:```+|~~~+))[^\n]*\n.*?^(?P=fence)[^\n]*$"
    r"|(?P<before>!?\[(?:[^\[\]]|\[[^\]]*\])*\]\()(?P<target>[^()\s]+)(?P<after>(?:\s+\"[^\"]*\")?\))"
    r"|(?P<ticks>`+).+?(?<!`)(?P=ticks)(?!`)",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Target:
    """Where a link leads: a path in the repository, and what comes after ``#``, with it."""

    path: str
    anchor: str


def target_of(link: str, origin: str) -> Target | None:
    """The file that ``link`` means in the file ``origin``, if it exists in the repository."""
    name, sharp, anchor = link.partition("#")
    if not name or re.match(r"[a-z]+:|/", name):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), name))
    is_outside = path == ".." or path.startswith("../")
    return None if is_outside or not (ROOT / path).exists() else Target(path, sharp + anchor)


def links_in(text: str) -> Iterator[str]:
    """The targets of all links and images of a Markdown text."""
    for found in _TOKENS.finditer(text):
        if found["target"]:
            yield found["target"]


def is_page(path: str, excluded: tuple[str, ...]) -> bool:
    """Whether mkdocs has the file already."""
    return path.startswith("docs/") and not path.startswith(excluded) and (ROOT / path).is_file()


def site_path(path: str, excluded: tuple[str, ...] = ()) -> str:
    """Where the site's sources have the file or folder ``path`` of the repository."""
    if is_page(path, excluded):
        return path.removeprefix("docs/")
    if path == "README.md":
        return "index.md"
    suffix = posixpath.splitext(path)[1]
    if (ROOT / path).is_dir():
        own = "" if path.startswith("benchmarks") else "files/"
        return f"{own}{path}/index.md"
    if suffix in IMAGES or path.startswith("benchmarks/") or "/" not in path and suffix == ".md":
        return path
    return f"files/{path}" if suffix == ".md" else f"files/{path}.md"


def rewritten(text: str, origin: str, source: str, excluded: tuple[str, ...] = ()) -> str:
    """``text`` of the repository's file ``origin`` with links that hold where the site's sources have it, at ``source``."""

    def replaced(found: re.Match[str]) -> str:
        target = target_of(found["target"], origin) if found["target"] else None
        if target is None:
            return found[0]
        path = posixpath.relpath(site_path(target.path, excluded), posixpath.dirname(source) or ".")
        return f"{found['before']}{path}{target.anchor}{found['after']}"

    return _TOKENS.sub(replaced, text)


def folder_text(path: str) -> str:
    """A page that lists a folder. Its links are those of a file in the folder."""
    shown = [p for p in sorted((ROOT / path).iterdir()) if not p.name.startswith(("_", "."))]
    title, about = FOLDERS.get(path, (path, ""))
    lines = [f"- [{title_of(p)}]({p.name}{'/' if p.is_dir() else ''})" for p in shown]
    return "\n".join([f"# {title}", "", *([about, ""] if about else []), *lines, ""])


def title_of(path: Path) -> str:
    """The first heading of a page, or the file's name."""
    if path.suffix == ".md":
        heading = re.search(r"^# (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        if heading:
            return heading[1]
    return f"`{path.name}{'/' if path.is_dir() else ''}`"


def code_text(path: str) -> str:
    """A page with the text of a program or config."""
    code = (ROOT / path).read_text(encoding="utf-8")
    language = _LANGUAGES.get(posixpath.splitext(path)[1], "text")
    hidden = "---\nsearch:\n  exclude: true\n---\n"
    return f"{hidden}# {path}\n\n````` {{.{language} linenums=1}}\n{code}\n`````\n"


def notebook_text(path: str) -> str:
    """A page with the cells of a notebook: text as it is, code as code."""
    cells = json.loads((ROOT / path).read_text(encoding="utf-8"))["cells"]
    texts = [("".join(cell["source"]), cell["cell_type"] == "code") for cell in cells]
    return "\n\n".join(f"```python\n{text}\n```" if code else text for text, code in texts) + "\n"


def source_text(path: str) -> str:
    """The Markdown of the page of ``path``, a file or folder outside the site's own pages."""
    if (ROOT / path).is_dir():
        return folder_text(path)
    if path.endswith(".ipynb"):
        return notebook_text(path)
    return (ROOT / path).read_text(encoding="utf-8") if path.endswith(".md") else code_text(path)


def linked_from(
    pages: list[str], excluded: tuple[str, ...] = (), also: tuple[str, ...] = ()
) -> list[str]:
    """Paths outside the site's own pages that are to be part of it: ``also``, and what ``pages`` link to, and what that links to."""
    found: dict[str, None] = {}
    waiting = [*pages, *also]
    found.update(dict.fromkeys(also))
    while waiting:
        origin = waiting.pop()
        is_text = origin.endswith(".md") or (ROOT / origin).is_dir()
        if not is_text:
            continue
        text = source_text(origin)
        place = f"{origin}/index.md" if (ROOT / origin).is_dir() else origin
        for link in links_in(text):
            target = target_of(link, place)
            if target is None or target.path in found or target.path == "README.md":
                continue
            if not is_page(target.path, excluded):
                found[target.path] = None
                waiting.append(target.path)
    return sorted(found)
