"""The suite of the demo world: which samples it takes, and that its parts measure what the parts themselves would."""

import re
from pathlib import Path

import pytest
from PIL import Image

from symbiotic_titan.demo import scores as demo_world
from symbiotic_titan.demo.held_out import (
    demo_source,
    read_pictures,
    read_questions,
)
from symbiotic_titan.demo.references import (
    ChoiceItem,
    write_items,
)
from symbiotic_titan.demo.suite import (
    DemoWorldOptions,
    by_turns,
    run_demo_world,
    score_answers,
    score_knowledge,
    score_pictures,
)
from symbiotic_titan.demo.write import (
    WorldSize,
    write_world,
)
from symbiotic_titan.evaluation.intervals import of_share
from symbiotic_titan.inference.generator import Completion
from symbiotic_titan.inference.images import Picture
from symbiotic_titan.inference.text import LogLikelihood


@pytest.fixture(scope="module")
def world_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "demo_data"
    write_world(folder, 0, WorldSize(4, 24, 160, 160, train_shards=1))
    return folder


@pytest.fixture
def options(world_folder):
    def make(**changes):
        small = {"pictures": 12, "questions": 8, "knowledge": 4, "loss_rows": 0}
        return DemoWorldOptions(data=str(world_folder), **small | changes)

    return make


def no_progress(what, total):
    return lambda count: None


class Perfect:
    """Draws, answers and knows what the files hold."""

    buckets = [(32, 32), (24, 40), (40, 24)]

    def __init__(self, folder):
        tasks = ("t2i", "t2i_long")
        pictures = [s for t in tasks for s in read_pictures(demo_source(folder, "heldout", t))]
        self.real = {sample.caption: sample.image for sample in pictures}
        self.questions = read_questions(demo_source(folder, "heldout", "mmu"))
        self.texts = (folder / "train/lm/lm-0000.jsonl").read_text()
        self.sizes = []

    def images(self, prompts, *, size, **settings):
        self.sizes += [size] * len(prompts)
        height, width = size
        return [Picture(self.real[p].resize((2 * width, 2 * height)), {}) for p in prompts]

    def text(self, prompts, images, **settings):
        answers = iter(self.questions)
        given = [next(answers) for _ in prompts]
        assert [sample.question for sample in given] == prompts
        assert all(isinstance(shown, Image.Image) for [shown] in images)
        return [Completion(f"{sample.answer.upper()}.", [1], "end") for sample in given]

    def log_likelihoods(self, pairs, **settings):
        known = [before + after in self.texts.replace("\\n", " ") for before, after in pairs]
        return [LogLikelihood(0.0 if is_true else -9.0, is_true, 1) for is_true in known]


def test_by_turns_takes_one_of_each_until_all_have_ended():
    assert list(by_turns([[1, 4], [2], [3, 5, 6]])) == [1, 2, 3, 4, 5, 6]


def test_perfect_pictures_reach_the_upper_bound_in_the_shape_of_the_real_ones(
    world_folder, options, tmp_path, reader, monkeypatch
):
    monkeypatch.setattr(demo_world, "digit_reader", lambda: reader)
    perfect = Perfect(world_folder)
    scores = score_pictures(perfect, options(), tmp_path, no_progress)
    numbers = ("digit", "scene/all_correct", "writing/character")
    assert {scores[f"pictures/{name}"]["number"] for name in numbers} == {4}
    for name in ("digit", "words", "scene/count", "scene/colour", "scene/place"):
        assert (
            scores[f"pictures/{name}"]["score"] >= scores[f"pictures/{name}"]["upper_bound"] - 0.2
        )
        assert scores[f"pictures/{name}"]["score"] > scores[f"pictures/{name}"]["chance"]
    assert len(list((tmp_path / "pictures").iterdir())) == 12
    assert len(set(perfect.sizes)) > 1, "wide and tall scenes are drawn wide and tall"
    with Image.open(tmp_path / "pictures.png") as overview:
        assert overview.width > 4 * 192


def test_answers_are_compared_with_the_files_and_kept(world_folder, options, tmp_path):
    scores = score_answers(Perfect(world_folder), options(), tmp_path, no_progress)
    assert scores["answers/all"]["score"] == 1.0 and scores["answers/all"]["number"] == 8
    kinds = [scores[f"answers/{kind}"]["number"] for kind in ("perception", "ocr", "knowledge")]
    assert sum(kinds) == 8 and min(kinds) > 0
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 8


def test_knowledge_is_asked_of_both_texts_and_true_ones_are_told_apart(
    world_folder, options, tmp_path
):
    scores = score_knowledge(Perfect(world_folder), options(), tmp_path, no_progress)
    assert scores["knowledge/accuracy"]["score"] == 1.0
    assert scores["knowledge_heldout/accuracy"]["score"] < 1.0
    assert scores["knowledge_heldout/accuracy"]["chance"] == 0.25


def test_items_of_a_file_take_the_place_of_those_of_the_text(world_folder, options, tmp_path):
    # The world's texts are those of the Python that runs here: any line of plain words will do.
    lines = re.findall(r"(?:[a-z]+ ){6,}", Perfect(world_folder).texts)
    words = lines[0].split()
    item = ChoiceItem(" ".join(words[:3]), ("xyzzy", " ".join(words[3:5])), 1)
    write_items(tmp_path / "mine.jsonl", [item] * 3)
    own = options(knowledge_file=str(tmp_path / "mine.jsonl"), knowledge=2)
    scores = score_knowledge(Perfect(world_folder), own, tmp_path, no_progress)
    assert scores["knowledge/accuracy"] == {
        "score": 1.0,
        "interval": list(of_share(2, 2)),
        "chance": 0.5,
        "upper_bound": 1.0,
        "number": 2,
    }
    assert "knowledge_heldout/accuracy" not in scores


def test_a_part_of_which_nothing_is_asked_is_left_out(options, tmp_path):
    nothing = options(pictures=0, questions=0, knowledge=0)
    assert run_demo_world(None, nothing, tmp_path, no_progress) == {}


def test_mistakes_are_told_before_a_model_is_loaded(options, tmp_path):
    with pytest.raises(ValueError, match="pictures: must be zero or positive, got -1"):
        options(pictures=-1)
    with pytest.raises(
        ValueError, match="data: no demo world in 'nowhere'; make it with symbiotic make-demo-data"
    ):
        DemoWorldOptions(data="nowhere")
    with pytest.raises(ValueError, match="knowledge_file: no such file: none.jsonl"):
        options(knowledge_file="none.jsonl")
    path = tmp_path / "bad.jsonl"
    path.write_text('{"question": "q", "choices": ["a", "b"]}\n')
    with pytest.raises(ValueError, match="bad.jsonl: line 1: column 'answer' is missing"):
        options(knowledge_file=str(Path(path)))
