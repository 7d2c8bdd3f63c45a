"""Parses captions of the demo world. Only what a caption says is scored: a short one of several things names no places."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from symbiotic_titan.demo.digits import DIGIT_WORDS
from symbiotic_titan.demo.scenes import (
    BACKGROUNDS,
    COLOURS,
    NUMBER_WORDS,
    PLACES,
    RELATIONS,
    SHAPES,
)
from symbiotic_titan.demo.writing import NUMBERS, WORDS

AMOUNTS = {"a": 1, "an": 1} | {word: i for i, word in enumerate(NUMBER_WORDS) if i > 0}


def _one_of(words: Iterable[str]) -> str:
    return f"({'|'.join(words)})"


DIGIT = re.compile(rf"(?:the|.*handwritten (?:odd|even)) digit {_one_of(DIGIT_WORDS)}\b.*")
# The format is not scored: the caller chooses a picture's size.
FORMAT = re.compile(rf"a (?:square|tall|wide) picture with a {_one_of(BACKGROUNDS)} background: ")
THING = re.compile(
    rf"{_one_of(AMOUNTS)} {_one_of(COLOURS)} {_one_of(SHAPES)}(?:e?s)?"
    rf"((?:(?:,| and)? at the (?:{'|'.join(PLACES)}))*)(?:, | and | {_one_of(RELATIONS)} |$)"
)
# Without a colour nothing is claimed of it. A number is written in digits, so that no word is one.
WRITING = re.compile(
    rf"the (?:word {_one_of(WORDS)}|number {_one_of(NUMBERS)})(?:, written [a-z0-9 ]+,)?(?: in {_one_of(COLOURS)})?"
)


@dataclass(frozen=True)
class ParsedThing:
    """``place`` is None where the caption does not say it."""

    colour: str
    shape: str
    place: str | None


@dataclass(frozen=True)
class ParsedCaption:
    """A handwritten digit, or a word or number, or things on a background; None for what the caption does not say.

    ``relations`` are (number of a thing, relation, number of another thing).
    """

    digit: int | None = None
    background: str | None = None
    things: tuple[ParsedThing, ...] = ()
    relations: tuple[tuple[int, str, int], ...] = ()
    text: str | None = None
    ink: str | None = None


def parse_caption(caption: str) -> ParsedCaption:
    """What ``caption`` says, in the words of ``demo.scenes`` and ``demo.digits``.

    Raises:
        ValueError: these are not the demo world's words, so nothing about a picture can be checked.
    """
    text = caption.strip().rstrip(".").lower()
    if digit := DIGIT.fullmatch(text):
        return ParsedCaption(digit=DIGIT_WORDS.index(digit[1]))
    form = FORMAT.match(text)
    background, said = (form[1], text[form.end() :]) if form else (None, text)
    if writing := WRITING.fullmatch(said):
        word, number, ink = writing.groups()
        return ParsedCaption(background=background, text=word or number, ink=ink)
    things, relations = _scene(said, caption)
    return ParsedCaption(background=background, things=things, relations=relations)


def _scene(
    said: str, caption: str
) -> tuple[tuple[ParsedThing, ...], tuple[tuple[int, str, int], ...]]:
    """Things, and relations between neighbours in the caption."""
    things: list[ParsedThing] = []
    relations: list[tuple[int, str, int]] = []
    position, relation = 0, None
    while match := THING.match(said, position):
        found, follows = _things(match, caption), match[5]
        if (relation or follows) and len(found) > 1:
            raise _unknown(caption)
        if relation:
            relations.append((len(things) - 1, relation, len(things)))
        things += found
        position, relation = match.end(), follows
    if not things or position < len(said) or relation:
        raise _unknown(caption)
    return tuple(things), tuple(relations)


def _things(match: re.Match[str], caption: str) -> list[ParsedThing]:
    amount, colour, shape, said, _ = match.groups()
    places: list[str | None] = [*re.findall("|".join(PLACES), said)]
    if not places:
        places = [None] * AMOUNTS[amount]
    if len(places) != AMOUNTS[amount]:
        raise _unknown(caption)
    return [ParsedThing(colour, shape, place) for place in places]


def _unknown(caption: str) -> ValueError:
    return ValueError(
        f"caption {caption!r} is none of the demo world's, so its picture cannot be checked; captions say things such as "
        "'a red circle at the top left', 'a cross above a blue square', 'three blue crosses', 'the digit four' or 'the word cat in red'"
    )
