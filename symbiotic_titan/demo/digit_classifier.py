"""Which handwritten digit a picture shows: a support vector classifier that has seen the training digits only.

Scoring needs the extra ``demo``: scikit-learn, and scipy, on which it depends.
"""

from functools import lru_cache
from importlib import import_module
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from symbiotic_titan.demo.digits import (
    handwritten_digits,
    paint,
)


def demo_extra(module: str) -> Any:
    """``module`` of scikit-learn or scipy; ValueError where it is not installed."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ValueError(
            f"the demo world's score needs {module}, which comes with scikit-learn; install it: pip install scikit-learn"
        ) from error


# The set's own resolution.
SIDE = 8
# A picture whose lightest and darkest cells differ by less (in levels, 0 to 255) shows nothing.
MIN_CONTRAST = 50.0
# Training digits are also shown shifted by one cell, since a model may not centre them as the set does: of 252 held-out digits
# shifted by one cell, 46 % are misread without this, and none or one with it.
SHIFTS = ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0))
# Best of four widths and two costs in cross-validation within the training digits.
KERNEL = {"gamma": 0.2, "C": 10.0}


class DigitReader:
    """Training takes one to two seconds, and gives the same classifier every time; ``digit_reader`` does it once."""

    def __init__(self) -> None:
        """ValueError: scikit-learn is missing."""
        random = Random(0)
        digits = handwritten_digits(heldout=False)
        cells = [_cells(paint(digit, random)) for digit in digits]
        seen = [_moved(c, *offset).ravel() for offset in SHIFTS for c in cells if c is not None]
        values = [d.value for d, c in zip(digits, cells, strict=True) if c is not None]
        classifier = demo_extra("sklearn.svm").SVC(**KERNEL)
        self._classifier: Any = classifier.fit(np.stack(seen), values * len(SHIFTS))

    def read(self, image: Image.Image) -> int | None:
        """0 to 9, or None where ``image`` is blank."""
        cells = _cells(image)
        return None if cells is None else int(self._classifier.predict(cells.reshape(1, -1))[0])


@lru_cache
def digit_reader() -> DigitReader:
    """The one of this process, trained by the first call.

    Raises:
        ValueError: scikit-learn is missing.
    """
    return DigitReader()


def _cells(image: Image.Image) -> np.ndarray | None:
    """(SIDE, SIDE) grey levels, darkest 0 and lightest 1; None where they hardly differ."""
    grey = image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
    cells = np.asarray(grey, dtype=np.float32)
    contrast = cells.max() - cells.min()
    return (cells - cells.min()) / contrast if contrast >= MIN_CONTRAST else None


def _moved(cells: np.ndarray, down: int, right: int) -> np.ndarray:
    """``cells`` shifted by at most one; new ones are dark."""
    padded = np.pad(cells, 1)
    return padded[1 - down : 1 - down + SIDE, 1 - right : 1 - right + SIDE]
