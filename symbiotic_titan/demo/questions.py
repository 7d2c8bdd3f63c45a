"""Accuracy of answers to questions about images: exact match after normalisation."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

from symbiotic_titan.demo.digits import DIGIT_WORDS
from symbiotic_titan.demo.held_out import QuestionSample
from symbiotic_titan.demo.scenes import COLOURS, PLACES, RELATIONS, SHAPES
from symbiotic_titan.evaluation.suite import (
    Score,
    Scores,
    measure_mean,
)

# Kind of question -> beginning of a question -> what it asks for. The longest beginning counts; other questions are "other" in both.
KINDS = {
    "perception": {
        "which digit": "digit",
        "is this digit": "parity",
        "where is the": "place",
        "how many": "count",
        "is there": "presence",
        "which shape is at": "shape",
        "which shape is": "relation",
        "is the": "relation",
        "what colour": "colour",
    },
    "ocr": {
        "how is this word": "word",
        "which number": "number",
        "what is the first": "character",
        "what is the last": "character",
    },
    "knowledge": {
        "where does this animal": "home",
        "what does this animal": "food",
        "which colour does this animal": "favourite",
        "which animal owns": "owner",
        "where is this shape": "keeping",
    },
}
ASKED = {start: (kind, asked) for kind, starts in KINDS.items() for start, asked in starts.items()}
# What differs between questions of one wording.
NAMES = re.compile(rf"\b({'|'.join((*COLOURS, *SHAPES, *PLACES, *RELATIONS))})\b")


def normalised(answer: str) -> str:
    """``answer`` in lower case, numerals as words, without articles, punctuation and extra space. A letter "a" is no article."""
    words = re.findall(r"\w+", answer.casefold())
    spelled = [DIGIT_WORDS[int(w)] if re.fullmatch("[0-9]", w) else w for w in words]
    return re.sub(r"\b(?:a|an|the) (?=\w\w)", "", " ".join(spelled))


def kind_and_asked(question: str) -> tuple[str, str]:
    """Kind of ``question``, and what it asks for: names of KINDS, or "other" twice."""
    text = question.strip().casefold()
    starts = [start for start in ASKED if text.startswith(start)]
    return ASKED[max(starts, key=len)] if starts else ("other", "other")


def answer_score(answers: Sequence[str], samples: Sequence[QuestionSample]) -> Scores:
    """Share of right answers: of all questions (``answers/all``), by kind (``answers/ocr``) and by what they ask for.

    Chance is the best score without images: the most frequent answer to each wording of a question.

    Raises:
        ValueError: there are no samples, or not as many answers.
    """
    if not samples or len(answers) != len(samples):
        raise ValueError(
            f"one answer per question is scored, got {len(answers)} answers to {len(samples)} questions"
        )
    rows: dict[str, list[tuple[bool, str, str]]] = defaultdict(list)
    for answer, sample in zip(answers, samples, strict=True):
        true = normalised(sample.answer)
        row = (normalised(answer) == true, _wording(sample.question), true)
        kind, asked = kind_and_asked(sample.question)
        for group in dict.fromkeys(("all", sample.kind or kind, asked)):
            rows[group].append(row)
    groups = [group for group in ("all", *KINDS) if group in rows]
    return {
        f"answers/{group}": _measure(rows[group])
        for group in (*groups, *sorted(rows.keys() - set(groups)))
    }


def _wording(question: str) -> str:
    """``question`` without the names in it: without a picture they say nothing about its answer."""
    return NAMES.sub("_", question.strip().casefold())


def _measure(rows: list[tuple[bool, str, str]]) -> Score:
    """Of (is right, wording, true answer)."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for _, wording, true in rows:
        answers[wording][true] += 1
    blind = sum(counts.most_common(1)[0][1] for counts in answers.values())
    right = [is_right for is_right, *_ in rows]
    return measure_mean(right, chance=blind / len(rows), upper_bound=1.0)
