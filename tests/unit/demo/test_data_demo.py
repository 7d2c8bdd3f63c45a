"""The demo world: what its files hold, and that words and pictures agree."""

import json
import re
import sys
from dataclasses import replace
from random import Random

import numpy as np
import pytest

from symbiotic_titan.commands import make_demo_data
from symbiotic_titan.config.data import DataSource
from symbiotic_titan.config.tokenizer import Tokenizer
from symbiotic_titan.data.decoding import decode_image
from symbiotic_titan.data.readers import Reader, index_source
from symbiotic_titan.data.tokenizer import BYTE_SPECIALS, open_tokenizer
from symbiotic_titan.demo import (
    digits,
    scenes,
)
from symbiotic_titan.demo.docstrings import prose
from symbiotic_titan.demo.questions import kind_and_asked
from symbiotic_titan.demo.vocabulary import VOCABULARY, vocabulary_of
from symbiotic_titan.demo.write import (
    IMAGE_TASKS,
    SPLITS,
    WorldSize,
    write_world,
)
from tests.helpers.demo_world import TINY

SMALL = WorldSize(5, 2, 6, 3, train_shards=2)
STUDY = replace(SMALL, questions=4, pretrain_images=4, pretrain_texts=6, vocabulary=300)


def read_all(folder, form="webdataset"):
    """(members, JSON) of every sample below ``folder``."""
    path = f"{folder}/*.{'tar' if form == 'webdataset' else 'jsonl'}"
    shards = index_source(DataSource("s", "t2i", form, path), "s")
    reader = Reader(shards)
    samples = [reader.read(i, k) for i, s in enumerate(shards) for k in range(s.num_samples)]
    return [(sample.members, json.loads(sample.members["json"])) for sample in samples]


def content(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_same_seed_writes_the_same_bytes_and_another_seed_other_samples(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        write_world(tmp_path / name, seed, SMALL)
    first, again, other = (content(tmp_path / name) for name in "abc")
    assert first == again
    assert first.keys() == other.keys()
    assert all(first[path] != other[path] for path in first)


@pytest.fixture(scope="module")
def demo_world(tmp_path_factory):
    """With the texts that it has for users."""
    out = tmp_path_factory.mktemp("demo")
    write_world(out, seed=0, size=TINY)
    return out


def test_manifest_counts_what_the_files_hold(demo_world):
    counts = json.loads((demo_world / "manifest.json").read_text())["samples"]
    for split in SPLITS:
        for task in IMAGE_TASKS:
            assert len(read_all(demo_world / split / task)) == counts[split][task] > 0
        assert len(read_all(demo_world / split / "lm", "jsonl")) == counts[split]["lm"] > 0
    assert len(list((demo_world / "train" / "t2i").iterdir())) == 3


def test_heldout_files_share_no_picture_and_no_package_with_training(demo_world):
    seen = {split: set() for split in SPLITS}
    for split in SPLITS:
        for task in IMAGE_TASKS:
            for _, fields in read_all(demo_world / split / task):
                if "digit" in fields:
                    seen[split].add(("digit", fields["digit"]["index"]))
                elif "writing" in fields:
                    shown = fields["writing"]
                    seen[split].add(tuple(shown[name] for name in ("text", "ink", "background")))
                else:
                    objects = fields["scene"]["objects"]
                    kinds = [(o["colour"], o["shape"], o["place"]) for o in objects]
                    seen[split].add(tuple(sorted(kinds)))
        for _, fields in read_all(demo_world / split / "lm", "jsonl"):
            if "module" in fields:
                seen[split].add(("package", fields["module"].split(".")[0]))
    assert seen["train"] and seen["heldout"] and not seen["train"] & seen["heldout"]


def test_split_of_digits_and_scenes_is_complete_and_disjoint():
    train, heldout = (digits.handwritten_digits(side) for side in (False, True))
    assert sorted(d.index for d in train + heldout) == list(range(1797))
    assert 0.1 < len(heldout) / 1797 < 0.2
    random = Random(0)
    assert all(scenes.draw_scene(random, side).is_heldout() == side for side in [False, True] * 50)


def test_pictures_show_what_their_description_says():
    random = Random(0)
    for _ in range(200):
        scene = scenes.draw_scene(random, False)
        pixels = np.asarray(scenes.paint(scene)).astype(int)
        description = scene.description()
        assert list(pixels.shape[:2]) == description["size"]
        shown = 0
        for thing in description["objects"]:
            row, column = thing["centre"]
            colour = scenes.COLOURS[thing["colour"]]
            assert np.abs(pixels[row, column] - colour).max() < 8, thing
            at_top, at_left = (word in thing["place"] for word in ("top", "left"))
            assert (row < pixels.shape[0] / 2) == at_top
            assert (column < pixels.shape[1] / 2) == at_left
            shown += 1
        assert 1 <= shown <= 4


def test_captions_name_every_thing_and_are_short_enough_for_a_row_of_256():
    random = Random(1)
    for _ in range(500):
        scene = scenes.draw_scene(random, False)
        short, long = scenes.short_caption(scene), scenes.long_caption(scene)
        assert len(short) < 80 and len(short) < len(long) <= 256 - 64 - 6
        assert scene.background in long and "  " not in short + long
        for thing in scene.things:
            assert f"{thing.colour} {thing.shape}" in short and thing.place in long
            assert f"{thing.colour} {thing.shape}" in long


def test_answers_follow_from_the_scene():
    random = Random(2)
    asked = set()
    for _ in range(500):
        scene = scenes.draw_scene(random, False)
        question, answer = scenes.ask(scene, random)
        at = {t.place: t for t in scene.things}
        words = question.rstrip("?")
        asked.add(kind_and_asked(question)[1])
        if (kind := kind_and_asked(question)[1]) == "relation":
            continue  # below
        if words.startswith("How many"):
            assert answer == scenes.NUMBER_WORDS[len(scene.things)]
        elif words.startswith("Is there"):
            colour = words.split()[-1]
            assert answer == ("yes" if colour in {t.colour for t in scene.things} else "no")
        elif words.startswith("Where is the"):
            colour, shape = words.split()[-2:]
            places = [t.place for t in scene.things if (t.colour, t.shape) == (colour, shape)]
            assert places == [answer]
        else:
            place = words.split("at the ")[1]
            assert answer == getattr(at[place], kind)
    assert asked == {"count", "presence", "place", "colour", "shape", "relation"}


def test_relations_that_are_asked_and_told_hold_between_the_painted_things():
    random, answers = Random(3), []
    asked = re.compile(
        r"(?:Which shape is|Is the (\w+ \w+)) (left of|right of|above|below) the (\w+ \w+)\?"
    )
    told = re.compile(r"an? (\w+ \w+) (left of|right of|above|below) an? (\w+ \w+)")
    axes = {"left of": (1, 1), "right of": (1, -1), "above": (0, 1), "below": (0, -1)}
    for _ in range(400):
        scene = scenes.draw_scene(random, False)
        things = {f"{t.colour} {t.shape}": t for t in scene.things}

        def holds(first, relation, second, things=things):
            axis, sign = axes[relation]
            return sign * (things[second].centre[axis] - things[first].centre[axis]) > 8

        question, answer = scenes.ask(scene, random)
        if match := asked.match(question):
            first, relation, second = match.groups()
            if first:
                assert holds(first, relation, second) == (answer == "yes")
                answers.append(answer)
            else:
                shapes = [t.shape for name, t in things.items() if holds(name, relation, second)]
                assert shapes == [answer]
        if match := told.fullmatch(scenes.say("t2i", scene, random)["caption"]):
            assert holds(*match.groups())
            answers.append("told")
    assert {"yes", "no", "told"} == set(answers)
    assert 0.3 < answers.count("yes") / (len(answers) - answers.count("told")) < 0.7


def test_digits_are_the_real_images_with_their_names():
    digit = digits.handwritten_digits(False)[3]
    image = np.asarray(digits.paint(digit, Random(0)).convert("L").resize((8, 8))) / 255 * 16
    assert np.corrcoef(image.ravel(), digit.levels.ravel())[0, 1] > 0.9
    word = digits.DIGIT_WORDS[digit.value]
    assert digits.short_caption(digit) == f"the digit {word}"
    assert word in digits.long_caption(digit)
    questions = [digits.ask(digit, Random(i)) for i in range(50)]
    odd = "odd" if digit.value % 2 else "even"
    assert {answer for _, answer in questions} == {word, odd}


def test_both_image_formats_are_in_the_files(demo_world):
    found = set()
    for members, fields in read_all(demo_world / "train" / "mmu"):
        extension = next(name for name in members if name != "json")
        shown = next(name for name in ("digit", "scene", "writing") if name in fields)
        found.add((shown, extension))
        assert decode_image(members[extension]).mode == "RGB"
    assert found == {("digit", "jpg"), ("scene", "png"), ("writing", "png")}


def test_prose_keeps_sentences_and_leaves_code_and_tables_out():
    docstring = """Return the sum of\n    two numbers.

    >>> add(1, 2)
    3

    a : int -- first [0..9] {x: y}

    Both must be numbers.
    """
    assert prose(docstring) == "Return the sum of two numbers.\nBoth must be numbers."


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.setattr(make_demo_data, "WORLD_SIZES", {"full": SMALL, "study": STUDY})
    return make_demo_data


def test_tool_writes_a_world_and_replaces_it_only_by_force(tool, tmp_path, capsys):
    out = tmp_path / "new" / "demo_data"
    assert tool.main(["--out", str(out)]) == 0
    assert capsys.readouterr().out.startswith(f"{out}: ")
    assert tool.main(["--out", str(out)]) == 2
    message = f"error: --out {out}: exists and is not empty; pass --force to replace it\n"
    assert capsys.readouterr().err == message
    before = content(out)
    assert tool.main(["--out", str(out), "--force", "--seed", "1"]) == 0
    assert content(out).keys() == before.keys() and content(out) != before
    assert [p.name for p in out.parent.iterdir()] == ["demo_data"]


def test_size_study_has_as_few_questions_as_asked_for_and_data_to_start_from(tool, tmp_path):
    out = tmp_path / "study"
    for words, questions in (((), 4), (("--questions", "3", "--force"), 3)):
        assert tool.main(["--out", str(out), "--size", "study", *words]) == 0
        counts = json.loads((out / "manifest.json").read_text())["samples"]
        assert counts["train"] == {"t2i": 5, "t2i_long": 5, "mmu": questions, "lm": 6}
        assert len(read_all(out / "train" / "mmu")) == questions
    asked = [fields for _, fields in read_all(out / "pretrain" / "mmu")]
    assert len(asked) == counts["pretrain"]["mmu"] == 4
    assert all(kind_and_asked(f["question"])[0] == f["kind"] for f in asked)
    texts = {s: [f["text"] for _, f in read_all(out / s / "lm", "jsonl")] for s in counts}
    assert len(texts["pretrain"]) == 6 and not set(texts["pretrain"]) & set(texts["train"])


def test_the_vocabulary_has_the_words_of_training_files_and_takes_any_text(tmp_path):
    write_world(tmp_path, 0, STUDY)
    tokenizer = open_tokenizer(Tokenizer("huggingface", str(tmp_path / VOCABULARY)))
    assert tokenizer.vocab_size == STUDY.vocabulary + len(BYTE_SPECIALS)
    for text in ("Which digit is this?", "What colour? \u00fc\n\t\u4e2d", " the  red"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("327")) == 3
    assert len(tokenizer.encode("a digit and the picture")) < 16
    with pytest.raises(ValueError, match="vocabulary: 9000 ids are wanted, the texts give"):
        vocabulary_of(["a few words"], 9000)


def test_tool_never_replaces_what_it_did_not_write(tool, tmp_path, capsys):
    assert tool.main(["--out", str(tmp_path), "--questions", "1"]) == 2
    assert "--questions 1: must be at least 2, one for each file" in capsys.readouterr().err
    (tmp_path / "thesis.tex").write_text("")
    assert tool.main(["--out", str(tmp_path), "--force"]) == 2
    assert "holds 'thesis.tex', which is no part of a demo world" in capsys.readouterr().err
    assert tool.main(["--out", str(tmp_path / "thesis.tex")]) == 2
    assert "is a file; name a folder" in capsys.readouterr().err


def test_missing_scikit_learn_is_named(tool, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert tool.main(["--out", str(tmp_path / "demo_data")]) == 2
    assert "install it: pip install scikit-learn" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_python_without_its_sources_is_named(tool, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdlib_module_names", frozenset())
    assert tool.main(["--out", str(tmp_path / "demo_data")]) == 2
    assert "has no source files of its standard library" in capsys.readouterr().err
