"""Conversations and interleaved texts, in the shapes that data sets have, as turns made of text and pictures.

    messages       [{"role": "user", "content": "text <image>" or [{"type": "text", "text": ...}, {"type": "image", ...}]}, ...]
    conversations  [{"from": "human", "value": "<image> text"}, {"from": "gpt", "value": ...}, ...]
    segments       ["text", {"type": "image", ...}, None, ...]                 no turns: all of its text is trained

``<image>``, None and an image item that names none each stand for the next image of the sample's field ``image``; an item may
also name its own (``image``, ``path`` or ``bytes``). An image is to be generated in a turn of the assistant and to be understood
elsewhere, unless its item says otherwise: ``"use": "generate"`` or ``"use": "understand"``.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from symbiotic_titan.data.fields import (
    Fields,
    as_text,
)
from symbiotic_titan.data.formats.shard import BadSample

PLACEHOLDER = "<image>"
USES = {"generate": True, "understand": False}

# What data sets call the two sides.
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}


@dataclass(frozen=True)
class Picture:
    """An encoded image, to be generated or to be understood."""

    data: bytes
    generated: bool


Piece = str | Picture


@dataclass(frozen=True)
class Speech:
    """What one side says."""

    role: str
    pieces: list[Piece]

    @property
    def trained(self) -> bool:
        return self.role == "assistant"


def speeches_of(fields: Fields, shape: str, *, has_images: bool) -> list[Speech]:
    """The turns of a sample in ``shape``, "messages" or "conversations".

    Without ``has_images`` the text ``<image>`` is text like any other.

    Raises:
        BadSample: it has another shape, nobody answers, somebody says nothing, or images and their places differ in number.
    """
    said_by, said = ("role", "content") if shape == "messages" else ("from", "value")
    images = _Images(fields, has_images)
    speeches = []
    for number, turn in enumerate(_rows(fields.need(shape), shape), start=1):
        where = f"turn {number} of its {shape}"
        side = turn.get(said_by) if isinstance(turn, dict) else None
        if not isinstance(side, str):
            raise BadSample(
                "conversation", f"{where} must be a table with {said_by!r} and {said!r}"
            )
        role = ROLES.get(side, side)
        pieces = list(_pieces(turn.get(said), images, where, generated=role == "assistant"))
        if not pieces:
            raise BadSample("empty", f"{where} is empty")
        speeches.append(Speech(role, pieces))
    if not any(speech.trained for speech in speeches):
        raise BadSample("conversation", f"no turn of its {shape} is the assistant's")
    left = images.left()
    if left and not images.num_placed:
        first = next(speech for speech in speeches if speech.role != "system")
        first.pieces[:0] = left
    elif left:
        raise BadSample("conversation", f"its {shape} have places for {len(left)} images too few")
    return speeches


def segments_of(fields: Fields) -> list[Piece]:
    """Text and pictures of a sample in the shape "segments"; raises BadSample."""
    images = _Images(fields, has_images=True)
    items = _rows(fields.need("segments"), "segments")
    pieces = list(_pieces(items, images, "its segments", generated=False))
    if not any(isinstance(piece, str) or piece.generated for piece in pieces):
        raise BadSample("empty", "its segments hold nothing to train")
    if left := images.left():
        raise BadSample("conversation", f"its segments have places for {len(left)} images too few")
    return pieces


class _Images:
    """The images of a sample, handed out in order."""

    def __init__(self, fields: Fields, has_images: bool) -> None:
        self.fields = fields
        self.has_images = has_images
        self._given = fields.images() if has_images else []
        self.num_placed = 0

    def next(self, where: str) -> bytes:
        if self.num_placed == len(self._given):
            raise BadSample("conversation", f"{where}: a place for an image that is not there")
        self.num_placed += 1
        return self._given[self.num_placed - 1]

    def left(self) -> list[Picture]:
        return [Picture(data, generated=False) for data in self._given[self.num_placed :]]


def _rows(value: Any, name: str) -> list[Any]:
    """A list, or JSON text of one, that is not empty."""
    if isinstance(value, (str, bytes)):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise BadSample("json", f"its {name} cannot be parsed ({error})") from error
    if not isinstance(value, list):
        raise BadSample("wrong_type", f"its {name} must be a list, got {value!r:.80}")
    if not value:
        raise BadSample("empty", f"its {name} are empty")
    return value


def _pieces(content: Any, images: _Images, where: str, *, generated: bool) -> Iterator[Piece]:
    """Text and pictures of ``content``: text with placeholders, or a list of items."""
    for item in content if isinstance(content, list) else [content]:
        kind = item.get("type") if isinstance(item, dict) else None
        if isinstance(item, str) or kind == "text":
            text = item if isinstance(item, str) else item.get("text")
            yield from _split(text, images, where, generated)
        elif kind == "image" or (item is None and isinstance(content, list)):
            yield _picture(item or {}, images, where, generated)
        else:
            raise BadSample("conversation", f"{where}: {item!r:.80} is neither text nor image")


def _split(text: Any, images: _Images, where: str, generated: bool) -> Iterator[Piece]:
    """Text around placeholders; line breaks beside an image only set it apart."""
    if not isinstance(text, str):
        raise BadSample("wrong_type", f"the text of {where} must be a string, got {text!r:.80}")
    parts = text.split(PLACEHOLDER) if images.has_images else [text]
    for number, part in enumerate(parts):
        if number:
            yield Picture(images.next(where), generated)
        part = part.strip("\n") if len(parts) > 1 else part
        if part.strip():
            yield as_text(part, where)


def _picture(item: dict[str, Any], images: _Images, where: str, generated: bool) -> Picture:
    if not images.has_images:
        raise BadSample("conversation", f"{where}: an image, which the task lm has not")
    use = item.get("use")
    if use is not None and use not in USES:
        raise BadSample(
            "conversation", f"{where}: use must be generate or understand, got {use!r:.80}"
        )
    named = next((item[key] for key in ("image", "bytes", "path") if item.get(key)), None)
    data = images.next(where) if named is None else images.fields.image_bytes(named)
    return Picture(data, generated if use is None else USES[use])
