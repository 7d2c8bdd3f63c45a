"""Capital letters and digits of five by seven squares, drawn here: no font file, so that every version of every library paints the same.

Only the letters of the demo world's words are there. Digits and letters differ everywhere: the zero has a stroke, the letter O none.
"""

import numpy as np

ROWS, COLUMNS = 7, 5
# Columns from the left edge of one character to that of the next.
PITCH = COLUMNS + 1

DRAWN = {
    "a": ".###. #...# #...# ##### #...# #...# #...#",
    "b": "####. #...# #...# ####. #...# #...# ####.",
    "c": ".#### #.... #.... #.... #.... #.... .####",
    "d": "####. #...# #...# #...# #...# #...# ####.",
    "e": "##### #.... #.... ####. #.... #.... #####",
    "g": ".#### #.... #.... #..## #...# #...# .####",
    "h": "#...# #...# #...# ##### #...# #...# #...#",
    "i": "##### ..#.. ..#.. ..#.. ..#.. ..#.. #####",
    "l": "#.... #.... #.... #.... #.... #.... #####",
    "m": "#...# ##.## #.#.# #.#.# #...# #...# #...#",
    "n": "#...# ##..# ##..# #.#.# #..## #..## #...#",
    "o": ".###. #...# #...# #...# #...# #...# .###.",
    "p": "####. #...# #...# ####. #.... #.... #....",
    "r": "####. #...# #...# ####. #.#.. #..#. #...#",
    "s": ".#### #.... #.... .###. ....# ....# ####.",
    "t": "##### ..#.. ..#.. ..#.. ..#.. ..#.. ..#..",
    "u": "#...# #...# #...# #...# #...# #...# .###.",
    "0": ".###. #...# #..## #.#.# ##..# #...# .###.",
    "1": "..#.. .##.. #.#.. ..#.. ..#.. ..#.. .###.",
    "2": ".###. #...# ....# ...#. ..#.. .#... #####",
    "3": "####. ....# ....# ..##. ....# ....# ####.",
    "4": "...#. ..##. .#.#. #..#. ##### ...#. ...#.",
    "5": "##### #.... ####. ....# ....# #...# .###.",
    "6": "..##. .#... #.... ####. #...# #...# .###.",
    "7": "##### ....# ...#. ...#. ..#.. ..#.. ..#..",
    "8": ".###. #...# #...# .###. #...# #...# .###.",
    "9": ".###. #...# #...# .#### ....# ...#. .##..",
}
LETTERS = "".join(character for character in DRAWN if character.isalpha())
DIGITS = "".join(character for character in DRAWN if character.isdigit())


def glyph(character: str) -> np.ndarray:
    """(ROWS, COLUMNS) bool: where ``character`` has ink."""
    return np.array([[square == "#" for square in row] for row in DRAWN[character].split()])


def width_of(text: str) -> int:
    """Columns of ``text``."""
    return PITCH * len(text) - 1


def drawn(text: str) -> np.ndarray:
    """(ROWS, width_of(text)) bool: where ``text`` has ink."""
    ink = np.zeros((ROWS, width_of(text)), dtype=bool)
    for number, character in enumerate(text):
        ink[:, PITCH * number : PITCH * number + COLUMNS] = glyph(character)
    return ink
