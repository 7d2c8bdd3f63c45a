"""Answers are compared by what they say; chance is what can be had blind."""

from random import Random

import pytest
from PIL import Image

from symbiotic_titan.demo import (
    digits,
    scenes,
    writing,
)
from symbiotic_titan.demo.facts import facts_of
from symbiotic_titan.demo.held_out import QuestionSample
from symbiotic_titan.demo.questions import (
    KINDS,
    answer_score,
    kind_and_asked,
    normalised,
)
from symbiotic_titan.evaluation.intervals import of_share

IMAGE = Image.new("RGB", (8, 8))


def ask(*pairs):
    return [QuestionSample(question, answer, IMAGE) for question, answer in pairs]


def test_differences_that_mean_nothing_are_taken_off():
    for answer in ("three", " Three.", "3", "three\n", "the three"):
        assert normalised(answer) == "three"
    assert normalised("Top  left!") == "top left"
    assert normalised("top left") != normalised("bottom left")
    assert normalised("") != normalised("no")
    assert normalised("a cat") == "cat" and normalised("the cat, a dog") == "cat dog"
    # Letters are no articles.
    assert normalised("c a t") == "c a t" and normalised("a") == "a" != normalised("")


def test_every_question_of_the_world_has_a_kind():
    random = Random(0)
    asked = {scenes.ask(scenes.draw_scene(random, False), random)[0] for _ in range(300)}
    asked |= {writing.ask(writing.draw_writing(random, False), random)[0] for _ in range(60)}
    asked |= {fact.question() for fact in facts_of(0)}
    digit = digits.handwritten_digits(heldout=False)[0]
    asked |= {digits.ask(digit, random)[0] for _ in range(20)}
    expected = {(kind, name) for kind, names in KINDS.items() for name in names.values()}
    assert {kind_and_asked(question) for question in asked} == expected
    assert kind_and_asked("Why?") == ("other", "other")


def test_score_counts_right_answers_and_chance_the_most_frequent_of_each_kind():
    samples = ask(
        ("How many shapes are there?", "one"),
        ("How many shapes are there?", "two"),
        ("How many shapes are there?", "two"),
        ("Is there anything red?", "yes"),
    )
    scores = answer_score(["1", "two", "four", "no"], samples)
    everything = {"score": 0.5, "chance": 0.75, "upper_bound": 1.0, "number": 4}
    everything["interval"] = list(of_share(2, 4))
    assert scores["answers/all"] == scores["answers/perception"] == everything
    assert list(scores) == [
        f"answers/{name}" for name in ("all", "perception", "count", "presence")
    ]
    assert scores["answers/count"]["score"] == scores["answers/count"]["chance"] == 2 / 3
    assert scores["answers/presence"] == {
        "score": 0.0,
        "interval": list(of_share(0, 1)),
        "chance": 1.0,
        "upper_bound": 1.0,
        "number": 1,
    }


def test_true_answers_reach_the_upper_bound():
    random = Random(1)
    samples = ask(*[scenes.ask(scenes.draw_scene(random, True), random) for _ in range(100)])
    scores = answer_score([sample.answer for sample in samples], samples)
    assert all(measure["score"] == measure["upper_bound"] == 1.0 for measure in scores.values())
    assert 0.2 < scores["answers/all"]["chance"] < 0.6


def test_chance_knows_the_wording_of_a_question_but_not_its_picture():
    samples = ask(
        ("What is the first letter of this word?", "b"),
        ("What is the first letter of this word?", "b"),
        ("What is the last digit of this number?", "7"),
        ("Which shape is at the top left?", "circle"),
        ("Which shape is at the top right?", "cross"),
    )
    scores = answer_score([""] * 5, samples)
    assert scores["answers/character"]["chance"] == scores["answers/ocr"]["chance"] == 1.0
    assert scores["answers/shape"]["chance"] == 0.5


def test_a_file_may_say_the_kind_of_its_questions():
    said = [QuestionSample("How many shapes are there?", "one", IMAGE, kind="mine")]
    assert set(answer_score(["one"], said)) == {"answers/all", "answers/mine", "answers/count"}


def test_every_question_needs_its_answer():
    with pytest.raises(ValueError, match="got 1 answers to 2 questions"):
        answer_score(["yes"], ask(("a?", "b"), ("c?", "d")))
    with pytest.raises(ValueError, match="got 0 answers to 0 questions"):
        answer_score([], [])
