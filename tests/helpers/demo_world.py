"""A demo world that is written in a moment."""

import random

from symbiotic_titan.demo.write import (
    WorldSize,
)

TINY = WorldSize(18, 6, 21, 5, train_shards=3)
WORDS = ("a", "tree", "of", "lines", "returns", "the", "number", "whose", "name", "is", "given")
WEIGHTS = {"t2i": 3.0, "t2i_long": 3.0, "lm": 2.0, "mmu": 2.0}


def fixed_texts(seed, heldout):
    """Sentences of 80 to 1700 characters, most of them short. The demo world's own texts are those of the Python at hand, and with
    them go how rows fill and mix."""
    draw = random.Random(f"{seed} {heldout}")
    while True:
        length = min(1700, max(80, int(draw.lognormvariate(5.5, 0.9))))
        words = (draw.choice(WORDS) for _ in range(length))
        yield {"text": " ".join(words)[: length - 1] + ".", "module": "fixed"}
