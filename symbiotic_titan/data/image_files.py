"""The encoded bytes of an image, in every form in which data sets hold or name one.

Who made the data is not known, so that what a sample names is not trusted: only regular files below the folders of its source are
read, and no more than ``data.max_image_bytes`` of one. That is decided by the path without symbolic links, and once more by the file
that was opened, which may have been replaced in between.
"""

import base64
import binascii
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

import fsspec
from fsspec.core import url_to_fs

from symbiotic_titan.config.files import InputLimits
from symbiotic_titan.data.decoding import DECODE_ERRORS, format_of, frames
from symbiotic_titan.data.fields import own_image
from symbiotic_titan.data.formats.shard import BadSample, brief, one_line
from symbiotic_titan.data.images import ImageSizeError

# Base64 text of an image is at least this long; a shorter string is a name.
SHORTEST_BASE64 = 64
# Characters of a path, and of a folder to be allowed, in a message.
LONGEST_NAME, LONGEST_ROOT = 50, 60
# The cache of the Hugging Face hub: links in ``snapshots`` lead to files in ``blobs``.
SNAPSHOT = re.compile(r"(.*/(?:datasets|models|spaces)--[^/]+)/snapshots/[^/]+(?:/.*)?")
# A FIFO must not wait for a writer, nor a terminal become that of the process.
FLAGS = os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
# Characters of a URI that are unescaped at a time.
PART = 2**16


class ImageFiles:
    """Reads the images of one sample.

    folder: where relative paths are looked up.
    roots:  other folders, or beginnings of URLs, that may be read; nothing else is.
    limits: bytes of an image, and of all files of the sample.
    """

    def __init__(
        self, folder: str = "", roots: Sequence[str] = (), limits: InputLimits | None = None
    ) -> None:
        self._folder = folder
        self._roots = (folder, *roots)
        self._limits = limits or InputLimits()
        self._left = self._limits.max_record_bytes

    def read(self, value: Any, members: Mapping[str, Any]) -> bytes:
        """The encoded image that ``value`` holds or names: bytes, base64 text, a ``data:`` URI, the name of one of ``members``, a path
        or URL, or a table with one of these.

        Raises:
            BadSample: it does neither, cannot be read, may not be read, or has too many bytes.
        """
        if isinstance(value, dict):
            inner = own_image(value)
            if isinstance(inner, dict):
                inner = own_image(inner)
            value = value if inner is None else inner
        if isinstance(value, str) and isinstance(members.get(value), bytes):
            value = members[value]
        if not isinstance(value, (str, bytes)) or not value:
            if value != b"":
                message = f"an image must be bytes or a path, got {brief(value)}"
                raise BadSample("wrong_type", message)
        data = self._content(value)
        self._check_size(len(data), "its image")
        return data

    def pages(self, data: bytes, number: int) -> list[bytes]:
        """The ``number`` pages of the encoded image ``data``, each as a file of its own.

        Raises:
            BadSample: it has another number of pages, cannot be decoded, or has too many pixels or bytes.
        """
        pages: list[bytes] = []
        try:
            for page in frames(data, self._limits.max_image_pixels):
                pages.append(page)
                if len(pages) > number:
                    break
                self._left -= len(page)
                if self._left < 0:
                    limit = self._limits.max_record_bytes
                    message = f"the pages of its TIFF have more bytes than data.max_record_bytes = {limit}"
                    raise BadSample("too_large", message)
        except ImageSizeError as error:
            raise BadSample("image_size", f"its TIFF has the wrong size ({error})") from error
        except DECODE_ERRORS as error:
            raise BadSample("image", f"its TIFF cannot be decoded ({error})") from error
        if len(pages) != number:
            found = f"more than {number}" if len(pages) > number else len(pages)
            raise BadSample(
                "conversation", f"its TIFF has {found} pages for {number} places of images"
            )
        return pages

    def _content(self, value: str | bytes) -> bytes:
        limit = self._limits.max_image_bytes
        if isinstance(value, bytes):
            if not _is_base64(value[:64]):
                return value
            self._check_size(len(value) // 2, "the base64 text of its image")
            return decoded_base64(value.decode("ascii", "replace"))
        is_uri = value[:5].lower() == "data:"
        if is_uri or (len(value) >= SHORTEST_BASE64 and _is_base64(value[:64])):
            # Of what is escaped, three characters are a byte.
            self._check_size(len(value) // 3, "the text of its image")
            return _from_data_uri(value) if is_uri else decoded_base64(value)
        data = self._from_file(value, min(limit, self._left))
        self._left -= len(data)
        return data

    def _check_size(self, num_bytes: int, what: str) -> None:
        limit = self._limits.max_image_bytes
        if num_bytes > limit:
            raise BadSample(
                "too_large", f"{what} has more bytes than data.max_image_bytes = {limit}"
            )

    def _from_file(self, value: str, max_bytes: int) -> bytes:
        name = value[7:] if value[:7].lower() == "file://" else value
        in_folder = "://" in self._folder and not name.startswith("/") and "://" not in name
        if in_folder:
            name = f"{self._folder.rstrip('/')}/{name}"
        read = _read_url if "://" in name else _read_local
        if read is _read_local:
            name = os.path.join(self._folder, name)
        try:
            try:
                data = read(name, self._roots, max_bytes)
            except FileNotFoundError:
                # A name with escapes such as ``%20`` is taken as it is, or else unescaped.
                if (read is _read_url and not in_folder) or unquote(name) == name:
                    raise
                data = read(unquote(name), self._roots, max_bytes)
        except BadSample:
            raise
        except Exception as error:  # noqa: BLE001  file systems of other packages raise what they like
            reason = one_line(str(error).replace(name, "...") or type(error).__name__, 90)
            message = f"image {_shown(value, 90)} cannot be read ({reason})"
            raise BadSample("unreadable", message) from error
        if len(data) <= max_bytes:
            return data
        key = "max_image_bytes" if max_bytes == self._limits.max_image_bytes else "max_record_bytes"
        limit = getattr(self._limits, key)
        what = "has" if key == "max_image_bytes" else "and those before it have"
        raise BadSample(
            "too_large", f"image {_shown(value)} {what} more bytes than data.{key} = {limit}"
        )


def _shown(name: str, longest: int = LONGEST_NAME) -> str:
    return name if len(name) <= longest else f"...{name[3 - longest :]}"


def _read_local(path: str, roots: Sequence[str], max_bytes: int) -> bytes:
    """Up to ``max_bytes`` + 1 bytes of the regular file ``path``; raises BadSample where it may not be read, or OSError or ValueError."""
    real = os.path.realpath(path)
    _check_below(real, path, roots)
    descriptor = os.open(real, FLAGS)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a FIFO, a socket or a device"
            raise BadSample("unreadable", f"image {_shown(path)} is {kind}, not a regular file")
        _check_below(_path_of(descriptor) or real, path, roots)
        with open(descriptor, "rb", closefd=False) as opened:
            return opened.read(min(status.st_size, max_bytes) + 1)
    finally:
        os.close(descriptor)


def read_picture(path: str) -> bytes:
    """The regular file ``path`` that a user names; no FIFO is waited for, and no more is read than an image may have by default.

    Raises:
        OSError, ValueError: it cannot be read, is no regular file, or is too large.
    """
    limit = InputLimits().max_image_bytes
    try:
        data = _read_local(path, ("/",), limit)
    except BadSample as error:
        raise ValueError(str(error)) from None
    if len(data) > limit:
        raise ValueError(f"it has more than {limit} bytes")
    return data


def _path_of(descriptor: int) -> str:
    """The path of an open file; "" where the system does not say."""
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return ""


def _check_below(real: str, path: str, roots: Sequence[str]) -> None:
    """Refuse the file ``real``, named by ``path``, outside of ``roots``; raises BadSample."""
    folders = [folder for root in roots if "://" not in root for folder in _allowed(root)]
    if any(folder in ("/", real) or real.startswith(f"{folder}/") for folder in folders):
        return
    root = os.path.dirname(real)
    while len(root) > LONGEST_ROOT:
        root = os.path.dirname(root)
    raise BadSample(
        "outside",
        f'image {_shown(path)} lies outside of its source\'s folders; to allow it, set image_roots = ["{root}"]',
    )


@lru_cache(1024)
def _allowed(root: str) -> tuple[str, ...]:
    """The folder ``root`` without symbolic links; in the hub's cache also the one of the files that its links lead to."""
    real = os.path.realpath(root)
    snapshot = SNAPSHOT.fullmatch(real)
    return (real, f"{snapshot[1]}/blobs") if snapshot else (real,)


def _read_url(url: str, roots: Sequence[str], max_bytes: int) -> bytes:
    """Up to ``max_bytes`` + 1 bytes; raises BadSample unless one of ``roots`` allows it, or what its file system raises."""
    if "::" in url or ".." in re.split(r"[/\\]", unquote(url)):
        raise BadSample("outside", f"image {_shown(url)} is a URL with :: or .., which is not read")
    if not any("://" in root and url.startswith(f"{root.rstrip('/')}/") for root in roots):
        scheme, _, rest = url.partition("://")
        begin = one_line(f"{scheme}://{rest.partition('/')[0]}/", LONGEST_ROOT)
        raise BadSample(
            "outside",
            f'image {_shown(url)} is a URL; load it down, or allow it for its source: image_roots = ["{begin}"]',
        )
    with fsspec.open(url, "rb") as file:
        return file.read(max_bytes + 1)


def _is_base64(start: str | bytes) -> bool:
    """Whether a value that begins with ``start`` is base64 text of an image; ``start`` is a multiple of 4 characters."""
    if not start.isascii():  # as JPEG and PNG begin; spares the error
        return False
    try:
        text = start if isinstance(start, str) else start.decode("ascii")
        return format_of(base64.b64decode(text, validate=True)) != ""
    except (ValueError, UnicodeDecodeError):
        return False


def decoded_base64(text: str) -> bytes:
    """Raises BadSample: ``text`` is no base64."""
    compact = "".join(text.split()).rstrip("=")
    try:
        return base64.b64decode(compact + "=" * (-len(compact) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadSample("image", f"the base64 text of its image is damaged ({error})") from error


def _from_data_uri(uri: str) -> bytes:
    """Content of a ``data:`` URI (RFC 2397); raises BadSample."""
    head, comma, body = uri.partition(",")
    if not comma:
        raise BadSample("image", f"the data URI of its image has no content: {brief(uri)}")
    content = b"".join(_unescaped(body))
    return decoded_base64(content.decode("latin-1")) if head.endswith(";base64") else content


def _unescaped(text: str) -> Iterator[bytes]:
    """``text`` with its escapes replaced, part by part: ``unquote_to_bytes`` makes an object of each escape first."""
    start = 0
    while start < len(text):
        stop = start + PART
        cut = text.find("%", stop - 2, stop)  # no part ends inside an escape
        stop = cut if cut > start else stop
        yield unquote_to_bytes(text[start:stop])
        start = stop


def check_image_folder(folder: str, where: str) -> None:
    """Refuse a folder of images that does not exist.

    Raises:
        ValueError: ``where`` (the config row) leads the message.
    """
    try:
        filesystem, path = url_to_fs(folder)
        # An object store knows no folders, only names that begin alike.
        exists = "http" in filesystem.protocol or filesystem.isdir(path)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(
            f"{where}: image_folder {folder!r} cannot be opened ({one_line(str(error), 120)})"
        ) from error
    if not exists:
        raise ValueError(
            f"{where}: image_folder {folder!r} is no folder; name the one in which the paths of images begin, or remove the key"
        )
