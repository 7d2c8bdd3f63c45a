"""Links of pages to other files of the repository."""

import pytest
from linked_files import (
    code_text,
    linked_from,
    links_in,
    rewritten,
    site_path,
    source_text,
    target_of,
)

EXCLUDED = ("docs/plans/", "docs/examples/")


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("docs/data.md", "data.md"),
        ("README.md", "index.md"),
        ("SECURITY.md", "SECURITY.md"),
        ("benchmarks", "benchmarks/index.md"),
        ("docs/examples", "files/docs/examples/index.md"),
        ("docs/examples/csv_format.py", "files/docs/examples/csv_format.py.md"),
        ("train_configs/mini.toml", "files/train_configs/mini.toml.md"),
        ("docs/images/mini_pictures.png", "images/mini_pictures.png"),
    ],
)
def test_every_kind_of_file_has_a_place_on_the_site(path, place):
    assert site_path(path, EXCLUDED) == place


def test_links_to_files_of_the_repository_hold_on_the_site():
    text = "[a](../SECURITY.md#x) [`b`](examples/) [c](running.md) ![d](images/mini_pictures.png)"
    assert rewritten(text, "docs/data.md", "data.md", EXCLUDED) == (
        "[a](SECURITY.md#x) [`b`](files/docs/examples/index.md) [c](running.md) ![d](images/mini_pictures.png)"
    )


def test_links_from_a_deeper_page_go_up():
    text = "[a](../../train_configs/mini.toml)"
    source = "reference/api.md"
    assert rewritten(text, f"docs/{source}", source) == "[a](../files/train_configs/mini.toml.md)"


@pytest.mark.parametrize(
    "text",
    [
        "`[a](../SECURITY.md)`",
        "```text\n[a](../SECURITY.md)\n```",
        "[a](https://example.org/SECURITY.md)",
        "[a](#here)",
        "[a](missing.md)",
        "[a](../../outside.md)",
    ],
)
def test_code_and_what_is_no_file_of_ours_stay_as_they_are(text):
    assert rewritten(text, "docs/data.md", "data.md", EXCLUDED) == text


def test_what_a_linked_page_links_to_is_found_too():
    found = linked_from(["docs/extending.md"], EXCLUDED, ("CONTRIBUTING.md",))
    assert {"CONTRIBUTING.md", "LOG.md", "docs/examples", "docs/examples/csv_format.py"} <= {*found}
    assert "docs/evaluation.md" not in found


def test_a_link_outside_the_repository_is_none():
    assert target_of("../../x", "docs/data.md") is None
    assert target_of("../SECURITY.md#a", "docs/data.md").anchor == "#a"


def test_a_program_becomes_a_page_with_one_heading_and_no_links():
    text = code_text("docs/examples/csv_format.py")
    assert text.count("\n# docs/examples/csv_format.py\n") == 1
    assert not list(links_in(text))


def test_a_notebook_is_a_page_of_text_and_code():
    text = source_text("docs/examples/explore_run.ipynb")
    assert text.startswith("# Explore a run\n") and '```python\nRUN = "outputs/debug"\n' in text
    assert text.count("```") % 2 == 0 and "execution_count" not in text
