"""The encoded bytes of an image, in every form in which data sets hold or name one."""

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

import fsspec
from fsspec.core import url_to_fs

from symbiotic_titan.data.decoding import format_of
from symbiotic_titan.data.fields import own_image
from symbiotic_titan.data.formats.shard import BadSample, brief, one_line

# Base64 text of an image is at least this long; a shorter string is a name.
SHORTEST_BASE64 = 64


@dataclass(frozen=True)
class ImageFiles:
    """Reads images. ``folder``: where relative paths are looked up."""

    folder: str = ""

    def read(self, value: Any, members: Mapping[str, Any]) -> bytes:
        """The encoded image that ``value`` holds or names: bytes, base64 text, a ``data:`` URI, the name of one of ``members``, a path
        or URL, or a table with one of these.

        Raises:
            BadSample: it does neither, or cannot be read.
        """
        if isinstance(value, dict):
            inner = own_image(value)
            if isinstance(inner, dict):
                inner = own_image(inner)
            value = value if inner is None else inner
        if isinstance(value, str) and isinstance(members.get(value), bytes):
            value = members[value]
        if isinstance(value, bytes):
            return decoded_base64(value.decode("ascii")) if _is_base64(value[:64]) else value
        if not isinstance(value, str) or not value:
            raise BadSample("wrong_type", f"an image must be bytes or a path, got {brief(value)}")
        if value[:5].lower() == "data:":
            return _from_data_uri(value)
        if len(value) >= SHORTEST_BASE64 and _is_base64(value[:64]):
            return decoded_base64(value)
        return self._from_file(value)

    def _from_file(self, path: str) -> bytes:
        if self.folder and not path.startswith("/") and "://" not in path:
            path = f"{self.folder}/{path}"
        try:
            return _content(path)
        except (OSError, ValueError, ImportError) as error:
            reason = one_line(str(error).replace(path, "..."), 90)
            shown = path if len(path) <= 90 else f"...{path[-87:]}"
            raise BadSample("unreadable", f"image {shown} cannot be read ({reason})") from error


def _content(path: str) -> bytes:
    """Bytes of the file ``path``. A name with escapes such as ``%20`` is taken as it is, or else unescaped."""
    try:
        with fsspec.open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        if "://" in path or unquote(path) == path:
            raise
        with fsspec.open(unquote(path), "rb") as file:
            return file.read()


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
    return decoded_base64(unquote(body)) if head.endswith(";base64") else unquote_to_bytes(body)


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
