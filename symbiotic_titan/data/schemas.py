"""The forms that released data sets have, recognised by the names of their fields, as messages or as parts of a text.

SHAPES is the table: the schema of fields by which a form is recognised (``sequence.tasks``), and the function that reads it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from symbiotic_titan.data.conversations import (
    PLACEHOLDER,
    ImagePart,
    Message,
    Part,
    PlacedImages,
    messages_from,
    parts_from,
)
from symbiotic_titan.data.fields import Fields, Keys, as_text, is_empty, items_of, schema_of
from symbiotic_titan.data.formats.shard import BadSample, Sample, brief
from symbiotic_titan.sequence.tasks import (
    ALPACA_SCHEMA,
    CONVERSATION_SCHEMAS,
    DRAWN_FIELDS,
    EDIT_CHAIN_SCHEMA,
    EDIT_NUMBERS,
    EDIT_SCHEMA,
    MMC4_SCHEMA,
    NUMBERED_EDITS_SCHEMA,
    QUESTION_SCHEMA,
    SEGMENTS_SCHEMA,
    TEXTS_SCHEMA,
    Task,
)

# Characters of a sample's layout in the log.
LONGEST_LAYOUT = 120


@dataclass(frozen=True)
class Content:
    """What a sample holds: ``messages``, or ``parts`` of a text without turns."""

    messages: list[Message] | None = None
    parts: list[Part] | None = None

    @property
    def images(self) -> list[ImagePart]:
        """In the order in which documents hold them."""
        groups = [self.parts or [], *(message.content for message in self.messages or [])]
        return [part for group in groups for part in group if isinstance(part, ImagePart)]


@dataclass(frozen=True)
class Shape:
    """A form of samples.

    name:   for the log; "" for a form of our own. name_of_parts: the same where a sample has no turns, if that differs.
    schema: fields whose presence tells it; the last one distinguishes it from the others of a task.
    read:   raises BadSample.
    """

    name: str
    schema: tuple[str, ...]
    read: Callable[[Task, Fields], Content]
    name_of_parts: str = ""


def content_of(task: Task, fields: Fields, schema: tuple[str, ...]) -> Content | None:
    """What a sample of ``task`` and ``schema`` holds; None for a plain text or a caption, whose layout reads the fields itself. Raises
    BadSample."""
    shape = SHAPES.get(schema)
    return None if shape is None else shape.read(task, fields)


def _placed(task: Task, fields: Fields, values: list[Any] | None = None) -> PlacedImages:
    """The images ``values``, by default those of the field ``image``, for a task that has any."""
    if not task.has_images:
        return PlacedImages(fields, None)
    return PlacedImages(fields, fields.image_values() if values is None else values)


def _of_turns(
    task: Task, fields: Fields, turns: list[Any], name: str, values: list[Any] | None = None
) -> Content:
    images = _placed(task, fields, values)
    return Content(messages=messages_from(turns, images, name, task.trained_roles))


def _turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def _pairs(rows: list[Any]) -> list[Any]:
    """``rows``, with a turn of the user and one of the assistant for each table that has both (Cauldron, FineVision)."""
    turns: list[Any] = []
    for row in rows:
        if isinstance(row, dict) and "user" in row and "assistant" in row:
            turns += [_turn("user", row["user"]), {**row, **_turn("assistant", row["assistant"])}]
        else:
            turns.append(row)
    return turns


def _with_system(fields: Fields, turns: list[Any]) -> list[Any]:
    """``turns``, after the system prompt that the sample has in a field of its own."""
    system = fields.get("system")
    if is_empty(system):
        return turns
    prompt = as_text(system, "its system prompt")
    first = turns[0] if isinstance(turns[0], dict) else {}
    if "system" not in (first.get("role"), first.get("from")):
        return [_turn("system", prompt), *turns]
    own = first.get("content") or first.get("value")
    if is_empty(own):
        return [_turn("system", prompt), *turns[1:]]
    if own != prompt:
        raise BadSample("conversation", "it has two system prompts: a field, and the first turn")
    return turns


def _conversation(name: str) -> Callable[[Task, Fields], Content]:
    def read(task: Task, fields: Fields) -> Content:
        turns = _pairs(items_of(fields.need(name), name))
        return _of_turns(task, fields, _with_system(fields, turns), name)

    return read


def _question(task: Task, fields: Fields) -> Content:
    """Two turns: the images and the question, then the answer."""
    images = PlacedImages(fields, fields.some_image_values())
    turns = [_turn("user", fields.text("question")), _turn("assistant", fields.text("answer"))]
    messages = messages_from(turns, images, "question and answer", ("user", "assistant"))
    trained = ("question" in task.trained_fields, "answer" in task.trained_fields)
    pairs = zip(messages, trained, strict=True)
    return Content(messages=[replace(message, trained=on) for message, on in pairs])


def _segments(task: Task, fields: Fields) -> Content:
    items = items_of(fields.need("segments"), "segments")
    return Content(parts=parts_from(items, _placed(task, fields), "segments"))


def _texts(task: Task, fields: Fields) -> Content:
    """Questions with their answers, or a list of texts beside a list of images: each place has one of the two."""
    texts = items_of(fields.need("texts"), "texts")
    if all(isinstance(text, dict) for text in texts):
        return _of_turns(task, fields, _pairs(texts), "texts")
    if not task.has_targets:
        raise BadSample(
            "conversation", "its texts are parts of a document; that needs the task interleaved"
        )
    name = fields.keys.get("image", "images")
    slots = items_of(fields.named(str(name)) or [None] * len(texts), "images")
    if len(slots) != len(texts):
        raise BadSample(
            "conversation", f"it has {len(texts)} texts and {len(slots)} places for images"
        )
    return _among(task, fields, list(zip(texts, slots, strict=True)))


def _among(task: Task, fields: Fields, places: list[tuple[Any, Any]]) -> Content:
    """A document of ``places``, (text, None) or (None, image) each."""
    images: list[Any] = []
    items: list[Any] = []
    for number, (text, image) in enumerate(places):
        if (text is None) == (image is None):
            found = "neither a text nor an image" if text is None else "a text and an image"
            raise BadSample("missing", f"place {number} of its texts has {found}")
        if image is not None:
            items.append({"type": "image", "index": len(images)})
            images.append(image)
        elif text:
            items.append(text)
    pages = _pages(fields, images)
    return Content(parts=parts_from(items, _placed(task, fields, pages), "texts"))


def _pages(fields: Fields, images: list[Any]) -> list[Any]:
    """``images``; where their names stand for the pages of one TIFF (MINT-1T's PDFs), those pages."""
    tiff = fields.named("tiff") or fields.named("tif")
    members = fields.names
    if not isinstance(tiff, bytes) or any(
        not isinstance(name, str) or name in members for name in images
    ):
        return images
    assert fields.files is not None, "fields made without files read no images"
    return fields.files.pages(tiff, len(images))


def _mmc4(task: Task, fields: Fields) -> Content:
    """Sentences, each after the images that were matched with it."""
    texts = items_of(fields.need("text_list"), "text_list")
    infos = fields.get("image_info")
    infos = [] if is_empty(infos) else items_of(infos, "image_info")
    matched: dict[int, list[Any]] = {}
    for number, info in enumerate(infos):
        index = info.get("matched_text_index") if isinstance(info, dict) else None
        if type(index) is not int or not 0 <= index < len(texts):
            raise BadSample(
                "conversation",
                f"image {number} of its image_info has matched_text_index {brief(index)}, and there are {len(texts)} texts",
            )
        matched.setdefault(index, []).append(info)
    places: list[tuple[Any, Any]] = []
    for number, text in enumerate(texts):
        places += [(None, info) for info in matched.get(number, [])]
        if text is not None and places and isinstance(places[-1][0], str):
            places[-1] = (f"{places[-1][0]} {text}", None)  # two sentences
        elif text is not None:
            places.append((text, None))
    return _among(task, fields, places)


def _alpaca(task: Task, fields: Fields) -> Content:
    """Earlier questions with their answers, if any; the instruction and, on the next line, its input; the output."""
    turns: list[Any] = []
    history = fields.get("history")
    for pair in [] if is_empty(history) else items_of(history, "history"):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise BadSample("conversation", f"its history must have pairs, got {brief(pair)}")
        turns += [_turn("user", pair[0]), _turn("assistant", pair[1])]
    asked = [fields.text("instruction")]
    if not is_empty(fields.get("input")):
        asked.append(fields.text("input"))
    turns += [_turn("user", "\n".join(asked)), _turn("assistant", fields.text("output"))]
    return _of_turns(task, fields, _with_system(fields, turns), "instruction and output")


def _edit(task: Task, fields: Fields) -> Content:
    before, after = (fields.image_values(name) for name in ("input_image", "output_image"))
    if len(after) != 1 or not before:
        raise BadSample(
            "conversation", f"it has {len(before)} input images and {len(after)} output images"
        )
    return _edits(task, fields, before, after, [fields.text("instruction")])


def _edit_chain(task: Task, fields: Fields) -> Content:
    """Images, and between two of them the instructions that say the same in other words."""
    images = fields.image_values("image_list")
    choices = items_of(fields.need("instruction_list"), "instruction_list")
    if len(images) != len(choices) + 1:
        raise BadSample(
            "conversation", f"it has {len(images)} images and {len(choices)} instructions between"
        )
    said = [
        fields.one_of(
            choice if isinstance(choice, list) else [choice],
            f"instruction {number} of its instruction_list",
            f"instruction {number}",
        )
        for number, choice in enumerate(choices)
    ]
    return _edits(task, fields, images[:1], images[1:], said)


def _numbered_edits(task: Task, fields: Fields) -> Content:
    """An image, and for each edit its instruction and the image that it gives (SEED-Data-Edit, part 3)."""
    first, said, after = fields.image_values("input_image"), [], []
    for number in EDIT_NUMBERS:
        found = fields.image_values(f"edit_image_{number}")
        if not found and is_empty(fields.get(f"instruction_{number}")):
            break
        if len(first) != 1 or len(found) != 1:
            raise BadSample("missing", f"an image of its edit {number} is missing")
        said.append(fields.text(f"instruction_{number}"))
        after += found
    return _edits(task, fields, first, after, said)


def _edits(
    task: Task, fields: Fields, before: list[Any], after: list[Any], instructions: list[str]
) -> Content:
    """Turns of an image and what to do with it, each answered by a target image, which the next turn begins with as an input."""
    turns: list[Any] = []
    seen: list[Any] = []
    for number, instruction in enumerate(instructions):
        shown = before if number == 0 else [after[number - 1]]
        seen += shown
        has_places = PLACEHOLDER.search(instruction) is not None
        places = [] if has_places else [{"type": "image"} for _ in shown]
        turns.append(_turn("user", [*places, instruction]))
        turns.append(_turn("assistant", [{"type": "image", "image": after[number]}]))
    return _of_turns(task, fields, turns, "instructions", seen)


# Schema of fields -> the form of samples that have it.
SHAPES: dict[tuple[str, ...], Shape] = {
    shape.schema: shape
    for shape in (
        Shape("", QUESTION_SCHEMA, _question),
        Shape("", SEGMENTS_SCHEMA, _segments),
        *(Shape("", schema, _conversation(schema[0])) for schema in CONVERSATION_SCHEMAS),
        Shape(
            "The Cauldron, FineVision (texts are questions with answers)",
            TEXTS_SCHEMA,
            _texts,
            "OBELICS, MINT-1T (texts and images of one length)",
        ),
        Shape("mmc4 (text_list, image_info)", MMC4_SCHEMA, _mmc4),
        Shape("Alpaca (instruction, input, output)", ALPACA_SCHEMA, _alpaca),
        Shape("editing pair (image, instruction, image)", EDIT_SCHEMA, _edit),
        Shape("BAGEL (image_list, instruction_list)", EDIT_CHAIN_SCHEMA, _edit_chain),
        Shape(
            "SEED-Data-Edit (instruction_1, edit_image_1 ...)",
            NUMBERED_EDITS_SCHEMA,
            _numbered_edits,
        ),
    )
}


def layout_text(content: Content) -> str:
    """``content`` in a few words, for the log: ``user: image 1, TEXT; assistant: TEXT``."""
    number = 0

    def words(parts: list[Part]) -> str:
        nonlocal number
        out = []
        for part in parts:
            if isinstance(part, ImagePart):
                number += 1
                out.append(f"{'target' if part.is_target else 'image'} {number}")
            else:
                out.append("TEXT")
        return ", ".join(out)

    if content.messages is not None:
        text = "; ".join(f"{m.role}: {words(m.content)}" for m in content.messages)
    else:
        text = words(content.parts or [])
    return text if len(text) <= LONGEST_LAYOUT else f"{text[:LONGEST_LAYOUT]} ..."


class _NoImages:
    """Reads no image, so that a description costs no download."""

    def read(self, value: Any, members: Mapping[str, Any]) -> bytes:
        return b""

    def pages(self, data: bytes, number: int) -> list[bytes]:
        return [b""] * number


def recognised(task: Task, sample: Sample, keys: Keys) -> str:
    """What was recognised in ``sample``, and its layout; "" for one of a plain form. Raises BadSample."""
    if task.layout is not None:
        return ""
    fields = Fields(sample, keys, files=_NoImages())
    schema = schema_of(task, fields)
    shape = SHAPES.get(schema)
    content = None if shape is None else shape.read(task, fields)
    found = []
    if shape is not None and content is not None:
        found = [shape.name if content.parts is None else shape.name_of_parts or shape.name]
    drawn = [name for name in schema if name in DRAWN_FIELDS]
    found += [
        f"one of {len(texts)} texts of {name} at random"
        for name in drawn
        if isinstance(texts := fields.several(name), list)
    ]
    named = ", ".join(filter(None, found))
    return f"{named}: {layout_text(content)}" if named and content else named
