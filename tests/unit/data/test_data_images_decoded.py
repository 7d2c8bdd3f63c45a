"""Images as cameras, painters and attackers write them."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from symbiotic_titan.data.decoding import ORIENTATION, UPRIGHT, decode_image
from symbiotic_titan.data.images import ImageSizeError


def encoded(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def pixel(data, at=(0, 0)):
    return decode_image(data).getpixel(at)


def test_what_is_transparent_becomes_white_whatever_colour_hides_there():
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    half = Image.new("RGBA", (2, 2), (255, 0, 0, 128))
    grey = Image.new("LA", (2, 2), (10, 0))
    assert pixel(encoded(clear)) == pixel(encoded(clear, "WEBP", lossless=True)) == (255, 255, 255)
    assert pixel(encoded(half)) == pytest.approx((255, 127, 127), abs=1)
    assert pixel(encoded(grey)) == (255, 255, 255)


def test_transparent_entries_of_a_palette_become_white():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    data = encoded(image, transparency=b"\x00\xff")
    assert pixel(data) == (255, 255, 255) and pixel(data, (1, 0)) == (0, 0, 255)
    assert pixel(encoded(image, transparency=1), (1, 0)) == (255, 255, 255)


def test_cyan_ink_becomes_cyan():
    image = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    assert pixel(encoded(image, "JPEG", quality=95)) == pytest.approx((0, 255, 255), abs=6)


def test_sixteen_bits_of_grey_are_scaled_to_eight():
    grey = Image.fromarray(np.array([[0, 256 * 7, 65535]], dtype=np.uint16))
    assert np.asarray(decode_image(encoded(grey)))[0, :, 0].tolist() == [0, 7, 255]


@pytest.mark.parametrize("orientation", [1, *UPRIGHT])
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_photographs_are_turned_upright(orientation, form):
    scene = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 16, 3), dtype=np.uint8))
    scene = scene.resize((64, 32))
    undo = {None: None, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    turn = UPRIGHT.get(orientation)
    stored = scene if turn is None else scene.transpose(undo.get(orientation, turn))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    shown = decode_image(encoded(stored, form, exif=exif.tobytes()))
    assert shown.size == scene.size
    assert np.abs(np.asarray(shown, int) - np.asarray(scene, int)).mean() < 12


def test_broken_camera_data_do_not_spoil_an_image():
    exif = b"Exif\x00\x00II*\x00\xff\xff\xff\xff broken"
    assert pixel(encoded(Image.new("RGB", (8, 8), "white"), "JPEG", exif=exif)) == (255, 255, 255)


def png_header(width, height):
    """A PNG that claims a size and holds nothing."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(100_000, 100_000), (10_000, 10_000), (2**31 - 1, 1)])
def test_decompression_bombs_are_refused_before_they_are_decoded(size):
    with pytest.raises(ImageSizeError):
        decode_image(png_header(*size), max_pixels=99_999_999)


def test_too_large_image_is_named_with_the_limit():
    with pytest.raises(ImageSizeError, match=r"9 x 12 pixels, data.max_image_pixels = 107"):
        decode_image(encoded(Image.new("RGB", (9, 12))), max_pixels=107)
    assert decode_image(encoded(Image.new("RGB", (9, 12))), max_pixels=108).size == (9, 12)


def test_image_without_pixels_is_refused():
    for size in ((0, 0), (0, 5), (5, 0)):
        with pytest.raises((ImageSizeError, OSError, ValueError, SyntaxError)):
            decode_image(png_header(*size))


def test_warnings_of_the_decoder_neither_stop_nor_fill_the_log():
    exif = b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x09\x00"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        decode_image(encoded(Image.new("RGB", (8, 8)), "JPEG", exif=exif))
    assert not caught
