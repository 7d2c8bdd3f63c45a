"""The documentation site: it builds without a warning, every page and key is on it, and nothing on it leads nowhere or to another host."""

import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest
import yaml

from symbiotic_titan.cli import COMMANDS
from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.config.upstream import settings
from tests.helpers.browser import page_widths
from tests.helpers.built_site import nav_files, pages_of

ROOT = Path(__file__).parents[2]
PHONE = 390  # pixels of a narrow screen


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, str]:
    """Folder of the site, and what the build printed."""
    site = tmp_path_factory.mktemp("docs") / "site"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return site, done.stdout


@pytest.fixture(scope="module")
def pages(built):
    return pages_of(built[0])


@pytest.fixture(scope="module")
def config() -> dict:
    return yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def test_the_site_builds_without_a_warning(built):
    assert not re.findall(r"^(?:WARNING|ERROR).*", built[1], re.MULTILINE)
    assert (built[0] / "search" / "search_index.json").stat().st_size > 10_000


def test_every_page_of_the_folder_is_in_the_navigation(config):
    listed = list(nav_files(config["nav"]))
    found = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    own = {name for name in found if not name.startswith(("plans/", "examples/"))}
    assert len(listed) == len(set(listed))
    assert own <= set(listed)


def test_plans_and_examples_are_no_pages_of_their_own(built):
    assert not (built[0] / "plans").exists()
    assert not (built[0] / "examples").exists()


def test_every_setting_has_its_place(built, pages):
    page = pages[built[0] / "reference" / "settings.html"]
    assert not {name for name, _ in settings(JobConfig)} - page.ids
    for name, setting in settings(JobConfig):
        if setting.row is not None:
            own = {f"{name}.{f.name}" for f in fields(setting.row)}
            assert own <= page.ids, name


def test_refused_settings_say_so(pages, built):
    text = pages[built[0] / "reference" / "settings.html"].text
    row = text[text.index('id="parallelism.tensor_parallel_degree"') :]
    assert "use parallelism.expert_parallel_degree and FSDP" in row[: row.index("</li>")]
    mode = text[text.index('id="activation_checkpoint.mode"') :]
    assert "Refused:" in mode[: mode.index("<h3")] and "memory_budget" in mode[: mode.index("<h3")]


def test_every_subcommand_has_its_place(built, pages):
    page = pages[built[0] / "reference" / "commands.html"]
    assert set(COMMANDS) <= page.ids
    assert {"convert-plan", "generate-image", "suites"} <= page.ids


def test_every_page_has_one_title_and_images_have_texts(pages, built):
    shown = {path: page for path, page in pages.items() if path.name != "404.html"}
    assert not [str(path) for path, page in shown.items() if page.num_titles != 1]
    alts = [(path, alt) for path, page in shown.items() for alt in page.alts]
    assert alts
    assert not [path for path, alt in alts if not alt]


def test_no_page_loads_anything_from_another_host(pages):
    loaded = [link for page in pages.values() for tag, link in page.links if tag != "a"]
    assert loaded
    assert not [link for link in loaded if urlsplit(link).netloc]


def test_no_style_loads_a_font_from_another_host(built):
    styles = [path.read_text(encoding="utf-8") for path in built[0].rglob("*.css")]
    assert styles
    assert not [
        found for text in styles for found in re.findall(r"url\([\"']?(?:https?:)?//", text)
    ]


def test_every_link_leads_to_a_page_and_a_place_on_it(pages, built):
    dead = []
    for path, page in pages.items():
        for _, link in page.links:
            address, anchor = urldefrag(link)
            # A page of errors is served at any address, so its links begin at the root of a server.
            if urlsplit(link).scheme or urlsplit(link).netloc or path.name == "404.html":
                continue
            target = (path.parent / unquote(address)).resolve() if address else path
            target = target / "index.html" if target.is_dir() else target
            is_found = target.is_file()
            if is_found and anchor and not anchor.startswith("__"):
                is_found = target not in pages or unquote(anchor) in pages[target].ids
            if not is_found:
                dead.append(f"{path.relative_to(built[0])}: {link}")
    assert not dead


@pytest.mark.slow
def test_no_page_is_wider_than_a_phone(pages, tmp_path):
    shown = [path for path in pages if path.name != "404.html"]
    widths = page_widths(shown, PHONE, tmp_path)
    assert not {name: width for name, width in widths.items() if width > PHONE}
