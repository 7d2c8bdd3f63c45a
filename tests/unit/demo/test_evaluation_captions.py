"""Captions of the demo world are read as what they claim, and others are refused."""

from random import Random

import pytest

from symbiotic_titan.demo import (
    digits,
    scenes,
    writing,
)
from symbiotic_titan.demo.captions import (
    ParsedCaption,
    ParsedThing,
    parse_caption,
)


def kinds(things):
    return sorted((thing.colour, thing.shape) for thing in things)


def test_captions_claim_what_the_scene_holds_and_no_more_than_they_say():
    random = Random(0)
    for _ in range(500):
        scene = scenes.draw_scene(random, heldout=False)
        short = parse_caption(scenes.short_caption(scene))
        assert kinds(short.things) == kinds(scene.things)
        assert short.background is None
        said = {thing.place for thing in short.things}
        assert said == ({scene.things[0].place} if len(scene.things) == 1 else {None})
        long = parse_caption(scenes.long_caption(scene))
        assert long.background == scene.background
        assert set(long.things) == {ParsedThing(t.colour, t.shape, t.place) for t in scene.things}
        assert len(long.things) == len(scene.things)


def test_captions_of_digits_claim_the_digit():
    for digit in digits.handwritten_digits(heldout=True)[:40]:
        for caption in (digits.short_caption(digit), digits.long_caption(digit)):
            assert parse_caption(caption) == ParsedCaption(digit=digit.value)


def test_prompts_may_be_written_freely_in_the_worlds_words():
    expected = (ParsedThing("orange", "cross", None), ParsedThing("red", "circle", "top left"))
    assert parse_caption("An orange cross and a red circle at the top left.").things == expected
    assert len(parse_caption("two orange crosses and a red circle").things) == 3


def test_relations_are_claimed_between_neighbours_in_the_caption():
    parsed = parse_caption("a red circle left of a blue square and a green cross")
    assert parsed.relations == ((0, "left of", 1),) and len(parsed.things) == 3
    assert parse_caption("a red circle above a blue square").relations == ((0, "above", 1),)


def test_captions_of_writing_claim_text_ink_and_what_the_long_one_adds():
    random = Random(1)
    for _ in range(100):
        drawn = writing.draw_writing(random, heldout=False)
        short = ParsedCaption(text=drawn.text, ink=drawn.ink)
        assert parse_caption(writing.short_caption(drawn)) == short
        long = ParsedCaption(text=drawn.text, ink=drawn.ink, background=drawn.background)
        assert parse_caption(writing.long_caption(drawn)) == long
    assert parse_caption("The word cat") == ParsedCaption(text="cat")


@pytest.mark.parametrize(
    "caption",
    [
        "a photo of a cat",
        "",
        "a pink circle",
        "a red circle in the rain",
        "a red circle and",
        "two red circles at the top left",
        "the digit eleven",
        "the word xyz in red",
        "the number 7 in red",
        "the word cat in pink",
        "two red circles above a blue square",
        "a red circle above",
        "A wide picture with a white background: .",
    ],
)
def test_caption_in_other_words_is_refused(caption):
    with pytest.raises(ValueError, match="is none of the demo world's, so its picture cannot be"):
        parse_caption(caption)
