"""Backgrounds of two colours: a picture on one is what it would be if it had been painted on it, and its description says which."""

import io
import json
import re
import tarfile
from collections import Counter
from dataclasses import replace
from random import Random

import numpy as np
import pytest
from PIL import Image

from symbiotic_titan.demo import scenes, writing
from symbiotic_titan.demo.patterns import KINDS, PERIODS, Pattern, draw_pattern, on_pattern
from symbiotic_titan.demo.questions import kind_and_asked
from symbiotic_titan.demo.scenes import BACKGROUNDS, SHADES
from symbiotic_titan.demo.write import WorldSize, write_world


def painted(shown, pattern):
    paint = scenes.paint if isinstance(shown, scenes.Scene) else writing.paint
    white, black = (paint(replace(shown, background=name)) for name in ("white", "black"))
    return np.asarray(on_pattern(white, black, pattern)).astype(int)


def drawn(random):
    make = random.choice((scenes.draw_scene, writing.draw_writing))
    return make(random, False)


def read_pairs(shard):
    """(pixels, JSON) of every sample: images and their descriptions take turns."""
    with tarfile.open(shard) as tar:
        files = [tar.extractfile(member).read() for member in tar]
    return [
        (np.asarray(Image.open(io.BytesIO(image)).convert("RGB")), json.loads(text))
        for image, text in zip(files[::2], files[1::2], strict=True)
    ]


def test_on_two_equal_colours_a_picture_is_the_one_painted_on_that_colour():
    random = Random(0)
    for _ in range(40):
        shown = replace(drawn(random), background="gray")
        plain = Pattern(random.choice(KINDS), ("gray", "gray"), random.choice(PERIODS), (1, 0))
        paint = scenes.paint if isinstance(shown, scenes.Scene) else writing.paint
        assert np.abs(painted(shown, plain) - np.asarray(paint(shown)).astype(int)).max() <= 2


def test_a_pattern_has_both_colours_and_none_that_the_picture_shows():
    random = Random(1)
    for _ in range(200):
        shown = drawn(random)
        pattern = draw_pattern(random, shown.colours)
        assert not shown.colours & set(pattern.colours)
        pixels = pattern.paint(*shown.size).reshape(-1, 3)
        found = {tuple(pixel) for pixel in np.unique(pixels, axis=0)}
        assert found == {SHADES[colour] for colour in pattern.colours}, pattern


@pytest.mark.parametrize("period", PERIODS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_pattern_repeats_itself(kind, period):
    pixels = Pattern(kind, ("red", "white"), period, (1, 0)).paint(48, 48)
    repeat = 2 * period if kind in ("checked", "wavy") else period
    assert np.array_equal(pixels[:-repeat], pixels[repeat:])
    assert not np.array_equal(pixels[:-1], pixels[1:])


def test_most_pictures_of_pre_training_are_plain_and_few_things_are_asked(tmp_path):
    numbers = {"pretrain_readings": 40, "pretrain_images": 160, "pretrain_texts": 4}
    write_world(tmp_path, 0, WorldSize(*(4, 4, 4, 4), train_shards=1, **numbers))
    [shard] = tmp_path.glob("pretrain/reading/*.tar")
    read = [fields for _, fields in read_pairs(shard)]
    assert len(read) == 40 and {fields["writing"]["ink"] for fields in read} == {"white"}
    # In the middle: one place for each size.
    assert len({(*f["writing"]["size"], *f["writing"]["corner"]) for f in read}) == 2
    assert {kind_and_asked(fields["question"])[1] for fields in read} == {"word", "number"}
    [shard] = tmp_path.glob("pretrain/mmu/*.tar")
    num_plain = num_others = 0
    asked = Counter()
    for picture, fields in read_pairs(shard):
        asked[kind_and_asked(fields["question"])[1]] += 1
        if written := fields.get("writing"):
            is_plain = written["ink"] == "white"
            if is_plain:
                assert written["background"] == "black"
                found = {tuple(pixel) for pixel in picture.reshape(-1, 3).tolist()}
                assert found == {BACKGROUNDS["white"], BACKGROUNDS["black"]}
        elif scene := fields.get("scene"):
            is_plain = len(scene["objects"]) == 1 and scene["background"] == "black"
        else:
            continue
        num_plain += is_plain
        num_others += not is_plain
    assert set(asked) == {"digit", "colour", "shape", "word", "number"} and min(asked.values()) > 8
    assert 60 < num_plain < 110 and 20 < num_others < 60


def test_questions_of_pre_training_name_no_colour_of_the_background(tmp_path):
    size = WorldSize(*(4, 4, 4, 4), train_shards=1, pretrain_images=160, pretrain_texts=4)
    write_world(tmp_path, 0, size)
    [shard] = tmp_path.glob("pretrain/mmu/*.tar")
    on_patterns = 0
    for picture, fields in read_pairs(shard):
        shown = fields.get("scene") or fields.get("writing")
        if shown is None or shown["background"] in BACKGROUNDS:
            continue
        kind, first, _, second = shown["background"].split()
        asked = set(re.findall(r"\w+", fields["question"]))
        assert not asked & {first, second}
        pixels = {tuple(pixel) for pixel in picture.reshape(-1, 3).tolist()}
        assert kind in KINDS and {SHADES[first], SHADES[second]} <= pixels
        on_patterns += 1
    assert 5 < on_patterns < 30
