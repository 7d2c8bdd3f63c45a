"""Which word or number a picture shows, in which colour, on which background: found by comparing with the demo world's own glyphs.

All pixels are mixtures of the background and one ink, so each has a share of ink. Every text is tried at every position, in sizes a
little smaller and larger than the world's, and the one is read whose glyphs correlate best with these shares. Of 200 words and
numbers at 3840, 2304, 1600 and 1024 pixels all are read, also with noise of 0.4 of the range from -1 to 1 or a blur of one pixel;
with a blur of one pixel and noise of 0.2 at 1024 pixels 99.5 %.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from symbiotic_titan.demo.captions import ParsedCaption
from symbiotic_titan.demo.glyphs import DIGITS, LETTERS, PITCH, glyph
from symbiotic_titan.demo.pictures import levels
from symbiotic_titan.demo.scene_reader import border_colour, palette_name
from symbiotic_titan.demo.scenes import COLOURS
from symbiotic_titan.demo.writing import SIZES, UNIT, is_number

# Kinds of facts beside the text itself, in the order of tables. ``character`` is the share of the text's characters.
FACTS = ("character", "ink", "background")

# Pixels of a square of a glyph in the pictures that are compared, if the writing has the world's size; and the sizes that are tried.
SQUARE = 2
SCALES = (0.92, 1.0, 1.08)
CHARACTERS = LETTERS + DIGITS
# Below this correlation nothing is written.
MIN_CORRELATION = 0.5
# Inks nearer to the background (in levels, 0 to 255) cannot be told from it.
MIN_CONTRAST = 40.0
# Shares of ink that vary less than this within a glyph's window are no glyph.
MIN_DEVIATION = 0.15


@dataclass(frozen=True)
class FoundWriting:
    """``text`` is None where nothing is written; then ``ink`` says nothing. ``background`` is any colour of the palette."""

    text: str | None
    ink: str
    background: str


def read_writing(image: Image.Image) -> FoundWriting:
    """Text of two characters in pictures that are about square, of three in the others."""
    aspect = image.width / image.height
    length = min(SIZES, key=lambda n: abs(SIZES[n][1] / SIZES[n][0] - aspect))
    ground_3 = border_colour(levels(image))
    ink, share_HW = _share_of_ink(levels(image), ground_3)
    height, width = (side * SQUARE // UNIT for side in SIZES[length])
    found = []
    for scale in SCALES:
        size = round(width * scale), round(height * scale)
        resized = Image.fromarray(share_HW).resize(size, Image.Resampling.BICUBIC)
        found.append(_best_text(np.asarray(resized), length))
    correlation, text = max(found)
    return FoundWriting(
        text if correlation >= MIN_CORRELATION else None, ink, palette_name(ground_3)
    )


def _share_of_ink(pixels_HW3: np.ndarray, ground_3: np.ndarray) -> tuple[str, np.ndarray]:
    """The ink with which the picture is explained best as a mixture, and (H, W) float32 its shares, 0 to 1."""
    offsets_HW3 = pixels_HW3 - ground_3
    best: tuple[float, str, np.ndarray] | None = None
    for name, colour in COLOURS.items():
        way_3 = np.array(colour, dtype=np.float32) - ground_3
        length = float((way_3**2).sum())
        if length < MIN_CONTRAST**2:
            continue
        share_HW = np.clip(offsets_HW3 @ way_3 / length, 0.0, 1.0)
        misfit = float(((offsets_HW3 - share_HW[..., None] * way_3) ** 2).sum())
        if best is None or misfit < best[0]:
            best = misfit, name, share_HW
    assert best is not None, "no background is near all inks"
    return best[1], best[2].astype(np.float32)


@lru_cache
def _templates() -> np.ndarray:
    """(K, rows, columns) float32: CHARACTERS with an empty square around them, of mean 0 and length 1."""
    padded = [np.pad(glyph(character), 1) for character in CHARACTERS]
    large_KHW = np.stack(padded).astype(np.float32).repeat(SQUARE, axis=1).repeat(SQUARE, axis=2)
    large_KHW -= large_KHW.mean((1, 2), keepdims=True)
    return large_KHW / np.sqrt((large_KHW**2).sum((1, 2), keepdims=True))


def _correlations(share_HW: np.ndarray) -> np.ndarray:
    """(Y, X, K): of every glyph with the window at every position."""
    templates_KHW = _templates()
    rows, columns = templates_KHW.shape[1:]
    padded_HW = np.pad(share_HW, SQUARE)
    windows = np.lib.stride_tricks.sliding_window_view(padded_HW, (rows, columns))
    deviations_YX = np.maximum(windows.std((2, 3)), MIN_DEVIATION)
    products_YXK = np.tensordot(windows, templates_KHW, axes=((2, 3), (1, 2)))
    return products_YXK / (deviations_YX[..., None] * (rows * columns) ** 0.5)


def _best_text(share_HW: np.ndarray, length: int) -> tuple[float, str]:
    """(mean correlation, text) of the best text of ``length`` letters or digits."""
    scores_YXK = _correlations(share_HW)
    letters, digits = scores_YXK[..., : len(LETTERS)], scores_YXK[..., len(LETTERS) :]
    return max(_best_of(letters, LETTERS, length), _best_of(digits, DIGITS, length))


def _best_of(scores_YXK: np.ndarray, characters: str, length: int) -> tuple[float, str]:
    best_YX, step = scores_YXK.max(-1), PITCH * SQUARE
    starts = best_YX.shape[1] - (length - 1) * step
    total_YX = sum(best_YX[:, i * step : i * step + starts] for i in range(length)) / length
    y, x = np.unravel_index(int(np.argmax(total_YX)), total_YX.shape)
    numbers = [int(scores_YXK[y, x + i * step].argmax()) for i in range(length)]
    return float(total_YX[y, x]), "".join(characters[number] for number in numbers)


def writing_facts(parsed: ParsedCaption, found: FoundWriting) -> dict[str, float]:
    """Share of the caption's facts of each kind that ``found`` shows: its text as "words" or "numbers", and FACTS below "writing/".

    What is not written has no ink. Kinds that the caption does not mention are left out.
    """
    assert parsed.text is not None, "a caption of a word or a number"
    same = [a == b for a, b in zip(parsed.text, found.text or "", strict=False)]
    facts = {
        "numbers" if is_number(parsed.text) else "words": float(parsed.text == found.text),
        "writing/character": sum(same) / len(parsed.text),
    }
    if parsed.ink:
        facts["writing/ink"] = float(found.text is not None and found.ink == parsed.ink)
    if parsed.background:
        facts["writing/background"] = float(found.background == parsed.background)
    return facts
