"""Benchmarks' own prompts: how they are read, and that images lie where the scorers look for them."""

import json
import re

import pytest
from PIL import Image

from symbiotic_titan.evaluation.suites.prompts import (
    CompBenchOptions,
    GenevalOptions,
    run_compbench,
    run_geneval,
)
from symbiotic_titan.inference.images import Picture

GENEVAL = [
    {
        "tag": "single_object",
        "include": [{"class": "bench", "count": 1}],
        "prompt": "a photo of a bench",
    },
    {"tag": "counting", "include": [{"class": "cow", "count": 2}], "prompt": "a photo of two cows"},
]


class Painter:
    """Keeps what it was asked for."""

    def __init__(self):
        self.prompts = []

    def images(self, prompts, **settings):
        self.prompts += prompts
        return [Picture(Image.new("RGB", (8, 8)), {"prompt": prompt}) for prompt in prompts]


def no_progress(what, total):
    return lambda count: None


@pytest.fixture
def geneval(tmp_path):
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in GENEVAL))
    return path


def test_genevals_scorer_finds_every_image_with_what_it_should_show(geneval, tmp_path):
    """Read as its evaluate_images.py does: folders of digits, metadata.jsonl as one object, samples of digits."""
    painter, out = Painter(), tmp_path / "out"
    scores = run_geneval(painter, GenevalOptions(prompts=str(geneval), samples=3), out, no_progress)
    assert scores["geneval_images/images"]["score"] == 6
    folders = sorted((out / "images").iterdir())
    assert [folder.name for folder in folders] == ["00000", "00001"]
    assert all(folder.name.isdigit() for folder in folders)
    assert [json.loads((f / "metadata.jsonl").read_text()) for f in folders] == GENEVAL
    for folder, row in zip(folders, GENEVAL, strict=True):
        files = sorted((folder / "samples").iterdir())
        assert [file.name for file in files] == ["00000.png", "00001.png", "00002.png"]
        assert all(re.match(r"\d+\.png", file.name) for file in files)
        assert {Image.open(file).text["prompt"] for file in files} == {row["prompt"]}


def test_t2i_compbenchs_scorers_find_prompt_and_number_in_the_names(tmp_path):
    """Read as its BLIP_vqa.py does: sorted by the number behind the last underscore, the prompt before the first."""
    colours, complexes = tmp_path / "color_val.txt", tmp_path / "complex_val.txt"
    colours.write_text("a green bench and a blue bowl\nA red cup.\t seen\n\n")
    complexes.write_text("the soft, warm light\n")
    options = CompBenchOptions(prompts=(str(colours), str(complexes)), samples=2)
    scores = run_compbench(Painter(), options, tmp_path / "out", no_progress)
    assert scores["t2i_compbench_images/images"]["score"] == 6
    names = [file.name for file in (tmp_path / "out" / "color_val" / "samples").iterdir()]
    names.sort(key=lambda name: int(name.split("_")[-1].split(".")[0]))
    assert names[1] == "a green bench and a blue bowl_000001.png"
    assert [name.split("_")[0] for name in names] == ["a green bench and a blue bowl"] * 2 + [
        "A red cup."
    ] * 2
    assert [int(name[-10:-4]) for name in names] == [0, 1, 2, 3]
    assert len(list((tmp_path / "out" / "complex_val" / "samples").iterdir())) == 2


def test_a_limit_takes_the_first_prompts(geneval, tmp_path):
    painter = Painter()
    options = GenevalOptions(prompts=str(geneval), samples=1, limit=1)
    run_geneval(painter, options, tmp_path / "out", no_progress)
    assert painter.prompts == ["a photo of a bench"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"prompt": "a", "tag": "b"}\n',
            "line 1: column 'include' is missing, there are: prompt, tag",
        ),
        ('{"prompt": \n', "line 1: is not JSON"),
        ("[1]\n", "line 1: must be a JSON object, got list"),
        ("", "holds no prompts; it should be GenEval's"),
    ],
)
def test_a_bad_metadata_file_is_named(geneval, text, message):
    geneval.write_text(text)
    with pytest.raises(ValueError, match=message):
        GenevalOptions(prompts=str(geneval))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a red_cup\n", "prompt 'a red_cup' has a _ or /, so T2I-CompBench cannot read it"),
        ("red and/or blue\n", "prompt 'red and/or blue' has a _ or /"),
        ("\n", "holds no prompts"),
    ],
)
def test_a_prompt_that_no_file_name_can_hold_is_named(tmp_path, text, message):
    (tmp_path / "color.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        CompBenchOptions(prompts=(str(tmp_path / "color.txt"),))


def test_wrong_options_are_named(geneval, tmp_path):
    with pytest.raises(ValueError, match="prompts: must be GenEval's .*, got '', which is no file"):
        GenevalOptions()
    with pytest.raises(ValueError, match="samples: must be at least 1, got 0"):
        GenevalOptions(prompts=str(geneval), samples=0)
    with pytest.raises(ValueError, match="prompts: must be T2I-CompBench's prompt files"):
        CompBenchOptions()
    with pytest.raises(ValueError, match="two files have the same name, got color, color"):
        CompBenchOptions(prompts=("a/color.txt", "b/color.txt"))
    with pytest.raises(ValueError, match="got 'color.txt', which is no file"):
        CompBenchOptions(prompts=("color.txt",))
