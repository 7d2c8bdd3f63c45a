"""Words and numbers are painted as said and read back by the program, and held-out texts are never in training."""

from random import Random

import numpy as np
import pytest
from PIL import Image, ImageFilter

from symbiotic_titan.data.images import fit_size
from symbiotic_titan.demo import scenes, writing
from symbiotic_titan.demo.captions import parse_caption
from symbiotic_titan.demo.glyphs import DIGITS, DRAWN, LETTERS, glyph
from symbiotic_titan.demo.word_reader import read_writing, writing_facts
from symbiotic_titan.demo.writing import ANIMALS, NUMBERS, WORDS, Writing

CAT = Writing("cat", "red", "white", (10, 6))


def as_a_model_draws(image, num_pixels):
    """In the size of a picture of at most ``num_pixels`` in patches of 4."""
    height, width = fit_size(image.height, image.width, num_pixels, 4)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def noisy(image, std, seed):
    levels = np.asarray(image, dtype=float)
    noise = np.random.default_rng(seed).normal(0, std * 127.5, levels.shape)
    return Image.fromarray((levels + noise).clip(0, 255).round().astype(np.uint8))


def test_glyphs_differ_in_many_squares_and_words_are_written_in_them():
    assert all(glyph(character).shape == (7, 5) for character in DRAWN)
    for characters in (LETTERS, DIGITS):
        pairs = [(a, b) for a in characters for b in characters if a < b]
        assert min((glyph(a) != glyph(b)).sum() for a, b in pairs) >= 2
    assert set("".join(WORDS)) == set(LETTERS) and set("".join(NUMBERS)) == set(DIGITS)
    assert len(set(WORDS)) == len(WORDS) and {len(word) for word in WORDS} == {3}
    assert not set(WORDS) & set(scenes.COLOURS)


def test_every_word_is_read_from_its_picture():
    random = Random(0)
    for text in (*WORDS, *random.sample(NUMBERS, 40)):
        colours = random.choice(list(scenes.COLOURS)), random.choice(list(scenes.BACKGROUNDS))
        drawn = Writing(text, *colours, (10, 6))
        found = read_writing(as_a_model_draws(writing.paint(drawn), 1024))
        assert (found.text, found.ink, found.background) == (text, *colours)


@pytest.mark.parametrize(("num_pixels", "std", "blur"), [(2304, 0.2, 0), (1024, 0.2, 0), (1024, 0, 1)])  # fmt: skip
def test_noise_and_blur_change_next_to_nothing(num_pixels, std, blur):
    random, right = Random(1), 0
    for seed in range(30):
        drawn = writing.draw_writing(random, heldout=True)
        picture = as_a_model_draws(writing.paint(drawn), num_pixels)
        picture = noisy(picture.filter(ImageFilter.GaussianBlur(blur)), std, seed)
        right += set(writing_facts(parse_caption(writing.long_caption(drawn)), read_writing(picture)).values()) == {1.0}  # fmt: skip
    assert right >= 29


def test_another_text_ink_or_background_loses_that_fact_alone():
    claims = parse_caption(writing.long_caption(CAT))
    changes = {
        Writing("cut", "red", "white", CAT.corner): {"words": 0.0, "writing/character": 2 / 3},
        Writing("cat", "blue", "white", CAT.corner): {"writing/ink": 0.0},
        Writing("cat", "red", "black", CAT.corner): {"writing/background": 0.0},
        CAT: {},
    }
    for drawn, lost in changes.items():
        facts = writing_facts(claims, read_writing(writing.paint(drawn)))
        assert {name: share for name, share in facts.items() if share < 1.0} == lost
    blank = Image.new("RGB", (80, 48), scenes.BACKGROUNDS["white"])
    facts = writing_facts(claims, read_writing(blank))
    assert [name for name, share in facts.items() if share] == ["writing/background"]


def test_nothing_is_read_where_nothing_is_written():
    random = Random(2)
    painted = [scenes.paint(scenes.draw_scene(random, False)) for _ in range(30)]
    assert sum(read_writing(image).text is not None for image in painted) <= 3
    grains = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    assert read_writing(Image.fromarray(grains)).text is None


def test_ink_is_inside_the_picture_and_nowhere_else():
    random = Random(3)
    for _ in range(100):
        drawn = writing.draw_writing(random, False)
        pixels = np.asarray(writing.paint(drawn))
        assert pixels.shape[:2] == drawn.size
        ink = (pixels == scenes.COLOURS[drawn.ink]).all(-1)
        ground = (pixels == scenes.BACKGROUNDS[drawn.background]).all(-1)
        assert (ink ^ ground).all() and not ink[:2].any() and not ink[:, :2].any()


def test_answers_follow_from_the_text():
    random, asked = Random(4), set()
    for _ in range(300):
        drawn = writing.draw_writing(random, False)
        question, answer = writing.ask(drawn, random)
        asked.add(question)
        part = {"first": 0, "last": -1}.get(question.split()[3])
        expected = drawn.text if part is None else drawn.text[part]
        # A word letter by letter, a number as it is.
        assert answer == (" ".join(expected) if "spelled" in question else expected)
        assert ("spelled" in question) == (part is None and "word" in question)
        assert ("number" in question) == drawn.text.isdecimal()
    assert len(asked) == 6


def test_a_heldout_text_is_never_in_training_and_an_animal_only_in_other_colours():
    random = Random(5)
    seen = {side: [writing.draw_writing(random, side) for _ in range(1500)] for side in (0, 1)}
    texts = {side: {w.text for w in drawn} for side, drawn in seen.items()}
    assert not texts[0] & texts[1] and set(ANIMALS) <= texts[0] and len(texts[1]) > 100
    for animal in ANIMALS:
        drawn = [writing.draw_animal(random, side, animal) for side in (False, True)]
        assert drawn[0].text == animal
        assert drawn[1] is None or drawn[1].is_heldout()
