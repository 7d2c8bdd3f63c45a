"""Multiple choice on facts of the training text: which of four endings does a sentence that was trained on have?

An item is the beginning of a training text, its true ending, and three endings of other training texts. All four follow the
same word and have about the same length, so that grammar and length reveal little. Items of held-out texts, made by the same
function, measure how much they still reveal.

Items are lines of JSON with the columns of MMLU: {"question": "...", "choices": ["...", ...], "answer": 2}.
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from symbiotic_titan.data.order import hash_key
from symbiotic_titan.evaluation.suite import Scores, measure_mean

NUM_CHOICES = 4
# A sentence is cut after one of these words: much can follow them.
CUT_AFTER = (
    "a",
    "an",
    "and",
    "by",
    "for",
    "from",
    "in",
    "is",
    "of",
    "or",
    "that",
    "the",
    "to",
    "with",
)
# Words before the cut, and after it.
MIN_QUESTION_WORDS = 5
ENDING_WORDS = range(2, 9)
# Wrong endings are drawn from this many of the most similar lengths.
NEAREST = 12

SENTENCE = re.compile(r"[^\n]+?(?<!\be\.g)(?<!\bi\.e)[.!?](?=\s|$)")
COLUMNS = ("question", "choices", "answer")


@dataclass(frozen=True)
class ChoiceItem:
    """``question`` continues, after a space, with ``choices[answer]``."""

    question: str
    choices: tuple[str, ...]
    answer: int


# (context, continuation) pairs -> for each the log-likelihood of the continuation, and whether greedy decoding would give it.
LogLikelihood = Callable[[list[tuple[str, str]]], list[tuple[float, bool]]]


@dataclass(frozen=True)
class _Cut:
    question: str
    ending: str

    @property
    def last_word(self) -> str:
        return self.question.rpartition(" ")[2]


def knowledge_items(texts: Sequence[str], number: int, seed: int = 0) -> list[ChoiceItem]:
    """``number`` items about different sentences of ``texts``; the same ones for the same arguments.

    Raises:
        ValueError: the texts give fewer.
    """
    cuts = [cut for text in dict.fromkeys(texts) if (cut := _cut(text, seed))]
    by_word: dict[str, list[_Cut]] = defaultdict(list)
    for cut in cuts:
        by_word[cut.last_word].append(cut)
    together = "\n\n".join(texts)
    items: list[ChoiceItem] = []
    for cut in sorted(cuts, key=lambda c: hash_key("item", seed, c.question)):
        # Skip a question that occurs with more than one ending.
        if len(items) < number and together.count(cut.question) == 1:
            wrong = _wrong_endings(cut, by_word[cut.last_word], seed)
            items += [_item(cut, wrong, seed)] if len(wrong) == NUM_CHOICES - 1 else []
    if len(items) < number:
        raise ValueError(
            f"{number} questions are wanted, {len(texts)} texts give {len(items)}; ask for fewer, or read more text"
        )
    return items


def _cut(text: str, seed: int) -> _Cut | None:
    """The first sentence of ``text`` in two; None where it cannot be cut."""
    sentence = SENTENCE.match(text)
    words = sentence[0].split() if sentence else []
    places = [
        i
        for i in range(MIN_QUESTION_WORDS, len(words))
        if words[i - 1] in CUT_AFTER and len(words) - i in ENDING_WORDS
    ]
    if not places:
        return None
    place = places[hash_key("cut", seed, text) % len(places)]
    return _Cut(" ".join(words[:place]), " ".join(words[place:]))


def _wrong_endings(cut: _Cut, others: list[_Cut], seed: int) -> list[str]:
    """Endings after the same word that begin and end differently from the true one and from each other."""
    nearest = sorted(
        others,
        key=lambda o: (
            abs(len(o.ending) - len(cut.ending)),
            hash_key(seed, cut.question, o.ending),
        ),
    )
    wrong: list[str] = []
    seen = {_first_word(cut.ending)}
    candidates = [o.ending for o in nearest if _first_word(o.ending) not in seen][:NEAREST]
    for ending in sorted(candidates, key=lambda e: hash_key("wrong", seed, cut.question, e)):
        if _first_word(ending) not in seen and len(wrong) < NUM_CHOICES - 1:
            seen.add(_first_word(ending))
            wrong.append(ending)
    return wrong


def _first_word(ending: str) -> str:
    return ending.split()[0].casefold().strip(".,;:")


def _item(cut: _Cut, wrong: list[str], seed: int) -> ChoiceItem:
    answer = hash_key("place", seed, cut.question) % NUM_CHOICES
    choices = [*wrong[:answer], cut.ending, *wrong[answer:]]
    return ChoiceItem(cut.question, tuple(choices), answer)


def write_items(path: Path, items: Sequence[ChoiceItem]) -> None:
    path.write_text("".join(json.dumps(asdict(item)) + "\n" for item in items), encoding="utf-8")


def read_items(path: Path) -> list[ChoiceItem]:
    """Items of a JSONL file; columns other than COLUMNS are ignored.

    Raises:
        ValueError: a line is no JSON object, lacks a column, or has one of the wrong kind; or there are no lines.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    items = [
        _parse(line, f"{path}: line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not items:
        raise ValueError(f"{path}: holds no questions; a line is {_example()}")
    return items


def _parse(line: str, where: str) -> ChoiceItem:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: is not JSON ({error}); a line is {_example()}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: must be a JSON object such as {_example()}")
    if missing := [column for column in COLUMNS if column not in row]:
        raise ValueError(
            f"{where}: column {', '.join(map(repr, missing))} is missing, there are: "
            f"{', '.join(sorted(row)) or 'none'}; a line is {_example()}"
        )
    question, choices, answer = (row[column] for column in COLUMNS)
    if not isinstance(question, str) or not _are_texts(choices):
        raise ValueError(
            f"{where}: question must be a string and choices a list of at least two different strings; "
            f"a line is {_example()}"
        )
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ValueError(
            f"{where}: answer must be the number of the right choice, 0 to {len(choices) - 1}, got {answer!r}"
        )
    return ChoiceItem(question, tuple(choices), answer)


def _are_texts(choices: Any) -> bool:
    """Whether these are at least two different strings, none of them empty."""
    if not isinstance(choices, list) or not all(isinstance(c, str) and c for c in choices):
        return False
    return len(choices) >= 2 and len(set(choices)) == len(choices)


def _example() -> str:
    return '{"question": "Grass is", "choices": ["green.", "blue."], "answer": 0}'


def choice_score(items: Sequence[ChoiceItem], loglikelihood: LogLikelihood) -> Scores:
    """Share of items whose true choice is the most likely one: by its log-likelihood (``knowledge/accuracy``) and by that per
    character (``knowledge/accuracy_per_character``), which are lm-eval's acc and acc_norm.

    All pairs go through ``loglikelihood`` in one call; ties go to the first choice.

    Raises:
        ValueError: there are no items.
    """
    if not items:
        raise ValueError("there are no questions to score")
    pairs = [(item.question, f" {choice}") for item in items for choice in item.choices]
    results = loglikelihood(pairs)
    assert len(results) == len(pairs), "one log-likelihood per pair"
    likelihoods = iter([value for value, _ in results])
    right: dict[str, list[bool]] = {"accuracy": [], "accuracy_per_character": []}
    for item in items:
        values = [next(likelihoods) for _ in item.choices]
        per_character = [v / len(c) for v, c in zip(values, item.choices, strict=True)]
        right["accuracy"].append(_best(values) == item.answer)
        right["accuracy_per_character"].append(_best(per_character) == item.answer)
    chance = sum(1 / len(item.choices) for item in items) / len(items)
    return {
        f"knowledge/{name}": measure_mean(found, chance=chance, upper_bound=1.0)
        for name, found in right.items()
    }


def _best(values: list[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)
