"""Real handwritten digits (scikit-learn's bundled set), enlarged, and what can be said about them."""

from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from symbiotic_titan.data.order import hash_fraction

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIDES = (48, 64)
# Share of the handwritten images that are in held-out files only.
HELDOUT_SHARE = 0.15
# Grey levels of the set run from 0 to 16.
MAX_LEVEL = 16.0


@dataclass(frozen=True)
class Digit:
    """Image number ``index`` of the set, which shows ``value``; ``levels`` is (8, 8)."""

    index: int
    value: int
    levels: np.ndarray

    def description(self) -> dict[str, object]:
        """JSON-able: everything a checker needs to know."""
        return {"digit": self.value, "index": self.index}


def handwritten_digits(heldout: bool) -> list[Digit]:
    """All images of one side of the split, in the order of the set; ValueError where scikit-learn is missing."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError(
            "the demo world's digits come with scikit-learn; install it: pip install scikit-learn"
        ) from error
    bundle = load_digits()
    return [
        Digit(i, int(value), levels)
        for i, (value, levels) in enumerate(zip(bundle.target, bundle.images, strict=True))
        if (hash_fraction("digit", i) < HELDOUT_SHARE) == heldout
    ]


def paint(digit: Digit, random: Random) -> Image.Image:
    """RGB picture, light on dark, of one of a few sizes."""
    grey = Image.fromarray(np.round(digit.levels * (255.0 / MAX_LEVEL)).astype(np.uint8), "L")
    side = random.choice(SIDES)
    return grey.resize((side, side), Image.Resampling.BICUBIC).convert("RGB")


def say(task: str, digit: Digit, random: Random) -> dict[str, Any]:
    """The text fields of a sample of ``task`` about ``digit``."""
    if task == "mmu":
        question, answer = ask(digit, random)
        return {"question": question, "answer": answer}
    return {"caption": long_caption(digit) if task == "t2i_long" else short_caption(digit)}


def short_caption(digit: Digit) -> str:
    return f"the digit {DIGIT_WORDS[digit.value]}"


def long_caption(digit: Digit) -> str:
    parity = "odd" if digit.value % 2 else "even"
    return (
        f"A square black picture with the handwritten {parity} digit "
        f"{DIGIT_WORDS[digit.value]} ({digit.value}) in white."
    )


def ask(digit: Digit, random: Random) -> tuple[str, str]:
    """(question, answer); the answer follows from the digit."""
    if random.random() < 0.75:
        return "Which digit is this?", DIGIT_WORDS[digit.value]
    return "Is this digit odd or even?", "odd" if digit.value % 2 else "even"
