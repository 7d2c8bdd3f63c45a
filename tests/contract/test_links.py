"""Links between the repository's pages hold on a code host: the file exists, and so does the heading."""

import re
from pathlib import Path

import pytest
from linked_files import links_in

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/*.md")
    for path in ROOT.glob(pattern)
    if path.name != "LOG.md"
)
_FENCE = re.compile(r"^ *(```+|~~~+).*?^ *\1", re.MULTILINE | re.DOTALL)


def anchors_of(text: str) -> set[str]:
    """What a code host calls the headings of a page."""
    found: list[str] = []
    for heading in re.findall(r"^#{1,6} +(.+?)(?: +#+)? *$", _FENCE.sub("", text), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        found.append(slug if slug not in found else f"{slug}-{found.count(slug)}")
    return set(found)


def dead_links(page: Path, root: Path = ROOT) -> list[str]:
    dead = []
    for link in links_in(page.read_text(encoding="utf-8")):
        name, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = page.parent / name if name else page
        # Most of the headings of the reference are made when the site is built, which checks links to them.
        is_generated = target.parent == root / "docs" / "reference"
        is_found = target.exists() and root in target.resolve().parents
        if is_found and anchor and target.suffix == ".md" and not is_generated:
            is_found = anchor in anchors_of(target.read_text(encoding="utf-8"))
        if not is_found:
            dead.append(link)
    return dead


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_of(page):
    assert not dead_links(page)


def test_a_dead_link_is_seen(tmp_path):
    page = tmp_path / "a.md"
    page.write_text("# One & two\n[x](b.md) [y](#one--two) [z](#three) `[code](c.md)`\n")
    assert dead_links(page, tmp_path.resolve()) == ["b.md", "#three"]
