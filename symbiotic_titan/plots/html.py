"""Self-contained HTML pages from templates: what all commands that write a page share."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, select_autoescape
from PIL import Image


@dataclass(frozen=True)
class Picture:
    """A figure as a file.   alt: what it shows, for those who cannot see it.   notes: below it."""

    alt: str
    png: bytes
    notes: Sequence[str] = ()


def templates(*packages: str) -> Environment:
    """The templates of ``packages`` and, below them, those of this one. What is put into HTML is escaped; a name that is not given is
    an error."""
    loaders = [PackageLoader(package) for package in (*packages, "symbiotic_titan.plots")]
    environment = Environment(
        loader=ChoiceLoader(loaders),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["data_uri"] = data_uri
    return environment


def data_uri(png: bytes) -> str:
    """The picture itself in place of an address."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def png_of(image: Image.Image) -> bytes:
    """The image as a file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
