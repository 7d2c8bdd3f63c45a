"""The digit reader: right on digits it has not seen, and the same every time."""

from random import Random

import numpy as np
from PIL import Image

from symbiotic_titan.demo import digit_classifier as digits
from symbiotic_titan.demo import digits as demo_digits
from symbiotic_titan.demo.pictures import with_pixels


def share_right(reader, change):
    random = Random(0)
    pool = demo_digits.handwritten_digits(heldout=True)
    return np.mean([reader.read(change(demo_digits.paint(d, random))) == d.value for d in pool])


def noisy(image):
    levels = np.asarray(image, dtype=float)
    noise = np.random.default_rng(0).normal(0, 0.1 * 127.5, levels.shape)
    return Image.fromarray((levels + noise).clip(0, 255).round().astype(np.uint8))


def aside(image):
    """Moved by an eighth of its width."""
    canvas = Image.new("RGB", image.size)
    canvas.paste(image, (image.width // 8, 0))
    return canvas


def faded(image):
    return Image.eval(image, lambda level: 40 + level // 2)


def test_heldout_digits_are_read_also_when_small_noisy_faded_or_aside(reader):
    assert share_right(reader, lambda image: image) > 0.99
    for change in (lambda image: with_pixels(image, 1024), noisy, faded, aside):
        assert share_right(reader, change) > 0.98


def test_reader_is_trained_on_the_training_split_only(monkeypatch):
    asked = []

    def few(heldout):
        asked.append(heldout)
        return demo_digits.handwritten_digits(heldout)[:200]

    monkeypatch.setattr(digits, "handwritten_digits", few)
    first, again = digits.DigitReader(), digits.DigitReader()
    assert asked == [False, False]
    random = Random(1)
    pictures = [demo_digits.paint(d, random) for d in demo_digits.handwritten_digits(True)[:50]]
    assert [first.read(p) for p in pictures] == [again.read(p) for p in pictures]


def test_blank_picture_shows_no_digit(reader):
    assert reader.read(Image.new("RGB", (32, 32), "gray")) is None
