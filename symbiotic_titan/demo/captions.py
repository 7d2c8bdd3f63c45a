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
    SHAPES,
)

AMOUNTS = {"a": 1, "an": 1} | {word: i for i, word in enumerate(NUMBER_WORDS) if i > 0}


def _one_of(words: Iterable[str]) -> str:
    return f"({'|'.join(words)})"


DIGIT = re.compile(rf"(?:the|.*handwritten (?:odd|even)) digit {_one_of(DIGIT_WORDS)}\b.*")
# The format is not scored: the caller chooses a picture's size.
FORMAT = re.compile(rf"a (?:square|tall|wide) picture with a {_one_of(BACKGROUNDS)} background: ")
THING = re.compile(
    rf"{_one_of(AMOUNTS)} {_one_of(COLOURS)} {_one_of(SHAPES)}(?:e?s)?"
    rf"((?:(?:,| and)? at the (?:{'|'.join(PLACES)}))*)(?:, | and |$)"
)


@dataclass(frozen=True)
class ParsedThing:
    """``place`` is None where the caption does not say it."""

    colour: str
    shape: str
    place: str | None


@dataclass(frozen=True)
class ParsedCaption:
    """A digit, or things on a background; None for what the caption does not say."""

    digit: int | None = None
    background: str | None = None
    things: tuple[ParsedThing, ...] = ()


def parse_caption(caption: str) -> ParsedCaption:
    """What ``caption`` says, in the words of ``demo.scenes`` and ``demo.digits``.

    Raises:
        ValueError: these are not the demo world's words, so nothing about a picture can be checked.
    """
    text = caption.strip().rstrip(".").lower()
    if digit := DIGIT.fullmatch(text):
        return ParsedCaption(digit=DIGIT_WORDS.index(digit[1]))
    form = FORMAT.match(text)
    things, position = [], form.end() if form else 0
    while match := THING.match(text, position):
        things += _things(match, caption)
        position = match.end()
    if not things or position < len(text):
        raise _unknown(caption)
    return ParsedCaption(background=form[1] if form else None, things=tuple(things))


def _things(match: re.Match[str], caption: str) -> list[ParsedThing]:
    amount, colour, shape, said = match.groups()
    places: list[str | None] = [*re.findall("|".join(PLACES), said)]
    if not places:
        places = [None] * AMOUNTS[amount]
    if len(places) != AMOUNTS[amount]:
        raise _unknown(caption)
    return [ParsedThing(colour, shape, place) for place in places]


def _unknown(caption: str) -> ValueError:
    return ValueError(
        f"caption {caption!r} is none of the demo world's, so its picture cannot be checked; captions say things such as "
        "'a red circle at the top left', 'three blue crosses' or 'the digit four'"
    )
