"""Released data sets are read as they are, with one table of TOML each; the right documents are written out by hand."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import pytest

from symbiotic_titan.data.formats.shard import BadSample
from tests.helpers import released_data as data
from tests.helpers import released_pairs as pairs
from tests.helpers.read_documents import read_source

PAGE = Path(__file__).parents[3] / "docs" / "data.md"


@dataclass(frozen=True)
class Case:
    """A data set that docs/data.md has lines of TOML for, and what some of its rows are, by number.

    path, images: ``path`` and ``image_folder`` of the source, in the folder of the data set.
    rows: the document of a row, or the documents that it may be where a text is drawn.
    bad:  reasons of the bad rows; all others are read.
    """

    write: Callable[[Path], None]
    path: str
    rows: dict[int, str | tuple[str, ...]]
    images: str = ""
    bad: dict[int, str] = field(default_factory=dict)
    num_rows: int = data.ROWS


def documented() -> dict[str, str]:
    """Data set -> its lines of TOML, by the table of the page."""
    rows = re.findall(r"^\| (.+?) \| `(\w+)` \| `(\w+)` \|(.*)\|$", PAGE.read_text(), re.MULTILINE)
    return {
        name: "\n".join([f'task = "{task}"', f'format = "{form}"', *re.findall("`(.+?)`", others)])
        for name, task, form, others in rows
    }


def source_of(name: str) -> str:
    """The table of the data set ``name``."""
    lines = documented()[name].replace('"IMAGES"', f'"FOLDER/{CASES[name].images}"')
    return f'[[data.sources]]\nname = "mine"\npath = "FOLDER/{CASES[name].path}"\n{lines}'


def captioned(name: str, *captions: str) -> tuple[str, ...]:
    return tuple(f"<user>[{caption}]<assistant><make {name}>[<eos>]" for caption in captions)


ASKED = "<user><see {1}>What colour is square {0}?<assistant>[It is {1}.<eos>]"
TWO_ROUNDS = "<user>How many?<assistant>[One.<eos>]"
EDIT = "<user><see {0}>make it {1}<assistant><make {1}>[<eos>]"


def edits(*names: str) -> tuple[str, ...]:
    """A chain of edits from each colour to the next, in all wordings of ``bagel_editing``."""
    steps = list(zip(names, names[1:], strict=False))
    return tuple(
        "".join(
            f"<user><see {seen}>{word} it {made}<assistant><make {made}>[<eos>]"
            for word, (seen, made) in zip(words, steps, strict=True)
        )
        for words in product(("make", "paint"), repeat=len(steps))
    )


CASES = {
    "BAGEL t2i": Case(
        data.bagel_t2i,
        "t2i",
        {
            0: captioned("red", "a red square", "square 0, all red"),
            13: captioned("green", "a green square", "square 13, all green"),
        },
    ),
    "BAGEL vlm": Case(
        data.bagel_vlm,
        "vlm/llava_ov_si.jsonl",
        {
            0: ASKED.format(0, "red"),
            4: "<user><see red><see green>Which is red?<assistant>[The first.<eos>]",
            5: "<user>What colour is square 5?<assistant>[It is black.<eos>]",
        },
        images="vlm/images",
    ),
    "BAGEL editing": Case(
        data.bagel_editing,
        "editing/seedxedit_multi",
        {0: edits("red", "green"), 1: edits("green", "blue", "yellow")},
    ),
    "LLaVA 665k": Case(
        data.llava_665k,
        "llava_v1_5_mix665k.json",
        {
            0: ASKED.format(0, "red"),
            1: "<user>What colour is this?<see green><assistant>[It is green.<eos>]",
            2: ASKED.format(2, "blue") + TWO_ROUNDS,
            3: "<user>What colour is square 3?<assistant>[It is yellow.<eos>]",
        },
        images="data",
    ),
    "ShareGPT4V": Case(
        data.sharegpt4v,
        "sharegpt4v.json",
        {3: "<user>Describe it.<see yellow><assistant>[A yellow square.<eos>]"},
        images="data",
    ),
    "LLaVA-OneVision": Case(
        data.llava_onevision,
        "toy/*.parquet",
        {
            0: ASKED.format(0, "red"),
            1: "<user>What colour is square 1?<assistant>[It is green.<eos>]",
            23: ASKED.format(23, "black"),
        },
    ),
    "The Cauldron": Case(
        data.cauldron,
        "toy",
        {
            0: ASKED.format(0, "red"),
            1: ASKED.format(1, "green") + TWO_ROUNDS,
            2: "<user><see blue><see black>What colour is square 2?<assistant>[It is blue.<eos>]",
        },
    ),
    "FineVision": Case(
        data.finevision,
        "toy",
        {1: ASKED.format(1, "green") + TWO_ROUNDS},
    ),
    "VQAv2": Case(
        data.vqav2,
        "data",
        {3: "<user><see yellow>What colour is square 3?<assistant>[yellow<eos>]"},
    ),
    "MMMU": Case(
        data.mmmu,
        "Toy",
        {
            2: "<user>What colour is square 2? <see blue>['red', 'green', 'blue', 'other']<assistant>[C<eos>]"
        },
    ),
    "OBELICS": Case(
        data.obelics,
        "*.parquet",
        {
            0: "[Before square 0.]<see red>[After red.<eos>]",
            2: "[One.\n\nTwo.]<see blue>[<eos>]",
        },
        bad={1: "empty"},
    ),
    "mmc4": Case(
        data.mmc4,
        "*.jsonl",
        {
            0: "<see red>[One about 0. Two is red.<eos>]",
            1: "[One about 1.]<see green>[Two is green.<eos>]",
            2: "<see blue>[One about 2.]<see yellow>[Two is blue.<eos>]",
        },
        images="images",
    ),
    "MINT-1T PDF": Case(
        data.mint_pdf,
        "CC-MAIN-2024-18-shard-0",
        {0: "[Page 0.]<see red>[Then.]<see green>[<eos>]"},
    ),
    "InstructPix2Pix": Case(
        pairs.instructpix2pix,
        "data",
        {0: EDIT.format("red", "green")},
    ),
    "MagicBrush": Case(
        pairs.magicbrush,
        "data",
        {1: EDIT.format("green", "blue")},
    ),
    "UltraEdit": Case(
        pairs.ultraedit,
        "data",
        {2: EDIT.format("blue", "yellow")},
    ),
    "SEED-Data-Edit pairs": Case(
        pairs.seed_data_edit,
        "real_editing/annotations",
        {0: EDIT.format("red", "green")},
        images="real_editing/images",
    ),
    "SEED-Data-Edit chains": Case(
        pairs.seed_data_edit,
        "multi_turn_editing/annotations",
        {0: EDIT.format("red", "green") + EDIT.format("green", "blue")},
        images="multi_turn_editing/images",
    ),
    "img2dataset": Case(
        pairs.img2dataset,
        "",
        {0: captioned("red", "a red square"), 1: captioned("blue", "a blue square")},
        num_rows=data.ROWS - 1,
    ),
    "img2dataset Parquet": Case(
        pairs.img2dataset_parquet,
        "",
        {0: captioned("red", "a red square"), 2: captioned("blue", "a blue square")},
        bad={1: "missing"},
    ),
    "Recap-DataComp": Case(
        pairs.recap_datacomp,
        "",
        {
            0: captioned("red", "square 0, all red", "a red square"),
            1: captioned("green", "square 1, all green"),
        },
    ),
    "COCO Karpathy": Case(
        pairs.coco_karpathy,
        "coco_karpathy_val.json",
        {3: captioned("yellow", *(f"{n} yellow" for n in ("one", "two", "three", "four", "five")))},
        images="coco",
    ),
    "JourneyDB": Case(
        pairs.journeydb,
        "*.jsonl",
        {0: captioned("red", "red square --v 5")},
        images="imgs",
    ),
    "JourneyDB captions": Case(
        pairs.journeydb,
        "*.jsonl",
        {0: captioned("red", "a red square")},
        images="imgs",
    ),
    "BLIP3o": Case(
        pairs.blip3o,
        "*.tar",
        {2: captioned("blue", "a blue square")},
    ),
    "text-to-image-2M": Case(
        pairs.text_to_image_2m,
        "data_512_2M/data_{000000..000000}.tar",
        {1: captioned("green", "a green square")},
    ),
    "Alpaca": Case(
        pairs.alpaca,
        "alpaca_data.json",
        {
            0: "<user>Name the colour.<assistant>[It is red.<eos>]",
            1: "<user>Name the colour.\nsquare 1<assistant>[It is green.<eos>]",
        },
    ),
    "Infinity-Instruct": Case(
        pairs.infinity_instruct,
        "7M",
        {
            0: "<user>What is 0?<assistant>[It is red.<eos>]",
            1: "<user>What is 1?<assistant>[It is green.<eos>]",
        },
    ),
    "Tulu, smoltalk": Case(
        pairs.tulu,
        "data",
        {
            0: "Be brief.<user>What is 0?<assistant>[It is red.<eos>]",
            1: "<user>What is 1?<assistant>[It is green.<eos>]",
        },
    ),
}


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """Name of a case -> all its rows as documents; each data set is written and read once."""
    known: dict[str, list[str | BadSample]] = {}

    def reading(name: str) -> list[str | BadSample]:
        if name not in known:
            folder = tmp_path_factory.mktemp("released")
            CASES[name].write(folder)
            known[name] = list(read_source(folder, source_of(name)))
        return known[name]

    return reading


def test_every_data_set_of_the_page_is_read_here():
    assert documented().keys() == CASES.keys()


@pytest.mark.parametrize("name", CASES)
def test_a_released_data_set_is_read_as_it_is(name, read):
    case, documents = CASES[name], read(name)
    assert len(documents) == case.num_rows
    for row, right in case.rows.items():
        assert documents[row] in (right if isinstance(right, tuple) else (right,))


@pytest.mark.parametrize("name", CASES)
def test_only_the_rows_of_a_released_data_set_that_lack_something_are_bad(name, read):
    bad = {row: found for row, found in enumerate(read(name)) if isinstance(found, BadSample)}
    assert {row: error.reason for row, error in bad.items()} == CASES[name].bad


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("BAGEL t2i", (r"\[a ", r"\[square ")),
        ("BAGEL editing", ("make it", "paint it")),
        ("Recap-DataComp", (r"\[a ", r"\[square ")),
        ("COCO Karpathy", ("one", "two", "three", "four", "five")),
    ],
)
def test_each_of_a_rows_texts_is_drawn_for_some_rows(name, texts, read):
    documents = "\n".join(map(str, read(name)))
    assert all(re.search(text, documents) for text in texts)


def test_what_cannot_be_read_is_refused_with_what_to_do(tmp_path):
    pairs.coco_annotations(tmp_path)
    row = '[[data.sources]]\nname = "a"\ntask = "t2i"\nformat = "json"\npath = "FOLDER/captions_train2017.json"'
    with pytest.raises(ValueError, match="holds one JSON object, not rows; write the array"):
        list(read_source(tmp_path, row))
    # With Rosetta's text data the places of its images would be trained as text.
    pairs.llava_text(tmp_path)
    row = '[[data.sources]]\nname = "a"\ntask = "lm"\nformat = "json"\npath = "FOLDER/lm/conversation_58k.json"'
    first, *_ = read_source(tmp_path, row)
    assert isinstance(first, BadSample) and "use the task mmu or interleaved" in str(first)
