"""Held-out samples in the form that scorers take, read by the code that reads training data."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from PIL import Image

from symbiotic_titan.config.data import DataSource
from symbiotic_titan.data.decoding import decode_image
from symbiotic_titan.data.fields import Fields
from symbiotic_titan.data.readers import Reader, index_source
from symbiotic_titan.data.samples import fields_of

Split = Literal["train", "heldout"]
# Tasks of the demo world, which are also the names of its folders.
TEXTS = "lm"
QUESTIONS = "mmu"
SHORT_CAPTIONS = "t2i"
LONG_CAPTIONS = "t2i_long"


@dataclass(frozen=True)
class PictureSample:
    """A caption, and the real image that it was written for."""

    caption: str
    image: Image.Image


@dataclass(frozen=True)
class QuestionSample:
    """A question about ``image``, and its only right answer. ``kind`` is one of ``questions.KINDS``, or empty where the file does
    not say it."""

    question: str
    answer: str
    image: Image.Image
    kind: str = ""


def demo_source(folder: Path, split: Split, task: str) -> DataSource:
    """The files of one split and task of the demo world in ``folder``."""
    stem, name = f"{folder}/{split}/{task}/{task}-*", f"{split}/{task}"
    if task == TEXTS:
        return DataSource(name, task, "jsonl", f"{stem}.jsonl")
    return DataSource(name, task, "webdataset", f"{stem}.tar")


def read_pictures(source: DataSource, limit: int | None = None) -> list[PictureSample]:
    """Captions with their images, in the order of the files; at most ``limit``.

    Raises:
        ValueError: no file matches.
        BadSample: one lacks a caption or an image, or cannot be decoded.
    """
    return [
        PictureSample(fields.text("caption"), decode_image(fields.image()))
        for fields in _samples(source, limit)
    ]


def read_questions(source: DataSource, limit: int | None = None) -> list[QuestionSample]:
    """Questions with their images and answers; otherwise as ``read_pictures``."""
    return [
        QuestionSample(
            fields.text("question"),
            fields.text("answer"),
            decode_image(fields.image()),
            fields.named("kind") or "",
        )
        for fields in _samples(source, limit)
    ]


def read_texts(source: DataSource, limit: int | None = None) -> list[str]:
    """Texts but those that state facts of the demo world; otherwise as ``read_pictures``."""
    samples = (f for f in _samples(source, None) if f.named("facts") is None)
    return [fields.text("text") for fields in islice(samples, limit)]


def _samples(source: DataSource, limit: int | None) -> Iterator[Fields]:
    shards = index_source(source, f"source {source.name!r}")
    reader = Reader(shards)
    places = [(i, k) for i, shard in enumerate(shards) for k in range(shard.num_samples)]
    for shard, sample in places[:limit]:
        yield fields_of(source, reader.read(shard, sample))
