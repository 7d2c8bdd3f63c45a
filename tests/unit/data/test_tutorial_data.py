"""The samples that docs/tutorials/your_data.md shows are read as the page says, and the options of multiple-choice data reach the model."""

import re
from pathlib import Path

import pytest

from tests.helpers import released_data as data
from tests.helpers.read_documents import read_source

PAGE = (Path(__file__).parents[3] / "docs/tutorials/your_data.md").read_text()

# Heading -> the task and, line by line, the documents that a sample may be.
SHOWN = {
    "Text": (
        "lm",
        [
            ("[A document.<eos>]",),
            ("<user>How many?<assistant>[Three.<eos>]",),
            ("<user>Translate.\nrot<assistant>[red<eos>]",),
        ],
    ),
    "Images and captions": (
        "t2i",
        [
            ("<user>[a red square]<assistant><make red>[<eos>]",),
            (
                "<user>[a green square]<assistant><make green>[<eos>]",
                "<user>[square 2, all green]<assistant><make green>[<eos>]",
            ),
        ],
    ),
    "Questions about images": (
        "mmu",
        [
            ("<user><see red>What colour is it?<assistant>[Red.<eos>]",),
            ("<user><see red><see blue>Which is red?<assistant>[The first.<eos>]",),
            ("<user><see red>What is it?<assistant>[A square.<eos>]",),
        ],
    ),
    "Text among images: `segments`": (
        "interleaved",
        [
            ("[A square: ]<see red>[ and its copy in blue: ]<make blue>[<eos>]",),
            ("<user><see red>Make it blue.<assistant><make blue>[<eos>]",),
        ],
    ),
}


def samples_below(heading: str) -> list[str]:
    """Lines of JSON between a heading of the third level and the next one."""
    section = re.search(rf"^### {re.escape(heading)}\n(.*?)(?=^##)", PAGE, re.MULTILINE | re.DOTALL)
    assert section, heading
    blocks = re.findall(r"^```json\n(.*?)^```", section[1], re.MULTILINE | re.DOTALL)
    return "".join(blocks).splitlines()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "photos").mkdir()
    for name, colour in (
        ("a.jpg", "red"),
        ("b.jpg", "blue"),
        ("photos/0001.jpg", "red"),
        ("photos/0002.jpg", "green"),
    ):
        (tmp_path / name).write_bytes(data.picture(colour, "JPEG"))
    return tmp_path


@pytest.mark.parametrize("heading", SHOWN)
def test_every_sample_of_the_page_is_the_document_that_it_should_be(heading, folder):
    task, expected = SHOWN[heading]
    lines = samples_below(heading)
    assert len(lines) == len(expected)
    for line, documents in zip(lines, expected, strict=True):
        (folder / "mine.jsonl").write_text(line + "\n")
        source = f'[[data.sources]]\nname = "mine"\ntask = "{task}"\nformat = "jsonl"\npath = "FOLDER/mine.jsonl"'
        (found,) = read_source(folder, source)
        assert found in documents


def test_options_of_multiple_choice_stand_below_the_question(folder):
    data.mmmu(folder)
    (keys,) = re.findall(r"^keys = (\{image = \"image_1\", .*\})$", PAGE, re.MULTILINE)
    source = (
        '[[data.sources]]\nname = "mmmu"\ntask = "mmu"\nformat = "parquet"\npath = "FOLDER/Toy"'
    )
    first, *_ = read_source(folder, f"{source}\nkeys = {keys}")
    options = "['red', 'green', 'blue', 'other']"
    assert first == f"<user>What colour is square 0? <see red>{options}<assistant>[A<eos>]"
