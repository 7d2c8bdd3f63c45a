"""The demo world's own score: do the pictures show what their captions say, and do they look like the world's?

1. A caption is parsed (``captions``), a picture is read as a scene (``scene_reader``), a handwritten digit (``digit_classifier``) or
   a word or number (``word_reader``), and their facts are compared.
2. The pictures as a whole are compared with the real ones by a Fréchet distance (``frechet``).

Every score comes with two references at the resolution of the model's pictures: the real pictures of the same captions are the
upper bound, and new pictures that ignore the captions are chance. Lower is better for the Fréchet distance: there the new pictures
are the bound and blank ones are chance.
"""

from collections.abc import Sequence
from random import Random
from statistics import fmean

from PIL import Image

from symbiotic_titan.demo import (
    digits,
    scenes,
    word_reader,
    writing,
)
from symbiotic_titan.demo.captions import (
    ParsedCaption,
    parse_caption,
)
from symbiotic_titan.demo.digit_classifier import DigitReader, digit_reader
from symbiotic_titan.demo.frechet import frechet_distance
from symbiotic_titan.demo.held_out import PictureSample
from symbiotic_titan.demo.pictures import (
    Picture,
    to_image,
    with_pixels,
)
from symbiotic_titan.demo.scene_reader import (
    FACTS,
    find_scene,
    scene_facts,
)
from symbiotic_titan.evaluation.suite import (
    Score,
    Scores,
    measure,
    measure_mean,
)

# Names of the scores, in the order of tables.
PICTURE_SCORES = (
    "digit",
    "words",
    "numbers",
    *(f"writing/{kind}" for kind in word_reader.FACTS),
    "scene/all_correct",
    *(f"scene/{kind}" for kind in FACTS),
    "frechet",
)
# Chance is measured on this many new pictures per caption; with one alone it is as uncertain as the score.
NEW_SETS = 4


def demo_world_score(images: Sequence[Picture], samples: Sequence[PictureSample]) -> Scores:
    """Scores of ``images``, each made from the caption of the sample at its position; those of PICTURE_SCORES that apply.

    ``number`` counts the captions with a fact of the kind, or for the Fréchet distance the images; it needs two.

    Raises:
        ValueError: there are no samples, or not as many images; a caption is none of the demo world's; scikit-learn is missing.
    """
    if not samples or len(images) != len(samples):
        raise ValueError(
            f"one image per caption is scored, got {len(images)} images for {len(samples)} captions"
        )
    captions = [parse_caption(sample.caption) for sample in samples]
    made = [to_image(image) for image in images]
    pixels = [image.width * image.height for image in made]
    real = [with_pixels(s.image, n) for s, n in zip(samples, pixels, strict=True)]
    new = [
        with_pixels(image, n)
        for image, n in zip(_new_pictures(captions * NEW_SETS), pixels * NEW_SETS, strict=True)
    ]
    reader = digit_reader()
    facts, at_best = (_facts(captions, pictures, reader) for pictures in (made, real))
    by_chance = _facts(captions * NEW_SETS, new, reader)
    scores = {
        name: measure_mean(
            facts[name], chance=fmean(by_chance[name]), upper_bound=fmean(at_best[name])
        )
        for name in PICTURE_SCORES
        if name in facts
    }
    if len(images) > 1:
        scores["frechet"] = _distance(made, real, new[: len(made)])
    return scores


def _distance(made: list[Image.Image], real: list[Image.Image], new: list[Image.Image]) -> Score:
    """Distances from the real pictures: of those made, of blank ones (chance) and of new ones (the bound)."""
    blank = [Image.new("RGB", image.size, scenes.BACKGROUNDS["gray"]) for image in made]
    score, chance, upper_bound = (frechet_distance(p, real) for p in (made, blank, new))
    return measure(score, chance=chance, upper_bound=upper_bound, number=len(made))


def check_picture(
    caption: ParsedCaption, image: Image.Image, reader: DigitReader
) -> dict[str, float]:
    """Share of a caption's facts that ``image`` shows, by names of PICTURE_SCORES; all_correct is 1 where it shows all of them."""
    if caption.digit is not None:
        return {"digit": float(reader.read(image) == caption.digit)}
    if caption.text is not None:
        return word_reader.writing_facts(caption, word_reader.read_writing(image))
    facts = scene_facts(caption, find_scene(image))
    all_correct = float(all(share == 1.0 for share in facts.values()))
    return {"scene/all_correct": all_correct} | {f"scene/{k}": v for k, v in facts.items()}


def _facts(
    captions: list[ParsedCaption], images: list[Image.Image], reader: DigitReader
) -> dict[str, list[float]]:
    """Name -> the share of it that is right, for each of the captions that mention it."""
    values: dict[str, list[float]] = {}
    for caption, image in zip(captions, images, strict=True):
        for name, value in check_picture(caption, image, reader).items():
            values.setdefault(name, []).append(value)
    return values


def _new_pictures(captions: list[ParsedCaption]) -> list[Image.Image]:
    """For each caption a random held-out picture of the same kind, made without the caption's facts."""
    random = Random(0)
    pool = digits.handwritten_digits(heldout=True)
    return [_new_picture(caption, random, pool) for caption in captions]


def _new_picture(caption: ParsedCaption, random: Random, pool: list[digits.Digit]) -> Image.Image:
    if caption.digit is not None:
        return digits.paint(random.choice(pool), random)
    if caption.text is None:
        return scenes.paint(scenes.draw_scene(random, heldout=True))
    numbers = writing.is_number(caption.text)
    return writing.paint(writing.draw_writing(random, heldout=True, numbers=numbers))
