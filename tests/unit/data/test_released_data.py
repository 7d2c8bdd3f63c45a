"""Released data sets are read as they are, with one table of TOML each; the right documents are written out by hand."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from symbiotic_titan.data.formats.shard import BadSample
from tests.helpers import released_data as data
from tests.helpers import released_pairs as pairs
from tests.helpers.read_documents import read_source


@dataclass(frozen=True)
class Case:
    """A data set, the lines of ``[[data.sources]]`` that read it, and what some of its rows are, by number. A row that may be any
    of several documents (one caption is drawn) has them all."""

    write: Callable[[Path], None]
    source: str
    rows: dict[int, str | tuple[str, ...]]
    num_rows: int = data.ROWS

    @property
    def toml(self) -> str:
        return f'[[data.sources]]\nname = "mine"\n{self.source}'


def captioned(name: str, *captions: str) -> tuple[str, ...]:
    return tuple(f"<user>[{caption}]<assistant><make {name}>[<eos>]" for caption in captions)


CASES = {
    "LLaVA-OneVision": Case(
        data.llava_onevision,
        'task = "mmu"\nformat = "parquet"\npath = "FOLDER/toy/*.parquet"',
        {
            0: "<user><see red>What colour is square 0?<assistant>[It is red.<eos>]",
            1: "<user>What colour is square 1?<assistant>[It is green.<eos>]",
            23: "<user><see black>What colour is square 23?<assistant>[It is black.<eos>]",
        },
    ),
    "VQAv2": Case(
        data.vqav2,
        'task = "mmu"\nformat = "parquet"\npath = "FOLDER/data/*.parquet"\n'
        'keys = {answer = "multiple_choice_answer"}',
        {3: "<user><see yellow>What colour is square 3?<assistant>[yellow<eos>]"},
    ),
    "BLIP3o": Case(
        pairs.blip3o,
        'task = "t2i"\nformat = "webdataset"\npath = "FOLDER/*.tar"',
        {2: captioned("blue", "a blue square")},
    ),
    "text-to-image-2M": Case(
        pairs.text_to_image_2m,
        'task = "t2i"\nformat = "webdataset"\npath = "FOLDER/data_512_2M/*.tar"\n'
        'keys = {caption = "json.prompt"}',
        {1: captioned("green", "a green square")},
    ),
    "img2dataset": Case(
        pairs.img2dataset,
        'task = "t2i"\nformat = "webdataset"\npath = "FOLDER/*.tar"',
        {0: captioned("red", "a red square"), 1: captioned("blue", "a blue square")},
        num_rows=data.ROWS - 1,
    ),
    "Tulu": Case(
        pairs.tulu,
        'task = "lm"\nformat = "parquet"\npath = "FOLDER/data/*.parquet"',
        {
            0: "Be brief.<user>What is 0?<assistant>[It is red.<eos>]",
            1: "<user>What is 1?<assistant>[It is green.<eos>]",
        },
    ),
}


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """Name of a case -> the documents of all its rows; each data set is written and read once."""
    known: dict[str, list[str | BadSample]] = {}

    def reading(name: str) -> list[str | BadSample]:
        if name not in known:
            folder = tmp_path_factory.mktemp("released")
            CASES[name].write(folder)
            known[name] = list(read_source(folder, CASES[name].toml))
        return known[name]

    return reading


@pytest.mark.parametrize("name", CASES)
def test_a_released_data_set_is_read_as_it_is(name, read):
    case, documents = CASES[name], read(name)
    assert len(documents) == case.num_rows
    for row, right in case.rows.items():
        assert documents[row] in (right if isinstance(right, tuple) else (right,))


@pytest.mark.parametrize("name", CASES)
def test_every_row_of_a_released_data_set_is_a_document(name, read):
    assert not [document for document in read(name) if isinstance(document, BadSample)]
