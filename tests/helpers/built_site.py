"""What the tests of the documentation site read of a page of HTML."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

# Attribute of a tag -> it loads or links to what stands there.
_REFERENCES = {"a": "href", "link": "href", "img": "src", "script": "src"}


@dataclass
class BuiltPage(HTMLParser):
    """ids: of all elements. links: (tag, address). headings: number of h1. alts: of images, None where one has none."""

    text: str
    ids: set[str] = field(default_factory=set)
    links: list[tuple[str, str]] = field(default_factory=list)
    num_titles: int = 0
    alts: list[str | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if values.get("id"):
            self.ids.add(str(values["id"]))
        self.num_titles += tag == "h1"
        if tag == "img":
            self.alts.append(values.get("alt"))
        address = values.get(_REFERENCES.get(tag, ""))
        if address:
            self.links.append((tag, address))


def pages_of(site: Path) -> dict[Path, BuiltPage]:
    return {
        path: BuiltPage(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))
    }


def nav_files(entries: list) -> Iterator[str]:
    """The files of a ``nav`` of mkdocs.yml."""
    for entry in entries:
        for value in entry.values():
            if isinstance(value, str):
                yield value
            else:
                yield from nav_files(value)
