"""Backgrounds of two colours for the pictures that a model is pre-trained on: stripes, checks, dots and waves.

On a background of one colour most patches of a picture look alike, and so do their tokens: all take the same few experts (LOG.md).
Released models see patches of every kind.
"""

from dataclasses import dataclass
from random import Random

import numpy as np
from PIL import Image

from symbiotic_titan.demo.scenes import BACKGROUNDS, SHADES

KINDS = ("striped", "checked", "dotted", "wavy")
# Pixels after which a pattern repeats itself.
PERIODS = (4, 6, 8, 12)


@dataclass(frozen=True)
class Pattern:
    """``slope`` (rows, columns): the direction of stripes, across which they change. ``period`` is in pixels."""

    kind: str
    colours: tuple[str, str]
    period: int
    slope: tuple[int, int]

    @property
    def name(self) -> str:
        """Such as ``striped red and blue``."""
        return f"{self.kind} {' and '.join(self.colours)}"

    def paint(self, height: int, width: int) -> np.ndarray:
        """(height, width, 3) uint8."""
        first, second = (np.array(SHADES[colour], dtype=np.uint8) for colour in self.colours)
        return np.where(self._is_first(height, width)[..., None], first, second)

    def _is_first(self, height: int, width: int) -> np.ndarray:
        """(height, width) bool: where the first colour is."""
        row_HW, column_HW = np.mgrid[:height, :width]
        period, half = self.period, self.period // 2
        if self.kind == "striped":
            across_HW = self.slope[0] * row_HW + self.slope[1] * column_HW
            return across_HW // half % 2 == 0
        if self.kind == "checked":
            return (row_HW // period + column_HW // period) % 2 == 0
        if self.kind == "dotted":
            middle = (period - 1) / 2
            row_HW, column_HW = row_HW % period - middle, column_HW % period - middle
            return row_HW**2 + column_HW**2 < (0.3 * period) ** 2
        return (row_HW + np.round(half * np.sin(np.pi * column_HW / period))) // half % 2 == 0


def draw_pattern(random: Random, shown: set[str]) -> Pattern:
    """One without the colours that a picture shows."""
    first, second = random.sample([shade for shade in SHADES if shade not in shown], 2)
    slope = random.choice(((1, 0), (0, 1), (1, 1), (1, -1)))
    return Pattern(random.choice(KINDS), (first, second), random.choice(PERIODS), slope)


def on_pattern(on_white: Image.Image, on_black: Image.Image, pattern: Pattern) -> Image.Image:
    """A picture with ``pattern`` as its background, from the same on two backgrounds of one colour: their difference says how much of
    the background each pixel shows."""
    white_3, black_3 = (np.array(BACKGROUNDS[name], np.float64) for name in ("white", "black"))
    white_HW3, black_HW3 = (np.asarray(image, np.float64) for image in (on_white, on_black))
    share_HW3 = (white_HW3 - black_HW3) / (white_3 - black_3)
    background_HW3 = pattern.paint(on_white.height, on_white.width) - black_3
    return Image.fromarray(np.round(black_HW3 + share_HW3 * background_HW3).astype(np.uint8))
