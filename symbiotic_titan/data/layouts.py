"""Where a sample's fields become token ids, trained or not: one layout per schema of fields. ``data.sequence_builder`` makes the tensor
of labels from them.

    lm           <bos> TEXT <eos>
    mmu          <bos> <user> <vit_start> [vit] <vit_end> question <assistant> ANSWER <eos>
    t2i(_long)   <bos> <user> CAPTION <assistant> <vae_start> [vae] <vae_end> <eos>
    interleaved  <bos> TEXT <vit_start> [vit] <vit_end> TEXT <vae_start> [vae] <vae_end> <eos>, or turns of a conversation

All but t2i may also be conversations of several turns, where the assistant's text and the end of its turns are trained as next
tokens. <bos> stands for the tokens that begin a document (``opening``); <user>, <assistant> and the <eos> of a turn for those that
the tokenizer puts around turns (``turn``, ``separator``). Otherwise trained: all of lm after <bos>; ANSWER and its <eos>; CAPTION,
<vae_start> and <eos>; TEXT, <vae_start> and <eos>. Image tokens are never labels.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from symbiotic_titan.config.data import Data, DataSource
from symbiotic_titan.data.conversations import (
    ImagePart,
    Message,
    Part,
    refuse_placeholders,
)
from symbiotic_titan.data.decoding import DECODE_ERRORS, decode_image
from symbiotic_titan.data.documents import Segment, TextSegment, VaeSegment, drop_overlap
from symbiotic_titan.data.fields import CACHED_EXTENSION, Fields, schema_of
from symbiotic_titan.data.formats.shard import BadSample
from symbiotic_titan.data.images import ImageSizeError, vit_patches
from symbiotic_titan.data.latents import TargetImages
from symbiotic_titan.data.schemas import content_of
from symbiotic_titan.data.tokenizer import Tokenizer
from symbiotic_titan.sequence.geometry import ImageGeometry
from symbiotic_titan.sequence.tasks import TASKS, Task

# Images of the largest size that a sample may have; or more of smaller ones.
LARGE_IMAGES = 10


@dataclass(frozen=True)
class TaskSample:
    """A sample of ``task``, and what its layout makes segments with.

    source:         the row of the config that it comes from.
    max_tokens:     positions that a document of the task may take.
    drops_caption:  this sample is trained without its caption.
    sizes:          pixels of the images that were decoded.
    """

    task: Task
    source: DataSource
    fields: Fields
    max_tokens: int
    drops_caption: bool
    config: Data
    geometry: ImageGeometry
    targets: TargetImages
    tokenizer: Tokenizer
    sizes: list[int] = field(default_factory=list)

    def text(self, text: str, *, trained: bool = False) -> TextSegment:
        return TextSegment(self.encoded(text), trained)

    def encoded(self, text: str) -> list[int]:
        """Ids of ``text``; raises BadSample where it is too long for a tokenizer."""
        limit = self.config.max_text_bytes
        # A character has up to 4 bytes.
        if len(text) > limit // 4 and (size := len(text.encode("utf-8", "replace"))) > limit:
            message = f"a text of it has {size} bytes, more than data.max_text_bytes = {limit}"
            raise BadSample("too_large", message)
        return self.tokenizer.encode(text)

    def special(self, role: str, *, trained: bool = False) -> TextSegment:
        """One special token; ``role`` is a field of SpecialTokens."""
        return TextSegment([getattr(self.tokenizer.special, role)], trained)

    def decoded(self, data: bytes) -> Image.Image:
        """Raises BadSample; also where the sample has so many large images that decoding them would take minutes."""
        limit = self.config.max_image_pixels
        image = decoded(data, limit, self.source.truncated_images)
        self.sizes.append(image.width * image.height)
        if sum(self.sizes) > LARGE_IMAGES * limit:
            message = f"its images have more than {LARGE_IMAGES} x data.max_image_pixels = {limit}"
            raise BadSample("too_large", message)
        return image

    def input_image(self, data: bytes) -> list[Segment]:
        """An encoded image between its special tokens; raises BadSample."""
        config, image = self.config, self.decoded(data)
        try:
            segment = vit_patches(image, config.vit_pixels, self.geometry, config.vit_min_pixels)
        except ImageSizeError as error:
            raise BadSample("image_size", f"its image has the wrong size ({error})") from error
        return [self.special("vit_start"), segment, self.special("vit_end")]

    def target_image(self, data: bytes | None = None, *, trained: bool = True) -> list[Segment]:
        """An image between its special tokens: of encoded ``data``, or by default the sample's only one, whose latents may come from
        a cache. ``trained``: the token that begins it is a label. Raises BadSample."""
        if data is None and self.targets.is_cached:
            segment = self._cached_latents()
        else:
            data = self.fields.image() if data is None else data
            segment = self.targets.from_image(self.decoded(data))
        return [self.special("vae_start", trained=trained), segment, self.special("vae_end")]

    def parts(self, content: list[Part], *, trained: bool) -> Iterator[Segment]:
        """Segments of text and images. Of an image only the token that begins a target image can be trained."""
        for part in content:
            if isinstance(part, str):
                yield self.text(part, trained=trained)
            elif part.is_target:
                yield from self.target_image(part.data, trained=trained)
            else:
                yield from self.input_image(part.data)

    def _cached_latents(self) -> VaeSegment:
        data = self.fields.sample.members.get(CACHED_EXTENSION)
        if data is None:
            raise BadSample(
                "missing", "it has no latents: its image was bad when the cache was made"
            )
        try:
            return self.targets.from_cache(data)
        except ValueError as error:
            raise BadSample("image", str(error)) from error


def lay_out(sample: TaskSample) -> list[list[Segment]]:
    """The segments of each document of ``sample``; raises BadSample."""
    task, fields = sample.task, sample.fields
    if task.layout is not None:
        return _checked(task, task.layout(sample))
    schema = schema_of(task, fields)
    content = content_of(task, fields, schema)
    if content is None:
        return PLAIN_LAYOUTS[schema[-1]](sample)
    if content.messages is not None:
        return [_conversation(sample, content.messages)]
    return [_segments(sample, content.parts or [])]


def _checked(task: Task, documents: Any) -> list[list[Segment]]:
    """``documents``, which the layout of ``task`` has made, possibly in a module of the user.

    Raises:
        ValueError: they are no lists of segments, or hold a target image although the task has none.
        BadSample: nothing in one of them is trained.
    """
    where = f"task {task.name!r}: its layout"
    if not isinstance(documents, list) or not all(
        isinstance(segments, list) and all(isinstance(s, Segment) for s in segments)
        for segments in documents
    ):
        raise ValueError(
            f"{where} must return a list with a list of segments for each document, got {documents!r:.80}"
        )
    for segments in documents:
        targets = any(isinstance(segment, VaeSegment) for segment in segments)
        if targets and not task.has_targets:
            raise ValueError(f'{where} gives a target image; set target_images to "one" or "any"')
        texts = [s for s in segments if isinstance(s, TextSegment) and s.ids]
        if texts and not targets and not any(text.trained for text in texts):
            raise BadSample("empty", f"the layout of task {task.name!r} trains nothing of it")
    return documents


def _text(sample: TaskSample) -> list[list[Segment]]:
    """A text; one that is longer than ``max_tokens`` goes on in further documents, which begin with <bos> too."""
    tokenizer = sample.tokenizer
    opening = tokenizer.opening
    text = sample.fields.text("text")
    refuse_placeholders(text, sample.fields, "its text")
    ids = [*sample.encoded(text), tokenizer.special.eos]
    size = sample.max_tokens - len(opening) if sample.task.splits_text else len(ids)
    trained = "text" in sample.task.trained_fields
    return [
        [TextSegment(opening), TextSegment(ids[start : start + size], trained)]
        for start in range(0, len(ids), size)
    ]


def _caption(sample: TaskSample) -> list[list[Segment]]:
    """A caption as the user's turn, its image as the assistant's."""
    tokenizer, task = sample.tokenizer, sample.task
    user, assistant = tokenizer.turn("user"), tokenizer.turn("assistant")
    before = [*tokenizer.separator, *assistant.prefix]
    text = sample.fields.text("caption")
    refuse_placeholders(text, sample.fields, "its caption", has_target=task.has_targets)
    caption = [] if sample.drops_caption else sample.encoded(text)
    document: list[Segment] = [
        TextSegment([*tokenizer.opening, *drop_overlap(tokenizer.opening, user.prefix)]),
        TextSegment(caption, "caption" in task.trained_fields, shrinks=task.shortens_caption),
        TextSegment([*user.suffix, *drop_overlap(user.suffix, before)]),
        *sample.target_image(),
        TextSegment(assistant.suffix, trained=True),
    ]
    return [document]


def _segments(sample: TaskSample, parts: list[Part]) -> list[Segment]:
    """Text among images, without turns."""
    trained = "segments" in sample.task.trained_fields
    return [
        TextSegment(sample.tokenizer.opening),
        *sample.parts(parts, trained=trained),
        sample.special("eos", trained=trained),
    ]


def _conversation(sample: TaskSample, messages: list[Message]) -> list[Segment]:
    tokenizer, task = sample.tokenizer, sample.task
    last = tokenizer.opening
    segments: list[Segment] = [TextSegment(last)]
    for number, message in enumerate(messages):
        try:
            turn = tokenizer.turn(message.role)
        except ValueError as error:
            raise BadSample("conversation", str(error)) from error
        before = [*(tokenizer.separator if number else []), *turn.prefix]
        segments.append(TextSegment(drop_overlap(last, before)))
        images = [part for part in message.content if isinstance(part, ImagePart)]
        if not task.has_targets and any(image.is_target for image in images):
            able = [name for name in TASKS if TASKS[name].target_images == "any"]
            raise BadSample(
                "conversation",
                f"the {message.role} gives an image; that needs the task {' or '.join(able)}",
            )
        segments += sample.parts(message.content, trained=message.trained)
        segments.append(TextSegment(turn.suffix, message.trained))
        last = turn.suffix
    return segments


# Last field of a schema that ``schemas`` does not read -> its layout.
PLAIN_LAYOUTS: dict[str, Callable[[TaskSample], list[list[Segment]]]] = {
    "text": _text,
    "caption": _caption,
}


def decoded(data: bytes, max_pixels: int, truncated: str = "bad") -> Image.Image:
    """Upright RGB image of encoded ``data``. ``truncated``: the source's ``truncated_images``. Raises BadSample."""
    try:
        return decode_image(data, max_pixels, keep_truncated=truncated == "decode")
    except ImageSizeError as error:
        raise BadSample("image_size", f"its image has the wrong size ({error})") from error
    except DECODE_ERRORS as error:
        remedy = (
            '; where that may be, set truncated_images = "decode" for this source'
            if "truncated" in str(error)
            else ""
        )
        raise BadSample("image", f"its image cannot be decoded ({error}){remedy}") from error
