"""A sample's bytes -> documents made of segments. One function per task says what its documents look like.

    lm         <bos> text <eos>
    mmu        <bos> <user> <vit_start> [vit] <vit_end> question <assistant> ANSWER <eos>
    t2i(_long) <bos> <user> CAPTION <assistant> <vae_start> [vae] <vae_end> <eos>

Trained as next tokens: all of lm behind <bos>; ANSWER and its <eos>; CAPTION, <vae_start> and <eos>. The tokens of an image
are never anyone's next token: the label there is ignored.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from PIL import Image

from symbiotic_titan.config.data import Data, DataSource
from symbiotic_titan.data.images import (
    DECODE_ERRORS,
    IMAGE_EXTENSIONS,
    aspect_buckets,
    decode_image,
    nearest_bucket,
    resize_and_crop,
    vit_patches,
)
from symbiotic_titan.data.latents import PixelCodec
from symbiotic_titan.data.order import hash_fraction
from symbiotic_titan.data.readers import Sample
from symbiotic_titan.data.tokenizer import Tokenizer
from symbiotic_titan.sequence.geometry import ImageGeometry
from symbiotic_titan.sequence.modality import TASK_NAMES

# Tokens of a document with one image, besides the image and the text.
IMAGE_DOCUMENT_OVERHEAD = 6


class BadSample(Exception):
    """A sample that cannot be used. What happens then is the policy of the caller."""

    def __init__(self, sample: Sample, reason: str) -> None:
        super().__init__(f"{sample.shard}: sample {sample.key!r}: {reason}")
        self.reason = reason


@dataclass(frozen=True)
class TextSegment:
    """Token ids; ``trained``: each of them is the label of the token before it."""

    ids: list[int]
    trained: bool = False


@dataclass(frozen=True)
class VitSegment:
    """An image to be understood: (P, Q) patches covering ``rows`` x ``columns`` tokens."""

    patches: torch.Tensor
    rows: int
    columns: int


@dataclass(frozen=True)
class VaeSegment:
    """An image to be generated: (L, Z) clean latents, ``rows`` x ``columns`` tokens."""

    latents: torch.Tensor
    rows: int
    columns: int


Segment = TextSegment | VitSegment | VaeSegment


@dataclass(frozen=True)
class Document:
    """Segments that attend to each other; ``task`` indexes TASK_NAMES."""

    task: int
    segments: tuple[Segment, ...]

    @cached_property
    def num_vit_tokens(self) -> int:
        return sum(s.rows * s.columns for s in self.segments if isinstance(s, VitSegment))

    @cached_property
    def num_vae_tokens(self) -> int:
        return sum(s.rows * s.columns for s in self.segments if isinstance(s, VaeSegment))

    @cached_property
    def num_tokens(self) -> int:
        text = sum(len(s.ids) for s in self.segments if isinstance(s, TextSegment))
        return text + self.num_vit_tokens + self.num_vae_tokens


class DocumentMaker:
    """Turns samples into documents of at most ``seq_len`` tokens."""

    def __init__(
        self,
        config: Data,
        geometry: ImageGeometry,
        codec: PixelCodec,
        tokenizer: Tokenizer,
        seq_len: int,
    ) -> None:
        self._config = config
        self._geometry = geometry
        self._codec = codec
        self._tokenizer = tokenizer
        self._seq_len = seq_len
        self._buckets = aspect_buckets(
            config.vae_pixels, geometry.vae_token_pixels, config.max_aspect
        )

    def make(self, source: DataSource, sample: Sample, index: int) -> list[Document]:
        """Documents of ``sample``, which is number ``index`` of its source's endless sequence.

        Raises:
            BadSample: an image is damaged, a field is missing or of the wrong type, or the document is longer than a row.
        """
        make = {"lm": self._lm, "mmu": self._mmu, "t2i": self._t2i, "t2i_long": self._t2i}
        segment_lists = make[source.task](source, sample, index)
        documents = [Document(TASK_NAMES.index(source.task), tuple(s)) for s in segment_lists]
        for document in documents:
            if document.num_tokens > self._seq_len:
                raise BadSample(
                    sample,
                    f"it needs {document.num_tokens} tokens, a row holds {self._seq_len} "
                    "(training.seq_len)",
                )
        return documents

    def _lm(self, source: DataSource, sample: Sample, index: int) -> list[list[Segment]]:
        """Chunks of a row's length; every chunk starts with <bos>, the last one ends with <eos>."""
        special, size = self._tokenizer.special, self._seq_len - 1
        ids = [*self._tokenizer.encode(_text(sample, _fields(sample), "text")), special.eos]
        return [
            [TextSegment([special.bos]), TextSegment(ids[start : start + size], trained=True)]
            for start in range(0, len(ids), size)
        ]

    def _mmu(self, source: DataSource, sample: Sample, index: int) -> list[list[Segment]]:
        special, fields = self._tokenizer.special, _fields(sample)
        question = self._tokenizer.encode(_text(sample, fields, "question"))
        answer = self._tokenizer.encode(_text(sample, fields, "answer"))
        image = VitSegment(*vit_patches(_image(sample), self._config.vit_pixels, self._geometry))
        return [
            [
                TextSegment([special.bos, special.user, special.vit_start]),
                image,
                TextSegment([special.vit_end, *question, special.assistant]),
                TextSegment([*answer, special.eos], trained=True),
            ]
        ]

    def _t2i(self, source: DataSource, sample: Sample, index: int) -> list[list[Segment]]:
        special = self._tokenizer.special
        caption = self._tokenizer.encode(_text(sample, _fields(sample), "caption"))
        if self._drops_condition(source, index):
            caption = []
        return [
            [
                TextSegment([special.bos, special.user]),
                TextSegment(caption, trained=True),
                TextSegment([special.assistant]),
                TextSegment([special.vae_start], trained=True),
                self._latents(_image(sample)),
                TextSegment([special.vae_end]),
                TextSegment([special.eos], trained=True),
            ]
        ]

    def _drops_condition(self, source: DataSource, index: int) -> bool:
        """Another decision in every epoch, and the same one whenever this sample is read again."""
        fraction = hash_fraction(self._config.seed, source.name, "condition", index)
        return fraction < self._config.condition_dropout

    def _latents(self, image: Image.Image) -> VaeSegment:
        height, width = nearest_bucket(image.height, image.width, self._buckets)
        step = self._geometry.vae_token_pixels
        latents_LZ = self._codec.encode(resize_and_crop(image, height, width))
        return VaeSegment(latents_LZ, height // step, width // step)


def _image(sample: Sample) -> Image.Image:
    for extension in IMAGE_EXTENSIONS:
        if extension in sample.members:
            try:
                return decode_image(sample.members[extension])
            except DECODE_ERRORS as error:
                raise BadSample(sample, f"its .{extension} cannot be decoded ({error})") from error
    expected = ", ".join(f".{extension}" for extension in IMAGE_EXTENSIONS)
    raise BadSample(sample, f"it has no image (one of {expected})")


def _fields(sample: Sample) -> dict[str, Any]:
    """The JSON object of ``sample``; a plain .txt counts as its caption."""
    if "json" not in sample.members:
        if "txt" not in sample.members:
            raise BadSample(sample, "it has neither .json nor .txt")
        try:
            return {"caption": sample.members["txt"].decode("utf-8")}
        except UnicodeDecodeError as error:
            raise BadSample(sample, f"its .txt is not UTF-8 ({error})") from error
    try:
        value = json.loads(sample.members["json"])
    except (ValueError, RecursionError) as error:
        raise BadSample(sample, f"its JSON cannot be parsed ({error})") from error
    if not isinstance(value, dict):
        raise BadSample(sample, f"its JSON must be an object, got {type(value).__name__}")
    return value


def _text(sample: Sample, fields: dict[str, Any], key: str) -> str:
    if key not in fields:
        raise BadSample(sample, f"{key!r} is missing")
    value = fields[key]
    if not isinstance(value, str):
        raise BadSample(sample, f"{key!r} must be a string, got {value!r:.80}")
    if not value.strip():
        raise BadSample(sample, f"{key!r} is empty")
    return value
