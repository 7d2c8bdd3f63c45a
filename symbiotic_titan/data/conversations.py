"""Conversations and interleaved texts, in the schemas that data sets have, as messages made of text and images.

    messages       [{"role": "user", "content": "text <image>" or [{"type": "text", "text": ...}, {"type": "image", ...}]}, ...]
    conversations  [{"from": "human", "value": "<image> text"}, {"from": "gpt", "value": ...}, ...]
    segments       ["text", {"type": "image", ...}, None, ...]                 no messages: all of its text is trained

``<image>``, None and an image item without an image of its own each stand for the next image of the sample's field ``image``;
an item may hold or name its own (``image``, ``path`` or ``bytes``). An image in a message of the assistant is a target image, any
other one an input image, unless its item says otherwise: ``"use": "generate"`` or ``"use": "understand"``.
"""

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from symbiotic_titan.data.fields import Fields, as_text
from symbiotic_titan.data.formats.shard import BadSample

PLACEHOLDER = "<image>"
# Value of an item's ``use`` -> whether it is a target image.
USES = {"generate": True, "understand": False}

# Other names of the roles in released data sets.
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}


@dataclass(frozen=True)
class ImagePart:
    """An encoded image: a target, which the model learns to generate, or an input."""

    data: bytes
    is_target: bool


Part = str | ImagePart


@dataclass(frozen=True)
class Message:
    """One turn. ``trained``: its text carries the next-token loss."""

    role: str
    content: list[Part]
    trained: bool


def messages_of(
    fields: Fields, schema: str, *, has_images: bool, trained_roles: Collection[str]
) -> list[Message]:
    """The turns of a sample in ``schema``, "messages" or "conversations".

    Without ``has_images``, ``<image>`` is text like any other.

    Raises:
        BadSample: it has another schema, no turn is trained, a turn is empty, or images and placeholders differ in number.
    """
    role_key, content_key = ("role", "content") if schema == "messages" else ("from", "value")
    images = _Images(fields, has_images)
    messages = []
    for number, turn in enumerate(_items(fields.need(schema), schema), start=1):
        where = f"turn {number} of its {schema}"
        speaker = turn.get(role_key) if isinstance(turn, dict) else None
        if not isinstance(speaker, str):
            raise BadSample(
                "conversation", f"{where} must be a table with {role_key!r} and {content_key!r}"
            )
        role = ROLES.get(speaker, speaker)
        is_target = role == "assistant"
        content = list(_parts(turn.get(content_key), images, where, is_target=is_target))
        if not content:
            raise BadSample("empty", f"{where} is empty")
        messages.append(Message(role, content, role in trained_roles))
    if not any(message.trained for message in messages):
        raise BadSample(
            "conversation", f"no turn of its {schema} is the {' or '.join(trained_roles)}'s"
        )
    left = images.left()
    if left and not images.num_placed:
        first = next(message for message in messages if message.role != "system")
        first.content[:0] = left
    elif left:
        raise BadSample("conversation", f"its {schema} have places for {len(left)} images too few")
    return messages


def interleaved_parts(fields: Fields) -> list[Part]:
    """Text and images of a sample in the schema "segments"; raises BadSample."""
    images = _Images(fields, has_images=True)
    items = _items(fields.need("segments"), "segments")
    parts = list(_parts(items, images, "its segments", is_target=False))
    if not any(isinstance(part, str) or part.is_target for part in parts):
        raise BadSample("empty", "its segments hold nothing to train")
    if left := images.left():
        raise BadSample("conversation", f"its segments have places for {len(left)} images too few")
    return parts


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

    def left(self) -> list[ImagePart]:
        return [ImagePart(data, is_target=False) for data in self._given[self.num_placed :]]


def _items(value: Any, name: str) -> list[Any]:
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


def _parts(content: Any, images: _Images, where: str, *, is_target: bool) -> Iterator[Part]:
    """Text and images of ``content``: text with placeholders, or a list of items."""
    for item in content if isinstance(content, list) else [content]:
        kind = item.get("type") if isinstance(item, dict) else None
        if isinstance(item, str) or kind == "text":
            text = item if isinstance(item, str) else item.get("text")
            yield from _split(text, images, where, is_target)
        elif kind == "image" or (item is None and isinstance(content, list)):
            yield _image_part(item or {}, images, where, is_target)
        else:
            raise BadSample("conversation", f"{where}: {item!r:.80} is neither text nor image")


def _split(text: Any, images: _Images, where: str, is_target: bool) -> Iterator[Part]:
    """Text around placeholders; line breaks beside an image only set it apart."""
    if not isinstance(text, str):
        raise BadSample("wrong_type", f"the text of {where} must be a string, got {text!r:.80}")
    parts = text.split(PLACEHOLDER) if images.has_images else [text]
    for number, part in enumerate(parts):
        if number:
            yield ImagePart(images.next(where), is_target)
        part = part.strip("\n") if len(parts) > 1 else part
        if part.strip():
            yield as_text(part, where)


def _image_part(item: dict[str, Any], images: _Images, where: str, is_target: bool) -> ImagePart:
    if not images.has_images:
        raise BadSample("conversation", f"{where}: an image, but the source's task has none")
    use = item.get("use")
    if use is not None and use not in USES:
        raise BadSample(
            "conversation", f"{where}: use must be generate or understand, got {use!r:.80}"
        )
    named = next((item[key] for key in ("image", "bytes", "path") if item.get(key)), None)
    data = images.next(where) if named is None else images.fields.image_bytes(named)
    return ImagePart(data, is_target if use is None else USES[use])
