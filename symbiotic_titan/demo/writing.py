"""Words of three letters and numbers of two or three digits: their descriptions, their pictures, and what can be said about them."""

from dataclasses import dataclass, replace
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from symbiotic_titan.data.order import hash_fraction
from symbiotic_titan.demo.glyphs import ROWS, drawn, width_of
from symbiotic_titan.demo.scenes import BACKGROUNDS, COLOURS, SHADES, format_of

# Their names are never held out as words: facts about them are asked in training. What is held out are colours and backgrounds.
ANIMALS = tuple(
    "ant ape bat bee bug cat cod cub doe dog eel emu gnu hen hog pig pug pup ram rat".split()
)
OTHER_WORDS = tuple(
    """
    bad bag ban bar bed beg bet bid big bin bit bog bud bun bus but cab can cap car cop cot cup cut dab dad dam den did dig dim din
    dip dot dug ear eat egg elm end gag gap gas get got gum gut had ham has hat her hid him hip his hit hop hot hub hug hum hut ice
    ill imp inn lab lad lap led leg let lid lip lit log lot lug mad man map mat men met mid mob mop mud mug nap net nib nod not nun
    nut oar oat old our out pad pal pan par pat pea peg pen pet pie pin pit pod pop pot pub put ran rap rib rid rig rim rip rob rod
    rot rub rug rum run sad sap sat sea set sip sit sob son sum sun tab tag tan tap tar tea tin tip toe ton top tub tug use
    """.split()
)
WORDS = tuple(sorted(ANIMALS + OTHER_WORDS))
NUMBERS = tuple(str(number) for number in range(10, 1000))
# Share of the pictures that show numbers; the others show words.
NUMBER_SHARE = 1 / 3
# Share of the words and numbers, and of an animal's colours and backgrounds, that are in held-out files only.
HELDOUT_SHARE = 0.15
# Pixels of a square of a glyph, in pictures of this (height, width) by length of the text. At half the size, 1024 pixels or fewer,
# a square is two by two pixels.
UNIT = 4
SIZES = {2: (64, 64), 3: (48, 80)}
# Pixels; a multiple of two, so that squares of glyphs stay whole at half the size.
STEP = 2


@dataclass(frozen=True)
class Writing:
    """``text`` in lower case, painted in capitals. ``size`` (height, width) and ``corner`` (row, column) are in pixels."""

    text: str
    ink: str
    background: str
    corner: tuple[int, int]

    @property
    def size(self) -> tuple[int, int]:
        return SIZES[len(self.text)]

    @property
    def colours(self) -> set[str]:
        return {self.ink}

    def description(self) -> dict[str, object]:
        """JSON-able: everything a checker needs to know."""
        return {
            "text": self.text,
            "ink": self.ink,
            "background": self.background,
            "size": list(self.size),
            "corner": list(self.corner),
        }

    def is_heldout(self) -> bool:
        """Depends on the text alone; for animals on colour and background as well."""
        if self.text in ANIMALS:
            return hash_fraction("animal", self.text, self.ink, self.background) < HELDOUT_SHARE
        return hash_fraction("writing", self.text) < HELDOUT_SHARE


def draw_writing(random: Random, heldout: bool, numbers: bool | None = None) -> Writing:
    """A number or a word for one side of the split, or either. Held-out ones are no animals, whose names are read in training."""
    if numbers is None:
        numbers = random.random() < NUMBER_SHARE
    texts = NUMBERS if numbers else OTHER_WORDS if heldout else WORDS
    while True:
        writing = _any_writing(random, random.choice(texts))
        if writing.is_heldout() == heldout:
            return writing


def draw_plain(random: Random, heldout: bool, centred: bool = False) -> Writing:
    """As ``draw_writing``, but white on black, and if ``centred`` in the middle: a small model needs many times as many pictures to tell
    the letters where colours and places differ (LOG.md)."""
    plain = replace(draw_writing(random, heldout), ink="white", background="black")
    return replace(plain, corner=_middle(plain.text)) if centred else plain


def draw_animal(random: Random, heldout: bool, animal: str) -> Writing | None:
    """Its name for one side of the split; None if that side has no colours for it."""
    written = [
        Writing(animal, ink, background, _corner(random, animal))
        for ink in COLOURS
        for background in BACKGROUNDS
    ]
    kept = [writing for writing in written if writing.is_heldout() == heldout]
    return random.choice(kept) if kept else None


def _any_writing(random: Random, text: str) -> Writing:
    ink, background = random.choice(list(COLOURS)), random.choice(list(BACKGROUNDS))
    return Writing(text, ink, background, _corner(random, text))


def _corner(random: Random, text: str) -> tuple[int, int]:
    """At least STEP from every edge of the picture."""
    height, width = SIZES[len(text)]
    return (
        STEP * random.randint(1, (height - UNIT * ROWS) // STEP - 1),
        STEP * random.randint(1, (width - UNIT * width_of(text)) // STEP - 1),
    )


def _middle(text: str) -> tuple[int, int]:
    """The corner that puts ``text`` in the middle, as far as squares of that size allow."""
    height, width = SIZES[len(text)]
    return (
        (height - UNIT * ROWS) // 2 // UNIT * UNIT,
        (width - UNIT * width_of(text)) // 2 // UNIT * UNIT,
    )


def paint(writing: Writing) -> Image.Image:
    """RGB picture of ``writing``."""
    height, width = writing.size
    pixels_HW3 = np.empty((height, width, 3), dtype=np.uint8)
    pixels_HW3[:] = BACKGROUNDS[writing.background]
    ink_HW = drawn(writing.text).repeat(UNIT, axis=0).repeat(UNIT, axis=1)
    row, column = writing.corner
    box_HW3 = pixels_HW3[row : row + ink_HW.shape[0], column : column + ink_HW.shape[1]]
    box_HW3[ink_HW] = SHADES[writing.ink]
    return Image.fromarray(pixels_HW3)


def say(task: str, writing: Writing, random: Random) -> dict[str, Any]:
    """The text fields of a sample of ``task`` about ``writing``."""
    if task == "mmu":
        question, answer = ask(writing, random)
        return {"question": question, "answer": answer}
    return {"caption": long_caption(writing) if task == "t2i_long" else short_caption(writing)}


def is_number(text: str) -> bool:
    return text.isdecimal()


def spelled(text: str) -> str:
    """One character at a time, so that letters which a model has read elsewhere tell it a word that it never read."""
    return " ".join(text)


def noun(text: str) -> str:
    return f"the {'number' if is_number(text) else 'word'} {text}"


def short_caption(writing: Writing) -> str:
    return f"{noun(writing.text)} in {writing.ink}"


def long_caption(writing: Writing) -> str:
    """The format, the background, and the text once more, one character at a time."""
    return (
        f"A {format_of(writing.size)} picture with a {writing.background} background: {noun(writing.text)}, "
        f"written {spelled(writing.text)}, in {writing.ink}."
    )


def ask(writing: Writing, random: Random) -> tuple[str, str]:
    """(question, answer): all of the text, or its first or last character."""
    what = "number" if is_number(writing.text) else "word"
    part = "digit" if is_number(writing.text) else "letter"
    draw = random.random()
    if draw < 0.2:
        return f"What is the first {part} of this {what}?", writing.text[0]
    if draw < 0.4:
        return f"What is the last {part} of this {what}?", writing.text[-1]
    if what == "number":
        return "Which number is written here?", writing.text
    return "How is this word spelled?", spelled(writing.text)
