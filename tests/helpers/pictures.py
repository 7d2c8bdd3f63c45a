"""Small images for tests."""

import io

import numpy as np
from PIL import Image


def picture(seed, height=24, width=40):
    """A picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def encoded(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()
