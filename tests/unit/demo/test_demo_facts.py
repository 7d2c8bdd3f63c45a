"""Facts of the world: told by texts, asked about pictures, and not to be had without either."""

from collections import Counter, defaultdict
from dataclasses import replace
from random import Random

import pytest
from PIL import Image

from symbiotic_titan.demo.facts import ATTRIBUTES, draw_question, fact_texts, facts_of
from symbiotic_titan.demo.held_out import (
    QuestionSample,
    demo_source,
    read_questions,
    read_texts,
)
from symbiotic_titan.demo.questions import KINDS, answer_score, normalised
from symbiotic_titan.demo.references import knowledge_items
from symbiotic_titan.demo.scenes import COLOURS
from symbiotic_titan.demo.write import WORLD_SIZES, write_world
from symbiotic_titan.demo.writing import Writing, ask, draw_writing
from tests.helpers.demo_world import fixed_texts


def test_another_seed_makes_other_facts_about_the_same_entities():
    one, other = facts_of(0), facts_of(1)
    assert facts_of(0) == one
    assert [(f.entity, f.attribute) for f in one] == [(f.entity, f.attribute) for f in other]
    assert 0.05 < sum(a == b for a, b in zip(one, other, strict=True)) / len(one) < 0.35
    for name, attribute in ATTRIBUTES.items():
        counts = Counter(fact.value for fact in one if fact.attribute == name)
        assert set(counts) == set(attribute.values)
        assert max(counts.values()) - min(counts.values()) <= 1


def test_texts_state_every_fact_in_phrasings_that_heldout_texts_do_not_use():
    facts = facts_of(0)
    trained, unseen = (fact_texts(facts, 0, 60, side) for side in (False, True))
    assert {tuple(fact) for row in trained for fact in row["facts"]} == {
        (f.entity, f.attribute, f.value) for f in facts
    }
    sentences = [{s for row in rows for s in row["text"].split(". ")} for rows in (trained, unseen)]
    assert not sentences[0] & sentences[1]
    for row in trained + unseen:
        assert all(value in row["text"].lower() for _, _, value in row["facts"])


def test_a_picture_shows_the_entity_and_not_the_fact():
    random, facts = Random(0), facts_of(0)
    told = Counter()
    for side in [False, True] * 150:
        fact, shown = draw_question(facts, random, side)
        assert shown.is_heldout() == side
        if isinstance(shown, Writing):
            assert shown.text == fact.entity
        else:
            (thing,) = shown.things
            assert f"{thing.colour} {thing.shape}" == fact.entity
        told[side, fact.is_asked()] += 1
    assert told[False, False] == 0, "texts alone tell these"
    assert 0.35 < told[True, False] / 150 < 0.65


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Folder of a small study."""
    numbers = {"train_images": 8, "heldout_images": 180, "train_texts": 40, "heldout_texts": 20}
    few = {"questions": 270, "pretrain_images": 20, "pretrain_texts": 40, "vocabulary": 0}
    small = replace(WORLD_SIZES["study"], **numbers, **few)
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("symbiotic_titan.demo.write.standard_library_texts", fixed_texts)
        write_world(folder, 0, small)
    return folder


def test_kinds_of_questions_are_balanced_and_few(study):
    asked = read_questions(demo_source(study, "train", "mmu"))
    assert Counter(sample.kind for sample in asked) == dict.fromkeys(KINDS, 90)
    assert len(read_questions(demo_source(study, "pretrain", "mmu"))) == 20
    full = WORLD_SIZES["full"].asked_about
    assert full.count("scene") + full.count("digit") > len(full) / 2


def test_training_answers_help_no_more_than_chance_without_the_picture(study):
    """The best guess by the question's text, from the training answers, on held-out questions."""
    train, unseen = (read_questions(demo_source(study, s, "mmu")) for s in ("train", "heldout"))
    by_text = defaultdict(Counter)
    for sample in train:
        by_text[sample.question][normalised(sample.answer)] += 1
    guesses = [
        by_text[s.question].most_common(1)[0][0] if by_text[s.question] else "" for s in unseen
    ]
    for name, measure in answer_score(guesses, unseen).items():
        spread = 2 * (measure["chance"] * (1 - measure["chance"]) / measure["number"]) ** 0.5
        assert measure["score"] <= measure["chance"] + spread, name


def test_answers_are_so_many_that_chance_is_low():
    random, facts = Random(1), facts_of(0)
    blank = Image.new("RGB", (8, 8))
    drawn = [draw_question(facts, random, True)[0] for _ in range(1000)]
    asked = [QuestionSample(fact.question(), fact.value, blank, "knowledge") for fact in drawn]
    written = [ask(draw_writing(random, True), random) for _ in range(1000)]
    asked += [QuestionSample(*question, blank, "ocr") for question in written]
    scores = answer_score([""] * len(asked), asked)
    assert scores["answers/knowledge"]["chance"] < 0.4
    assert scores["answers/ocr"]["chance"] < 0.2


def test_texts_that_state_facts_make_no_multiple_choice(study):
    texts = read_texts(demo_source(study, "train", "lm"))
    assert len(texts) == 40 - 40 // 3
    told = [row["text"] for row in fact_texts(facts_of(0), 0, 60, False)]
    assert not set(texts) & set(told)
    assert not any(colour in text for text in texts for colour in COLOURS)
    with pytest.raises(ValueError, match="questions are wanted"):
        knowledge_items(told, 60)
