"""Multiple-choice items: what they are made of, their file, and how choices are scored."""

import json
from itertools import islice

import pytest

from symbiotic_titan.demo.docstrings import standard_library_texts
from symbiotic_titan.demo.references import (
    NUM_CHOICES,
    ChoiceItem,
    choice_score,
    knowledge_items,
    read_items,
    write_items,
)
from symbiotic_titan.evaluation.intervals import of_share

ITEM = ChoiceItem("Grass is", ("blue.", "green as ever."), 1)


@pytest.fixture(scope="module")
def texts():
    return [row["text"] for row in islice(standard_library_texts(0, heldout=False), 800)]


@pytest.fixture(scope="module")
def items(texts):
    return knowledge_items(texts, 80)


def test_exactly_the_true_choice_continues_the_question_in_the_texts(texts, items):
    assert len({item.question for item in items}) == 80
    for item in items:
        found = [any(f"{item.question} {c}" in t for t in texts) for c in item.choices]
        assert found == [i == item.answer for i in range(NUM_CHOICES)]


def test_wrong_choices_come_from_behind_the_same_word(texts, items):
    for item in items:
        last = item.question.split()[-1]
        assert all(any(f" {last} {c}" in text for text in texts) for c in item.choices)


def test_choices_are_of_about_the_same_length(items):
    spreads = sorted(max(map(len, i.choices)) - min(map(len, i.choices)) for i in items)
    assert spreads[len(items) // 2] <= 6


def test_neither_place_nor_length_gives_the_answer_away(texts):
    items = knowledge_items(texts, 160)
    for choose in (
        lambda choices: 0,
        lambda choices: max(range(NUM_CHOICES), key=lambda i: len(choices[i])),
        lambda choices: min(range(NUM_CHOICES), key=lambda i: len(choices[i])),
    ):
        right = sum(choose(item.choices) == item.answer for item in items) / len(items)
        assert right < 0.35


def test_items_depend_on_texts_and_seed_alone(texts, items):
    assert knowledge_items(texts, 80) == items
    assert knowledge_items(texts, 80, seed=1) != items
    assert knowledge_items(texts, 20) == items[:20]


def test_too_few_texts_are_named(texts):
    with pytest.raises(ValueError, match="1000 questions are wanted, 50 texts give [0-9]+; ask"):
        knowledge_items(texts[:50], 1000)


def test_a_model_that_knows_the_texts_is_right_and_an_indifferent_one_guesses(texts, items):
    def knows(pairs):
        return [(0.0 if any(c + e in t for t in texts) else -1.0, False) for c, e in pairs]

    scores = choice_score(items, knows)
    for measure in scores.values():
        whole = {"interval": list(of_share(80, 80)), "number": 80}
        assert measure == {"score": 1.0, "chance": 0.25, "upper_bound": 1.0, **whole}
    constant = choice_score(items, lambda pairs: [(-1.0, False)] * len(pairs))
    first = sum(item.answer == 0 for item in items) / 80
    assert constant["knowledge/accuracy"]["score"] == first < 0.5


def test_likelihood_per_character_can_prefer_the_longer_choice():
    seen = []

    def likelihoods(pairs):
        seen.extend(pairs)
        return [(-2.0, True), (-3.0, False)]

    scores = choice_score([ITEM], likelihoods)
    assert seen == [("Grass is", " blue."), ("Grass is", " green as ever.")]
    assert scores["knowledge/accuracy"]["score"] == 0.0
    assert scores["knowledge/accuracy_per_character"]["score"] == 1.0
    assert scores["knowledge/accuracy"]["chance"] == 0.5


def test_items_come_back_from_their_file(items, tmp_path):
    write_items(tmp_path / "items.jsonl", items)
    assert read_items(tmp_path / "items.jsonl") == items
    row = json.loads((tmp_path / "items.jsonl").read_text().splitlines()[0])
    assert set(row) == {"question", "choices", "answer"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "a", "answer": 0, "id": 7}', "'choices' is missing, there are: answer, id"),
        ('{"question": "a"}', "column 'choices', 'answer' is missing"),
        ("{}", "there are: none"),
        ("[1]", "must be a JSON object"),
        ("{", "is not JSON"),
        ('{"question": 1, "choices": ["a", "b"], "answer": 0}', "question must be a string"),
        ('{"question": "a", "choices": ["a", "a"], "answer": 0}', "two different strings"),
        ('{"question": "a", "choices": "ab", "answer": 0}', "choices a list of"),
        ('{"question": "a", "choices": ["a", "b"], "answer": 2}', "0 to 1, got 2"),
        ('{"question": "a", "choices": ["a", "b"], "answer": "A"}', "0 to 1, got 'A'"),
    ],
)
def test_bad_line_is_named(line, message, tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text(
        json.dumps({"question": "a", "choices": ["b", "c"], "answer": 0}) + f"\n{line}\n"
    )
    with pytest.raises(ValueError) as error:
        read_items(path)
    assert f"{path}: line 2: " in str(error.value) and message in str(error.value)


def test_empty_file_is_named(tmp_path):
    (tmp_path / "items.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no questions; a line is {"):
        read_items(tmp_path / "items.jsonl")
    with pytest.raises(ValueError, match="there are no questions to score"):
        choice_score([], lambda pairs: [])
