"""What is made once for all tests of scores."""

from random import Random

import pytest

from symbiotic_titan.demo import (
    digits,
    scenes,
)
from symbiotic_titan.demo.digit_classifier import digit_reader


@pytest.fixture(scope="session")
def reader():
    return digit_reader()


@pytest.fixture(scope="session")
def world():
    """(number, seed) -> that many pictures of the demo world, a third of them digits."""
    pool = digits.handwritten_digits(heldout=True)

    def draw(number, seed):
        random = Random(seed)
        return [
            digits.paint(random.choice(pool), random)
            if random.random() < 1 / 3
            else scenes.paint(scenes.draw_scene(random, heldout=True))
            for _ in range(number)
        ]

    return draw
