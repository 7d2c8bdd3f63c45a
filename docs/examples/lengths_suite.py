"""An evaluation suite: how long the model's answers to a question are."""

from dataclasses import dataclass
from pathlib import Path

from symbiotic_titan.evaluation.suite import SUITES, Progress, Scores, Suite, measure_mean
from symbiotic_titan.inference.generator import Generator


@dataclass(frozen=True)
class Options:
    question: str = "Say something."
    """What the model is asked"""

    answers: int = 4
    """How many answers are generated"""

    def __post_init__(self) -> None:
        if self.answers < 1:
            raise ValueError(f"answers: must be at least 1, got {self.answers}")


def run(generator: Generator, options: Options, folder: Path, progress: Progress) -> Scores:
    texts = generator.text(
        [options.question] * options.answers,
        temperature=1.0,
        max_tokens=32,
        advance=progress("answers", options.answers),
    )
    return {"lengths/characters": measure_mean([len(text.text) for text in texts])}


SUITES.register("lengths", Suite("lengths", "how much the model says", Options, run))
