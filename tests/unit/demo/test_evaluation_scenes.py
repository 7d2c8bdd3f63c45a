"""The scene check reads real pictures right, and an edited picture loses the edited fact and no other."""

from dataclasses import replace
from random import Random

import numpy as np
import pytest
from PIL import Image

from symbiotic_titan.demo import (
    digits,
    scenes,
)
from symbiotic_titan.demo.captions import parse_caption
from symbiotic_titan.demo.pictures import with_pixels
from symbiotic_titan.demo.scene_reader import (
    find_scene,
    scene_facts,
)
from symbiotic_titan.demo.scenes import (
    PLACES,
    Scene,
    Thing,
)

RED = Thing("red", "circle", "top left", (16, 16), 11)
BLUE = Thing("blue", "square", "bottom right", (48, 48), 11)


def facts(scene, picture):
    """Of the picture, under the long caption of ``scene``."""
    return scene_facts(parse_caption(scenes.long_caption(scene)), find_scene(picture))


def lost(scene, drawn):
    """Kinds of facts that are lost when ``drawn`` is painted in place of ``scene``, and what is left of each."""
    before, after = facts(scene, scenes.paint(scene)), facts(scene, scenes.paint(drawn))
    assert set(before.values()) == {1.0}
    return {kind: share for kind, share in after.items() if share < 1.0}


def moved(thing, place):
    row, column = PLACES[place]
    return replace(thing, place=place, centre=(round(row * 64), round(column * 64)))


def noisy(image, std, seed=0):
    """With normal noise of ``std`` where the range is -1 to 1."""
    levels = np.asarray(image, dtype=float)
    noise = np.random.default_rng(seed).normal(0, std * 127.5, levels.shape)
    return Image.fromarray((levels + noise).clip(0, 255).round().astype(np.uint8))


def mean_facts(num_pixels, std=0.0, count=60):
    random, values = Random(0), {}
    for number in range(count):
        scene = scenes.draw_scene(random, heldout=True)
        picture = noisy(with_pixels(scenes.paint(scene), num_pixels), std, number)
        for kind, value in facts(scene, picture).items():
            values.setdefault(kind, []).append(value)
    return {kind: float(np.mean(found)) for kind, found in values.items()}


@pytest.mark.parametrize("num_pixels", [4096, 2304, 1024])
def test_every_fact_of_real_pictures_is_read_right(num_pixels):
    found = mean_facts(num_pixels)
    assert set(found) == {"count", "colour", "shape", "place", "relation", "background"}
    assert set(found.values()) == {1.0}


def test_noise_of_a_tenth_changes_next_to_nothing():
    assert min(mean_facts(4096, std=0.1).values()) == 1.0
    assert min(mean_facts(1024, std=0.1).values()) > 0.97


def test_another_colour_shape_or_background_loses_that_fact_alone():
    scene = Scene((64, 64), "white", (RED, BLUE))
    for colour in set(scenes.COLOURS) - {"red"}:
        changed = replace(scene, things=(replace(RED, colour=colour), BLUE))
        assert lost(scene, changed) == {"colour": 0.5}, colour
    for shape in set(scenes.SHAPES) - {"circle"}:
        changed = replace(scene, things=(replace(RED, shape=shape), BLUE))
        assert lost(scene, changed) == {"shape": 0.5}, shape
    for background in ("gray", "black"):
        assert lost(scene, replace(scene, background=background)) == {"background": 0.0}


def test_another_place_of_a_single_thing_loses_place_alone():
    scene = Scene((64, 64), "black", (RED,))
    for place in set(PLACES) - {"top left"}:
        assert lost(scene, replace(scene, things=(moved(RED, place),))) == {"place": 0.0}


def test_relations_are_lost_as_far_as_directions_change():
    scene = Scene((64, 64), "gray", (RED, BLUE))
    beside = replace(scene, things=(RED, moved(BLUE, "top right")))
    assert lost(scene, beside) == {"place": 0.5, "relation": 0.5}
    exchanged = replace(scene, things=(moved(RED, "bottom right"), moved(BLUE, "top left")))
    assert lost(scene, exchanged) == {"place": 0.0, "relation": 0.0}


def test_equal_things_claim_no_relations():
    equal = (RED, moved(RED, "bottom right"))
    scene = Scene((64, 64), "white", equal)
    assert set(facts(scene, scenes.paint(scene))) == {
        "count",
        "colour",
        "shape",
        "place",
        "background",
    }


def test_one_thing_too_many_loses_count_alone_and_a_missing_one_its_facts_too():
    one, two = (Scene((64, 64), "white", things) for things in ((RED,), (RED, BLUE)))
    assert lost(one, two) == {"count": 0.0}
    half = {"colour": 0.5, "shape": 0.5, "place": 0.5}
    assert lost(two, one) == {"count": 0.0, "relation": 0.0} | half


def test_colours_bound_to_the_wrong_shapes_are_not_right():
    claims = parse_caption("a red circle and a blue square")
    swapped = (replace(RED, shape="square"), replace(BLUE, shape="circle"))
    found = find_scene(scenes.paint(Scene((64, 64), "white", swapped)))
    assert scene_facts(claims, found) == {"count": 1.0, "colour": 1.0, "shape": 0.0}


def test_equal_things_that_touch_are_counted_one_by_one():
    crosses = tuple(
        Thing("purple", "cross", place, centre, 11)
        for place, centre in (("top left", (18, 16)), ("bottom left", (40, 16)))
    )
    found = find_scene(scenes.paint(Scene((64, 64), "white", crosses)))
    assert [(t.colour, t.shape, t.place) for t in found.things] == [
        ("purple", "cross", "top left"),
        ("purple", "cross", "bottom left"),
    ]


def test_soft_edges_are_no_things_of_another_colour():
    yellow = Scene((48, 80), "black", (Thing("yellow", "triangle", "top right", (12, 60), 10),))
    blurred = scenes.paint(yellow).resize((40, 24), Image.Resampling.BICUBIC)
    assert len(find_scene(blurred.resize((80, 48), Image.Resampling.BICUBIC)).things) == 1


def test_specks_and_shades_of_the_background_are_no_things():
    levels = np.full((64, 64, 3), (240, 125, 25), np.uint8)
    levels[8:28, 8:28] = scenes.COLOURS["orange"]
    levels[40:46, 40:46] = scenes.COLOURS["blue"]
    assert find_scene(Image.fromarray(levels)).things == ()
    levels[40:56, 40:56] = scenes.COLOURS["blue"]
    assert [t.shape for t in find_scene(Image.fromarray(levels)).things] == ["square"]


def test_a_patch_of_no_shape_keeps_its_colour_and_place():
    levels = np.full((64, 64, 3), 245, np.uint8)
    levels[10:14, 4:30] = levels[24:28, 4:30] = levels[10:28, 4:7] = (214, 39, 40)
    (thing,) = find_scene(Image.fromarray(levels)).things
    assert (thing.colour, thing.shape, thing.place) == ("red", None, "top left")


def test_pictures_without_coloured_things_have_none():
    digit = digits.paint(digits.handwritten_digits(heldout=True)[0], Random(0))
    assert find_scene(digit).things == ()
    grains = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert find_scene(Image.fromarray(grains)).things == ()
    for colour in ("white", "black", (245, 130, 20)):
        assert find_scene(Image.new("RGB", (40, 24), colour)).things == ()
    assert find_scene(Image.new("RGB", (40, 24), (245, 130, 20))).background == "orange"
