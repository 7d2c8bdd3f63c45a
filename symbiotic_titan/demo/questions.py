"""Accuracy of answers to questions about images: exact match after normalisation."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

from symbiotic_titan.demo.digits import DIGIT_WORDS
from symbiotic_titan.demo.held_out import QuestionSample
from symbiotic_titan.evaluation.suite import (
    Score,
    Scores,
)

# Beginning of a question of the demo world -> what it asks for; other questions are of the kind "other".
KINDS = {
    "which digit": "digit",
    "is this digit": "parity",
    "where is": "place",
    "how many": "count",
    "is there": "presence",
    "which shape": "shape",
    "what colour": "colour",
}


def normalised(answer: str) -> str:
    """``answer`` in lower case, numerals as words, without articles, punctuation and extra space."""
    words = re.findall(r"\w+", answer.casefold())
    spelled = [DIGIT_WORDS[int(w)] if re.fullmatch("[0-9]", w) else w for w in words]
    return " ".join(word for word in spelled if word not in ("a", "an", "the"))


def kind_of(question: str) -> str:
    """What ``question`` asks for: one of KINDS, or "other"."""
    text = question.strip().casefold()
    return next((kind for start, kind in KINDS.items() if text.startswith(start)), "other")


def answer_score(answers: Sequence[str], samples: Sequence[QuestionSample]) -> Scores:
    """Share of right answers, of all questions (``answers/all``) and by what they ask for.

    Chance is the best score without images: the most frequent answer to each kind of question.

    Raises:
        ValueError: there are no samples, or not as many answers.
    """
    if not samples or len(answers) != len(samples):
        raise ValueError(
            f"one answer per question is scored, got {len(answers)} answers to {len(samples)} questions"
        )
    right: dict[str, list[bool]] = defaultdict(list)
    true: dict[str, Counter[str]] = defaultdict(Counter)
    for answer, sample in zip(answers, samples, strict=True):
        kind = kind_of(sample.question)
        right[kind].append(normalised(answer) == normalised(sample.answer))
        true[kind][normalised(sample.answer)] += 1
    blind = {kind: true[kind].most_common(1)[0][1] for kind in right}
    total = len(samples)
    everything = _measure(sum(map(sum, right.values())), sum(blind.values()), total)
    by_kind = {
        f"answers/{kind}": _measure(sum(right[kind]), blind[kind], len(right[kind]))
        for kind in sorted(right)
    }
    return {"answers/all": everything} | by_kind


def _measure(right: int, blind: int, number: int) -> Score:
    return Score(score=right / number, chance=blind / number, upper_bound=1.0, number=number)
