"""A sample -> documents made of segments. One function per task says what its documents look like.

    lm           <bos> text <eos>
    mmu          <bos> <user> <vit_start> [vit] <vit_end> question <assistant> ANSWER <eos>
    t2i(_long)   <bos> <user> CAPTION <assistant> <vae_start> [vae] <vae_end> <eos>
    interleaved  <bos> TEXT <vit_start> [vit] <vit_end> TEXT <vae_start> [vae] <vae_end> <eos>, or turns of a conversation

All but t2i may also be conversations of several turns: what the assistant says, and what ends its turns, is trained as next
tokens, nothing else. <bos> stands for what begins a document (``opening``); <user>, <assistant> and the <eos> of a turn for what
the tokenizer puts around turns (``turn``, ``separator``). Otherwise trained are: all of lm behind <bos>; ANSWER and its <eos>;
CAPTION, <vae_start> and <eos>; TEXT, <vae_start> and <eos>. The tokens of an image are never anyone's next token: the label there
is ignored.
"""

from collections.abc import Iterator
from dataclasses import replace

from PIL import Image

from symbiotic_titan.config.data import Data, DataSource
from symbiotic_titan.data.conversations import Picture, Piece, Speech, segments_of, speeches_of
from symbiotic_titan.data.documents import (
    Document,
    Segment,
    TextSegment,
    VaeSegment,
    VitSegment,
    drop_overlap,
)
from symbiotic_titan.data.fields import (
    Fields,
    way_of,
)
from symbiotic_titan.data.formats.shard import (
    BadSample,
    Sample,
)
from symbiotic_titan.data.images import (
    DECODE_ERRORS,
    ImageSizeError,
    decode_image,
    vit_patches,
)
from symbiotic_titan.data.latents import CACHED_EXTENSION, GeneratedImages
from symbiotic_titan.data.order import hash_fraction
from symbiotic_titan.data.tokenizer import Tokenizer
from symbiotic_titan.sequence.geometry import ImageGeometry
from symbiotic_titan.sequence.modality import TASK_NAMES


def image_document_overhead(tokenizer: Tokenizer) -> int:
    """Tokens of a document with one image, besides the image and the text: opening, two turns, begin and end of the image."""
    user, assistant = tokenizer.turn("user"), tokenizer.turn("assistant")
    around_text = (tokenizer.opening, *user, tokenizer.separator, *assistant)
    return sum(len(ids) for ids in around_text) + 2


class DocumentMaker:
    """Turns samples into documents that fit a row of ``seq_len`` tokens, or the part of it that their task may take."""

    def __init__(
        self,
        config: Data,
        geometry: ImageGeometry,
        images: GeneratedImages,
        tokenizer: Tokenizer,
        seq_len: int,
    ) -> None:
        self._config = config
        self._geometry = geometry
        self._images = images
        self._tokenizer = tokenizer
        self._seq_len = seq_len
        self._room = [config.row_tokens_of(task, seq_len) for task in TASK_NAMES]
        self._max_vit_tokens = config.max_vit_tokens or seq_len
        self._max_vae_tokens = config.max_vae_tokens or seq_len

    def make(self, source: DataSource, sample: Sample, index: int) -> list[Document]:
        """Documents of ``sample``, which is number ``index`` of its source's endless sequence.

        Raises:
            BadSample: an image is damaged, a field is missing or of the wrong type, or the document is longer than a row.
        """
        task = TASK_NAMES.index(source.task)
        try:
            fields = Fields(sample, source.keys)
            documents = [Document(task, tuple(s)) for s in self._segments(source, fields, index)]
            cuts = source.too_long_of(self._config) == "truncate"
            return [self._fitted(document, cuts) for document in documents]
        except BadSample as error:
            raise error.at(sample.shard, sample.key) from error.__cause__

    def _segments(self, source: DataSource, fields: Fields, index: int) -> list[list[Segment]]:
        shape = way_of(source, fields)[-1]
        if shape == "text":
            return self._lm(fields)
        if shape == "answer":
            return [self._conversation(source, _question_and_answer(fields))]
        if shape == "caption":
            return [self._t2i(source, fields, index)]
        if shape == "segments":
            return [self._interleaved(fields)]
        speeches = speeches_of(fields, shape, has_images=source.task != "lm")
        return [self._conversation(source, speeches)]

    def _lm(self, fields: Fields) -> list[list[Segment]]:
        """Chunks as long as a row, or as its part for texts; every chunk starts with <bos>, the last one ends with <eos>."""
        opening = self._tokenizer.opening
        size = self._room[TASK_NAMES.index("lm")] - len(opening)
        ids = [*self._tokenizer.encode(fields.text("text")), self._tokenizer.special.eos]
        return [
            [TextSegment(opening), TextSegment(ids[start : start + size], trained=True)]
            for start in range(0, len(ids), size)
        ]

    def _t2i(self, source: DataSource, fields: Fields, index: int) -> list[Segment]:
        special, tokenizer = self._tokenizer.special, self._tokenizer
        user, assistant = tokenizer.turn("user"), tokenizer.turn("assistant")
        before = [*tokenizer.separator, *assistant.prefix]
        caption = tokenizer.encode(fields.text("caption"))
        if self._drops_condition(source, index):
            caption = []
        return [
            TextSegment([*tokenizer.opening, *drop_overlap(tokenizer.opening, user.prefix)]),
            TextSegment(caption, trained=True),
            TextSegment([*user.suffix, *drop_overlap(user.suffix, before)]),
            TextSegment([special.vae_start], trained=True),
            self._cached(fields) if self._images.is_cached else self._generated(fields.image()),
            TextSegment([special.vae_end]),
            TextSegment(assistant.suffix, trained=True),
        ]

    def _conversation(self, source: DataSource, speeches: list[Speech]) -> list[Segment]:
        last = self._tokenizer.opening
        segments: list[Segment] = [TextSegment(last)]
        for number, speech in enumerate(speeches):
            try:
                turn = self._tokenizer.turn(speech.role)
            except ValueError as error:
                raise BadSample("conversation", str(error)) from error
            before = [*(self._tokenizer.separator if number else []), *turn.prefix]
            segments.append(TextSegment(drop_overlap(last, before)))
            for piece in speech.pieces:
                if source.task == "mmu" and isinstance(piece, Picture) and piece.generated:
                    raise BadSample(
                        "conversation",
                        "the assistant gives an image; that needs the task interleaved",
                    )
                segments += self._piece(piece, speech.trained)
            segments.append(TextSegment(turn.suffix, speech.trained))
            last = turn.suffix
        return segments

    def _interleaved(self, fields: Fields) -> list[Segment]:
        special = self._tokenizer.special
        pieces = [s for piece in segments_of(fields) for s in self._piece(piece, trained=True)]
        return [
            TextSegment(self._tokenizer.opening),
            *pieces,
            TextSegment([special.eos], trained=True),
        ]

    def _piece(self, piece: Piece, trained: bool) -> Iterator[Segment]:
        """Text, or an image between its two marks; only the start of an image to be generated is ever trained."""
        special = self._tokenizer.special
        if isinstance(piece, str):
            yield TextSegment(self._tokenizer.encode(piece), trained)
        elif piece.generated:
            yield TextSegment([special.vae_start], trained)
            yield self._generated(piece.data)
            yield TextSegment([special.vae_end])
        else:
            yield TextSegment([special.vit_start])
            yield self._seen(piece.data)
            yield TextSegment([special.vit_end])

    def _drops_condition(self, source: DataSource, index: int) -> bool:
        """Another decision in every epoch, and the same one whenever this sample is read again."""
        fraction = hash_fraction(self._config.seed, source.name, "condition", index)
        return fraction < self._config.condition_dropout

    def _seen(self, data: bytes) -> VitSegment:
        config = self._config
        image = _decoded(data, config.max_image_pixels)
        try:
            return vit_patches(image, config.vit_pixels, self._geometry, config.vit_min_pixels)
        except ImageSizeError as error:
            raise BadSample("image_size", f"its image has the wrong size ({error})") from error

    def _generated(self, data: bytes) -> VaeSegment:
        tokens = self._images.from_image(_decoded(data, self._config.max_image_pixels))
        return VaeSegment(tokens.values, tokens.rows, tokens.columns)

    def _cached(self, fields: Fields) -> VaeSegment:
        data = fields.sample.members.get(CACHED_EXTENSION)
        if data is None:
            raise BadSample(
                "missing", "it has no latents: its image was bad when the cache was made"
            )
        try:
            tokens = self._images.from_cache(data)
        except ValueError as error:
            raise BadSample("image", str(error)) from error
        return VaeSegment(tokens.values, tokens.rows, tokens.columns)

    def _fitted(self, document: Document, cuts: bool) -> Document:
        """``document``, or with ``cuts`` as much of it as a row holds; raises BadSample when nothing to train is left."""
        if self._fits(document):
            return document
        room = self._room[document.task]
        if cuts:
            cut = _truncated(document, room)
            if self._fits(cut) and _has_lesson(cut):
                return cut
        raise BadSample(
            "too_long",
            f"it needs {document.num_tokens} tokens, a row holds {self._holds(document.task)}"
            if document.num_tokens > room
            else f"its images need {document.num_vit_tokens} ViT and {document.num_vae_tokens} latent tokens, a row holds "
            f"{self._max_vit_tokens} and {self._max_vae_tokens} (data.max_vit_tokens, data.max_vae_tokens)",
        )

    def _holds(self, task: int) -> str:
        room, name = self._room[task], TASK_NAMES[task]
        whole = room == self._seq_len
        return f"{room} " + ("(training.seq_len)" if whole else f"of {name} (data.max_row_share)")

    def _fits(self, document: Document) -> bool:
        return (
            document.num_tokens <= self._room[document.task]
            and document.num_vit_tokens <= self._max_vit_tokens
            and document.num_vae_tokens <= self._max_vae_tokens
        )


def _question_and_answer(fields: Fields) -> list[Speech]:
    """The images before the question, then the answer."""
    question, answer = fields.text("question"), fields.text("answer")
    pictures = [Picture(data, generated=False) for data in fields.some_images()]
    return [Speech("user", [*pictures, question]), Speech("assistant", [answer])]


def _truncated(document: Document, seq_len: int) -> Document:
    """``document`` without the end of its caption, or else without its own end. An image is kept whole or not at all."""
    if TASK_NAMES[document.task] in ("t2i", "t2i_long"):
        before, caption, *behind = document.segments
        assert isinstance(caption, TextSegment)
        length = max(0, len(caption.ids) - (document.num_tokens - seq_len))
        caption = replace(caption, ids=caption.ids[:length])
        return Document(document.task, (before, caption, *behind), truncated=True)
    kept: list[Segment] = []
    room = seq_len
    for segment in document.segments:
        if isinstance(segment, TextSegment):
            segment = replace(segment, ids=segment.ids[:room])
            room -= len(segment.ids)
        elif segment.rows * segment.columns > room:
            kept.pop()  # the mark of the image's start
            break
        else:
            room -= segment.rows * segment.columns
        kept.append(segment)
    return Document(document.task, tuple(kept), truncated=True)


def _has_lesson(document: Document) -> bool:
    """Whether anything in ``document`` is trained."""
    return any(
        isinstance(s, VaeSegment) or (isinstance(s, TextSegment) and s.trained and s.ids)
        for s in document.segments
    )


def image_of(source: DataSource, sample: Sample, max_pixels: int) -> Image.Image:
    """The one image of ``sample``, upright and RGB; raises BadSample."""
    try:
        return _decoded(Fields(sample, source.keys).image(), max_pixels)
    except BadSample as error:
        raise error.at(sample.shard, sample.key) from error.__cause__


def _decoded(data: bytes, max_pixels: int) -> Image.Image:
    try:
        return decode_image(data, max_pixels)
    except ImageSizeError as error:
        raise BadSample("image_size", f"its image has the wrong size ({error})") from error
    except DECODE_ERRORS as error:
        raise BadSample("image", f"its image cannot be decoded ({error})") from error
