"""What mkdocs.yml adds to mkdocs: the generated references, and the linked files of the repository as pages of the site.

A page holds ``<!-- generated: settings -->`` where a reference stands; on a code host only the text around it is seen.
"""

import re
from collections.abc import Callable
from typing import Any

from commands_page import commands_markdown
from linked_files import IMAGES, ROOT, linked_from, rewritten, site_path, source_text
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page
from settings_page import settings_markdown

GENERATED: dict[str, Callable[[], str]] = {
    "settings": settings_markdown,
    "commands": commands_markdown,
}
# Part of the site whether or not a page links to them.
ALWAYS = ("benchmarks", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
EXCLUDED = ("docs/plans/", "docs/examples/")  # as exclude_docs of mkdocs.yml

_MARKER = re.compile(r"^<!-- generated: (\w+) -->$", re.MULTILINE)


def origins(files: Files) -> dict[str, str]:
    """Source of a page -> the file of the repository that it is."""
    pages = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    outside = linked_from(pages, EXCLUDED, ALWAYS)
    return {site_path(path, EXCLUDED): path for path in [*pages, *outside]}


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    for source, path in origins(files).items():
        if files.get_file_from_path(source) is not None:
            continue
        if any(path.endswith(suffix) for suffix in IMAGES):
            shown = InclusionLevel.INCLUDED
            files.append(
                File.generated(config, source, abs_src_path=str(ROOT / path), inclusion=shown)
            )
            continue
        origin = f"{path}/index.md" if (ROOT / path).is_dir() else path
        text = rewritten(source_text(path), origin, source, EXCLUDED)
        level = InclusionLevel.NOT_IN_NAV
        files.append(File.generated(config, source, content=text, inclusion=level))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Of the site's own pages: links to other files of the repository, then what is generated."""
    if page.file.generated_by is not None:
        return markdown
    source = page.file.src_uri
    text = rewritten(markdown, f"docs/{source}", source, EXCLUDED)
    return _MARKER.sub(lambda found: GENERATED[found[1]](), text)


def on_page_context(context: dict[str, Any], *, page: Page, config: MkDocsConfig, nav: Any) -> None:
    """Hundreds of keys would fill the table of contents: it lists the sections, and the search finds the keys."""
    if page.file.src_uri == "reference/settings.md":
        for top in page.toc:
            for section in top.children:
                section.children = []
