"""Where images are decoded. What a file is, is told by its content; extensions do not count.

Everything that Pillow reads is decoded, except formats that it hands to another program (EPS, WMF), those without pixels of their own
(BUFR, GRIB, HDF5, MPEG), and those without a signature, which would make a picture of any damaged file.
"""

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from itertools import count

import numpy as np
from PIL import Image, ImageFile, PngImagePlugin, UnidentifiedImageError

from symbiotic_titan.data.images import ImageSizeError

# What Pillow's decoders raise on damaged files.
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    IndexError,
    KeyError,
    EOFError,
    OverflowError,
    struct.error,
    zlib.error,
)

# Where Pillow itself refuses, to be safe from decompression bombs.
MAX_PIXELS = 178_956_970

# Pillow's limit for a compressed text or colour profile of a PNG is 1 MB, and released data have longer ones.
PngImagePlugin.MAX_TEXT_CHUNK = 2**26

# Scans of a JPEG, each over all pixels; usual are 10. Colour profiles of a PNG, each unpacked; there is one.
MAX_SCANS, MAX_PROFILES = 200, 4
# Pixels that are converted at a time, so that the steps of a conversion are not all in memory as a whole.
BAND = 2**20

# Tags of a TIFF.
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0

# EXIF orientation -> the transposition that turns the image upright; an upright image has 1.
ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Tried first, without loading Pillow's other decoders.
COMMON_FORMATS = ("PNG", "JPEG", "WEBP")
NEVER_DECODED = {
    *("EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"),
    "FITS",  # numbers without a range, and Pillow unpacks compressed ones without a limit
    *("IM", "IMT", "IPTC", "PCD", "SPIDER", "TGA"),
}

# First bytes of common images. Base64 text is recognised by them.
SIGNATURES = (
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
)

# First bytes -> what a file is instead of an image that can be decoded, and what to do.
_CONVERT = "convert it to PNG or JPEG"
OTHER_FILES = (
    (b"%PDF", "a PDF", "render its pages as PNG"),
    (b"%!PS", "PostScript", _CONVERT),
    (b"\xc5\xd0\xd3\xc6", "PostScript (EPS)", _CONVERT),
    (b"\xd7\xcd\xc6\x9a", "a Windows metafile (WMF)", _CONVERT),
    (b"\xff\x0a", "JPEG XL", _CONVERT),
    (b"\x00\x00\x00\x0cJXL ", "JPEG XL", _CONVERT),
    (b"\x1a\x45\xdf\xa3", "a Matroska or WebM video", "video is not supported"),
    (b"\x00\x00\x01\xba", "an MPEG video", "video is not supported"),
    (b"<svg", "an SVG drawing", "render it as PNG"),
    (b"<!doctype html", "an HTML page", "its download failed; load it again"),
    (b"<html", "an HTML page", "its download failed; load it again"),
    (b"<?xml", "an XML file", "its download failed, or it is an SVG; load it again, or render it as PNG"),
    (b"version https://git-lfs", "a Git LFS pointer", "get the files with git lfs pull"),
    (b"{", "JSON text", "its download failed; load it again"),
    (b"\x1f\x8b", "gzip", "unpack it"),
    (b"PK\x03\x04", "a zip archive", "unpack it"),
    (b"\x89HDF", "HDF5", _CONVERT),
    (b"GRIB", "GRIB", _CONVERT),
    (b"SIMPLE  =", "FITS", _CONVERT),
)  # fmt: skip

# Brands of ISO media files ("ftyp").
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
AVIF_BRANDS = (b"avif", b"avis")


def format_of(start: bytes) -> str:
    """The format of an image that begins with ``start``, at least 12 bytes; "" where it is none of the common ones."""
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return "WEBP"
    if start[:2] == b"BM" and start[6:10] == bytes(4):
        return "BMP"
    if start[4:8] == b"ftyp" and start[8:12] in (*HEIF_BRANDS, *AVIF_BRANDS):
        return "AVIF" if start[8:12] in AVIF_BRANDS else "HEIF"
    return next((name for signature, name in SIGNATURES if start.startswith(signature)), "")


@cache
def other_formats() -> tuple[str, ...]:
    """What is decoded besides COMMON_FORMATS."""
    Image.init()
    return tuple(sorted(Image.OPEN.keys() - NEVER_DECODED - set(COMMON_FORMATS)))


def formats_to_try(data: bytes) -> tuple[str, ...]:
    """Pillow's names of the formats that ``data``, which are none of COMMON_FORMATS, may have."""
    if data[-18:-2] == b"TRUEVISION-XFILE":  # only the second version of TGA signs its files
        return ("TGA",)
    return other_formats()


def what_it_is(data: bytes) -> str:
    """What ``data`` that cannot be decoded are, and what to do."""
    if not data:
        return "it is empty; load it again"
    start = data[:64].lstrip().lower()
    for signature, name, remedy in OTHER_FILES:
        if data.startswith(signature) or start.startswith(signature):
            return f"it is {name}; {remedy}"
    if data[4:8] == b"ftyp":
        return _iso_media(data[8:12])
    if data[:4] == b"RIFF" and data[8:11] == b"AVI":
        return "it is an AVI video; video is not supported"
    return f"its format is not known, it begins with {data[:8]!r}"


def _iso_media(brand: bytes) -> str:
    if brand in HEIF_BRANDS:
        return f"it is HEIC; {_CONVERT}"
    if brand in AVIF_BRANDS:
        return f"it is AVIF, which this Pillow cannot read; install a newer one, or {_CONVERT}"
    return f"it is a video (MP4, brand {brand.decode('latin-1')!r}); video is not supported"


def decode_image(
    data: bytes, max_pixels: int = MAX_PIXELS, *, keep_truncated: bool = False
) -> Image.Image:
    """Upright RGB image of encoded ``data``, on white where it is transparent; of several frames or pages, the first.

    keep_truncated: decode what there is of a file that breaks off; the rest is grey or black.

    Raises:
        ImageSizeError: too many pixels; read from the header, before anything is decoded.
        one of DECODE_ERRORS: the data are damaged, or no image that is decoded; the text says what they are.
    """
    with warnings.catch_warnings(), _truncated_files() if keep_truncated else nullcontext():
        # Pillow warns of damage that it can repair, and raises where it cannot.
        warnings.simplefilter("ignore")
        with _opened(data) as image:
            return _checked(image, max_pixels)


def _checked(image: Image.Image, max_pixels: int) -> Image.Image:
    """An opened ``image`` as ``decode_image`` gives it; raises as that does."""
    if not 0 < image.width * image.height <= max_pixels:
        raise ImageSizeError(
            f"{image.width} x {image.height} pixels, data.max_image_pixels = {max_pixels}"
        )
    before = Image.MAX_IMAGE_PIXELS
    # A file of icons says one size and may hold an image of another: Pillow compares that with its own limit, and warns.
    Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return upright_rgb(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageSizeError(
            f"an image in it has more pixels than data.max_image_pixels = {max_pixels}"
        ) from error
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _opened(data: bytes) -> Image.Image:
    """Raises ImageSizeError for more than MAX_PIXELS pixels, or one of DECODE_ERRORS."""
    if data[:3] == b"\xff\xd8\xff" and data.count(b"\xff\xda") > MAX_SCANS:
        raise ValueError(f"it has more than {MAX_SCANS} scans; write it again")
    if data[:4] == b"\x89PNG" and data.count(b"iCCP") > MAX_PROFILES:
        raise ValueError("it has several colour profiles; write it again")
    try:
        return Image.open(io.BytesIO(data), formats=COMMON_FORMATS)
    except UnidentifiedImageError:
        pass
    except Image.DecompressionBombError as error:
        raise ImageSizeError(str(error)) from error
    try:
        return Image.open(io.BytesIO(data), formats=formats_to_try(data))
    except UnidentifiedImageError:
        raise ValueError(what_it_is(data)) from None
    except Image.DecompressionBombError as error:
        raise ImageSizeError(str(error)) from error


@contextmanager
def _truncated_files() -> Iterator[None]:
    """Files that break off are decoded; Pillow's switch is one for the whole process."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def frames(data: bytes, max_pixels: int) -> Iterator[bytes]:
    """Each frame or page of encoded ``data`` as a file of its own, decoded when it is asked for; raises as ``decode_image`` does."""
    with _opened(data) as image:
        for number in count():
            try:
                image.seek(number)
            except EOFError:
                return
            buffer = io.BytesIO()
            _checked(image, max_pixels).save(buffer, "PPM")
            yield buffer.getvalue()


def upright_rgb(image: Image.Image) -> Image.Image:
    """An opened ``image`` as ``decode_image`` gives it; raises one of DECODE_ERRORS."""
    rgb = _to_rgb(image)
    turn = UPRIGHT.get(_orientation(image))
    return rgb if turn is None else rgb.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        image.load()  # ``convert`` would copy it, a fifth of the time of a JPEG
        return image
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        kind = "32 bit numbers" if image.mode == "I" else "floating-point numbers"
        raise ValueError(
            f"its pixels are {kind} without a range; convert it to 8 or 16 bits a channel"
        )
    tags = getattr(image, "tag_v2", {})
    bits, inverted = tags.get(BITS_PER_SAMPLE, (16,))[0], tags.get(PHOTOMETRIC) == WHITE_IS_ZERO

    def convert(part: Image.Image) -> Image.Image:
        if part.mode.startswith("I"):
            part = _eight_bits(part, bits, inverted)
        if part.mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in part.info:
            part = part.convert("RGBA")
            part = Image.alpha_composite(Image.new("RGBA", part.size, "white"), part)
        return part.convert("RGB")

    image.load()
    rows = max(1, BAND // image.width)
    if rows >= image.height:
        return convert(image)
    rgb = Image.new("RGB", image.size)
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(top + rows, image.height))
        rgb.paste(convert(image.crop(box)), box)
    return rgb


def _eight_bits(image: Image.Image, bits: int, inverted: bool) -> Image.Image:
    """Grey of more than 8 bits, which Pillow would clip instead of scale."""
    grey = np.asarray(image).astype(np.int64).clip(0, 2**bits - 1) >> bits - 8
    return Image.fromarray((255 - grey if inverted else grey).astype(np.uint8))


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ORIENTATION, 1)
    except DECODE_ERRORS:  # the image itself is whole
        return 1
