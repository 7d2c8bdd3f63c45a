"""Turns and interleaved texts as messages and parts made of text and images.

    turn      {"role": "user", "content": "text <image>" or [{"type": "text", "text": ...}, {"type": "image", ...}]}
    segments  ["text", {"type": "image", ...}, None, ...]                 no turns: all of its text is trained

A placeholder such as ``<image>``, None and an image item without an image of its own each stand for the next image of the sample;
``<image 2>`` and an item with ``index`` stand for a certain one. An item may also hold or name its own image, see
``sequence.tasks.IMAGE_KEYS``. An image in a message of the assistant is a target image, any other one an input image, unless its item
says otherwise: ``"use": "generate"`` or ``"use": "understand"``. Which data sets have which form: see ``schemas``.
"""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from symbiotic_titan.data.fields import MEDIA, Fields, as_text, is_empty, own_image, rows_of
from symbiotic_titan.data.formats.shard import BadSample, brief
from symbiotic_titan.sequence.tasks import TASKS

# How released data write an image's place in a text. A group is the number of the image, from 1.
PLACEHOLDERS = (
    r"<image>",  # LLaVA and most others
    r"<image[ _](\d+)>",  # MMMU
    r"<\|image_(\d+)\|>",  # Phi-3-vision
    r"<\|image\|>",  # Llama 3.2
    r"<\|vision_start\|><\|image_pad\|><\|vision_end\|>",  # Qwen2-VL
    r"<image_placeholder>",  # DeepSeek-VL
    r"<ImageHere>",  # InternLM-XComposer
)
PLACEHOLDER = re.compile("|".join(PLACEHOLDERS))
# What looks like a place, and is none.
UNKNOWN_PLACE = re.compile(r"<\s*image\s*\d*\s*/?>|<\|image_pad\|>", re.IGNORECASE)
MEDIA_PLACEHOLDER = re.compile(r"<\|?(?:video|audio)(?:[ _]\d+)?\|?>")

# Values of an item's ``type``.
TEXT_TYPES = ("text", "input_text", "output_text")
IMAGE_TYPES = ("image", "image_url", "input_image")
MEDIA_TYPES = (*MEDIA, "video_url", "audio_url", "input_audio", "input_video")

# Value of an item's ``use`` -> whether it is a target image.
USES = {"generate": True, "understand": False}

# Other names of the roles in released data sets, in lower case.
ROLES = {
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "model", "bot", "bard", "bing"), "assistant"),
}

# Keys of a turn that say whether it is trained: ``weight`` of OpenAI and Mistral, ``train`` and ``training`` of axolotl, ``loss`` of
# ms-swift and XTuner, ``loss_scale`` of ms-swift.
WEIGHT_KEYS = ("weight", "train", "training", "loss", "loss_scale")
# Keys of a turn without which it would be trained as something else than it is.
UNREAD_KEYS = ("tool_calls", "function_call", "train_detail", "reasoning_content", "thinking")


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


class PlacedImages:
    """The images of a sample, handed out to their places; ``None`` as ``values`` stands for a task without images."""

    def __init__(self, fields: Fields, values: list[Any] | None) -> None:
        self.fields = fields
        self.has_images = values is not None
        self._given = [fields.image_bytes(value) for value in values or ()]
        self._placed: set[int] = set()
        self._own: set[bytes] = set()

    def next(self, where: str) -> bytes:
        """The first image that has no place yet."""
        free = (number for number in range(len(self._given)) if number not in self._placed)
        number = next(free, None)
        if number is None:
            raise BadSample("conversation", f"{where}: a place for an image that is not there")
        return self.at(number, where)

    def at(self, number: int, where: str) -> bytes:
        """Image ``number``, from 0; it may have several places."""
        if not 0 <= number < len(self._given):
            raise BadSample(
                "conversation",
                f"{where}: a place for image {number}, counted from 0, of {len(self._given)} that are there",
            )
        self._placed.add(number)
        return self._given[number]

    def own(self, item: dict[str, Any]) -> bytes:
        """The image that ``item`` holds or names itself. The sample may list it among its images as well."""
        data = self.fields.image_bytes(item)
        self._own.add(data)
        return data

    def left(self, name: str) -> list[ImagePart]:
        """Images without a place, where none has one; raises BadSample where only some have."""
        numbers = (n for n in range(len(self._given)) if n not in self._placed)
        left = [n for n in numbers if self._given[n] not in self._own]
        if left and (self._placed or self._own):
            raise BadSample(
                "conversation", f"its {name} have places for {len(left)} images too few"
            )
        return [ImagePart(self._given[number], is_target=False) for number in left]


def messages_from(
    turns: list[Any], images: PlacedImages, name: str, trained_roles: Collection[str]
) -> list[Message]:
    """``turns`` as messages; where no image has a place, all come before what is said first. A system turn without text is left out.

    name: what the sample calls its turns, for messages.   trained_roles: see ``Task``.

    Raises:
        BadSample: no turn is trained, a turn is empty or of another form, or images and places differ in number.
    """
    messages = []
    for number, turn in enumerate(turns, start=1):
        where = f"turn {number} of its {name}"
        role, content = _role_and_content(turn, where, name)
        if role == "system" and is_empty(content):
            continue
        weight = weight_of(turn, where)
        is_target = role == "assistant" and weight
        parts = list(_parts(content, images, where, is_target=is_target))
        if not parts and role == "system":
            continue
        if not parts:
            raise BadSample("empty", f"{where} is empty")
        messages.append(Message(role, parts, weight and role in trained_roles))
    _check_trained(messages, name, trained_roles)
    if left := images.left(name):
        _refuse_unknown_places(messages, name)
        first = next(message for message in messages if message.role != "system")
        first.content[:0] = left
    return messages


def _refuse_unknown_places(messages: list[Message], name: str) -> None:
    """Where no image has a place, refuse a text that may mean one."""
    for part in (part for message in messages for part in message.content):
        if isinstance(part, str) and (found := UNKNOWN_PLACE.search(part)):
            raise BadSample(
                "conversation",
                f"its {name} have {found.group()}, which looks like the place of an image; write <image> for it",
            )


def _role_and_content(turn: Any, where: str, name: str) -> tuple[str, Any]:
    keys = ("from", "value") if name == "conversations" else ("role", "content")
    speaker = (turn.get("role") or turn.get("from")) if isinstance(turn, dict) else None
    if not isinstance(speaker, str):
        raise BadSample("conversation", f"{where} must be a table with {keys[0]!r} and {keys[1]!r}")
    for key in UNREAD_KEYS:
        if not is_empty(turn.get(key)):
            raise BadSample("conversation", f"{where} has {key!r}, which is not supported")
    lower = speaker.strip().lower()
    role = ROLES.get(lower, lower if lower in ("user", "assistant", "system") else speaker)
    content = turn.get("content")
    return role, turn.get("value") if content is None else content


def weight_of(turn: dict[str, Any], where: str) -> bool:
    """Whether ``turn`` may be trained; raises BadSample where it has a weight between."""
    given = {key: turn[key] for key in WEIGHT_KEYS if turn.get(key) is not None}
    for key, value in given.items():
        if value not in (0, 1):
            raise BadSample(
                "conversation",
                f"{where} has {key} = {brief(value)}; only 0 (not trained) and 1 are supported",
            )
    return all(given.values())


def _check_trained(messages: list[Message], name: str, trained_roles: Collection[str]) -> None:
    if not any(message.trained for message in messages):
        roles = " or ".join(trained_roles)
        why = (
            f"every turn of the {roles} in its {name} has weight 0"
            if any(message.role in trained_roles for message in messages)
            else f"no turn of its {name} is the {roles}'s"
        )
        raise BadSample("conversation", why)


def parts_from(items: list[Any], images: PlacedImages, name: str) -> list[Part]:
    """Text and images of ``items``, which the sample calls ``name``; raises BadSample."""
    parts = list(_parts(items, images, f"its {name}", is_target=False))
    if not any(isinstance(part, str) or part.is_target for part in parts):
        raise BadSample("empty", f"its {name} hold nothing to train")
    if left := images.left(name):
        raise BadSample("conversation", f"its {name} have places for {len(left)} images too few")
    return parts


def _parts(content: Any, images: PlacedImages, where: str, *, is_target: bool) -> Iterator[Part]:
    """Text and images of ``content``: text with placeholders, or a list of items."""
    content = rows_of(content)
    for item in content if isinstance(content, list) else [content]:
        kind = item.get("type") if isinstance(item, dict) else None
        if isinstance(item, str) or kind in TEXT_TYPES:
            text = item if isinstance(item, str) else item.get("text")
            yield from split_text(text, images, where, is_target=is_target)
        elif kind in IMAGE_TYPES or (item is None and isinstance(content, list)):
            yield _image_part(item or {}, images, where, is_target)
        elif kind in MEDIA_TYPES:
            raise BadSample("conversation", f"{where}: {kind} is not supported")
        else:
            raise BadSample("conversation", f"{where}: {brief(item)} is neither text nor image")


def split_text(text: Any, images: PlacedImages, where: str, *, is_target: bool) -> Iterator[Part]:
    """Text around placeholders; line breaks beside an image only set it apart. Raises BadSample."""
    if not isinstance(text, str):
        raise BadSample("wrong_type", f"the text of {where} must be a string, got {brief(text)}")
    if not images.has_images:
        refuse_placeholders(text, images.fields, where)
        if text.strip():
            yield as_text(text, where)
        return
    if "<" not in text:  # as most texts; spares the searches
        if text.strip():
            yield as_text(text, where)
        return
    if found := MEDIA_PLACEHOLDER.search(text):
        raise BadSample(
            "conversation", f"{where} has {found.group()}: video and audio are not supported"
        )
    places = list(PLACEHOLDER.finditer(text))
    ends = [0, *(place.end() for place in places)]
    starts = [*(place.start() for place in places), len(text)]
    for number, (start, end) in enumerate(zip(ends, starts, strict=True)):
        if number:
            yield _placed(places[number - 1], images, where, is_target)
        part = text[start:end].strip("\n") if places else text
        if part.strip():
            yield as_text(part, where)


def _placed(place: re.Match[str], images: PlacedImages, where: str, is_target: bool) -> ImagePart:
    numbers = [int(group) for group in place.groups() if group]
    if numbers == [0]:
        raise BadSample("conversation", f"{where} has {place.group()}; images are counted from 1")
    data = images.at(numbers[0] - 1, where) if numbers else images.next(where)
    return ImagePart(data, is_target)


def refuse_placeholders(text: str, fields: Fields, where: str, *, has_target: bool = False) -> None:
    """Refuse ``text``, which is trained as it is, where it has a place for an image or video that the sample has.

    has_target: the sample's image is its target, so that it can have no place in a text.

    Raises:
        BadSample: names the placeholder, and the tasks that read such samples.
    """
    if "<" not in text:
        return
    place = PLACEHOLDER.search(text)
    if place and (has_target or fields.image_values()):
        tasks = [TASKS[name] for name in TASKS]
        able = [t.name for t in tasks if t.input_images and (t.has_targets or not has_target)]
        raise BadSample(
            "conversation",
            f"{where} has {place.group()}, a place for an image, which this task does not read; use the task {' or '.join(able)}",
        )
    media = MEDIA_PLACEHOLDER.search(text)
    if media and any(not is_empty(fields.named(name)) for name in MEDIA):
        raise BadSample(
            "conversation", f"{where} has {media.group()}: video and audio are not supported"
        )


def _image_part(
    item: dict[str, Any], images: PlacedImages, where: str, is_target: bool
) -> ImagePart:
    if not images.has_images:
        raise BadSample("conversation", f"{where}: an image, but the source's task has none")
    use = item.get("use")
    if use is not None and use not in USES:
        raise BadSample(
            "conversation", f"{where}: use must be generate or understand, got {brief(use)}"
        )
    return ImagePart(_image_data(item, images, where), is_target if use is None else USES[use])


def _image_data(item: dict[str, Any], images: PlacedImages, where: str) -> bytes:
    if own_image(item) is not None:
        return images.own(item)
    index = item.get("index")
    if index is None:
        return images.next(where)
    if type(index) not in (int, float) or index != int(index):
        raise BadSample("wrong_type", f"{where}: index must be a whole number, got {brief(index)}")
    return images.at(int(index), where)
