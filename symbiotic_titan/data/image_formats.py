"""Which file formats are decoded as images, told by their content; extensions do not count.

Everything that Pillow reads is decoded, except formats that it hands to another program (EPS, WMF), those without pixels of their own
(BUFR, GRIB, HDF5, MPEG), and those without a signature, which would make a picture of any damaged file.
"""

from functools import cache

from PIL import Image

# Tried first, without loading Pillow's other decoders.
COMMON_FORMATS = ("PNG", "JPEG", "WEBP")
NEVER_DECODED = {
    *("EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"),
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
    return ("IM",) if data.startswith(b"Image type: ") else other_formats()


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
