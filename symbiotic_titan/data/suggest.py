"""A row of [[data.sources]] for files whose form is not known: proposed by what they hold, and tried before it is shown.

path -> format, by content -> some samples -> tasks and keys that could fit -> the first row that makes documents
"""

import json
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import PurePosixPath
from typing import Any

import fsspec

from symbiotic_titan.config.data import FORMATS, Data, DataSource
from symbiotic_titan.config.files import InputLimits
from symbiotic_titan.config.generation import Latents
from symbiotic_titan.data.decoding import format_of
from symbiotic_titan.data.documents import Document, Segment, TextSegment, VaeSegment, VitSegment
from symbiotic_titan.data.fields import Fields, own_image
from symbiotic_titan.data.files import COMPRESSIONS, compression_of, open_file, source_files
from symbiotic_titan.data.formats.shard import BadSample, Reader, Sample, Shard
from symbiotic_titan.data.latents import TargetImages
from symbiotic_titan.data.samples import DocumentMaker
from symbiotic_titan.data.schemas import recognised
from symbiotic_titan.data.tokenizer import ByteTokenizer
from symbiotic_titan.sequence.geometry import ImageGeometry
from symbiotic_titan.sequence.tasks import (
    CONVERSATION_SCHEMAS,
    FIELDS,
    IMAGE_EXTENSIONS,
    TASKS,
    Task,
)

# Samples that are looked at, spread over the first file.
NUM_SAMPLES = 16
# Tokens of a packed sequence of the trial: every sample fits.
LONG = 2**24
# Characters of a text that a layout shows.
LONGEST_TEXT = 80
# Offset and text of the magic number of a tar file.
TAR_MAGIC = (257, b"ustar")
GEOMETRY = ImageGeometry(
    vit_patch=16, vit_merge=2, vit_channels=3, latent_channels=3, latent_stride=1, latent_patch=16
)

# Field -> names that data sets give it besides ours, the likeliest first.
OTHER_NAMES = {
    "caption": ("prompt", "description", "alt_text", "alt", "short_caption", "long_caption", "title", "text"),
    "question": ("query", "instruction", "prompt", "problem", "input"),
    "answer": ("response", "output", "completion", "solution", "label", "target"),
    "text": ("content", "body", "document", "article", "passage", "code", "story"),
}  # fmt: skip


@dataclass(frozen=True)
class Suggestion:
    """A row that works.

    source:  its values.
    looked:  samples of the first file that were looked at; ``good`` of them make documents.
    first:   documents of the first good sample.
    shape:   what ``schemas.recognised`` says of it.
    """

    source: DataSource
    files: int
    samples: int
    names: tuple[str, ...]
    looked: int
    good: int
    num_images: int
    num_targets: int
    mean_tokens: float
    first: list[Document]
    shape: str
    problem: str

    def toml(self) -> str:
        """The row, with comments that say what was seen."""
        source = self.source
        files = f"{self.files:,} file{'s' * (self.files != 1)}"
        lines = [
            f"# {files}; the first has {self.samples:,} samples, with {', '.join(self.names)}",
            f"# {self.good} of {self.looked} samples make documents, on average of {self.mean_tokens:.0f} tokens where each byte is one",
            *([f"# recognised: {self.shape}"] if self.shape else []),
            *([f"# bad, for example: {self.problem}"] if self.problem else []),
            *(["# compressed: set data.cache_folder"] if compression_of(source.path) else []),
            "# the first:",
            *(f"# {line}" for line in layout_lines(self.first)),
            "[[data.sources]]",
            f"name = {json.dumps(source.name)}",
            f"task = {json.dumps(source.task)}  # {_sentence(TASKS[source.task])}",
            f"format = {json.dumps(source.format)}",
            f"path = {json.dumps(source.path)}",
        ]
        if source.keys:
            pairs = ", ".join(
                f"{field} = {json.dumps(name)}" for field, name in source.keys.items()
            )
            lines.append(f"keys = {{{pairs}}}")
        lines.append("weight = 1.0  # its share of the mixture, relative to other sources")
        return "".join(f"{line}\n" for line in lines)


def suggest(path: str) -> Suggestion:
    """The row for ``path``: a file, a folder or a pattern.

    Raises:
        ValueError: the files are of no known format or have no known fields; says what was found and what is needed.
    """
    where = f"--suggest {path}"
    form, files = _format_of(path, where)
    source = DataSource(_name_of(path), "lm", form, path)
    with tempfile.TemporaryDirectory() as cache:
        samples, count = _samples(form, files[0], where, cache)
    found = {name for sample in samples for name in Fields(sample, {}).names}
    names = tuple(sorted(found - {"json"}))  # the object's own names stand for it
    tried = [_try(candidate, samples) for candidate in _candidates(source, samples)]
    good = [found for found in tried if found.good]
    if not good:
        needed = "; ".join(f"{task}: {_needed(task)}" for task in _tasks())
        problem = next((found.problem for found in tried if found.problem), "")
        reason = f" ({problem})" if problem else ""
        raise ValueError(
            f"{where}: {form} whose samples have {', '.join(names)} fits no task{reason}; samples need {needed}; other names are given "
            "by keys, other shapes need a program that rewrites them"
        )
    # A text whose images are passed over fits worse than a task that has them, and a task without images best where there are none.
    has_images = "image" in _kinds(samples).values()
    best = max(
        good,
        key=lambda found: (
            found.good,
            TASKS[found.source.task].has_images == (found.num_images > 0) == has_images,
            found.num_images > 0,
            found.num_targets > 0,
        ),
    )
    return replace(best, files=len(files), samples=count, names=names)


def _name_of(path: str) -> str:
    """A name for the source: that of the file or of its folder, whichever is no pattern."""
    for part in reversed(PurePosixPath(path).parts):
        name = re.sub(r"\W+", "_", part.partition(".")[0]).strip("_")
        if name and not re.search(r"[*?{\[]", part):
            return name
    return "mine"


def _tasks() -> list[str]:
    """Tasks in the order in which they are tried: those that ask most of a sample first. Of tasks that differ by name only, the first."""
    kinds: dict[Task, str] = {}
    for name in TASKS:
        kinds.setdefault(replace(TASKS[name], name="same"), name)
    names = list(kinds.values())
    return sorted(names, key=lambda name: (_demand(TASKS[name]), names.index(name)))


def _demand(task: Task) -> int:
    if task.is_cacheable:
        return 0
    return (2 if task.has_targets else 1) if task.has_images else 3


def _sentence(task: Task) -> str:
    """What its samples are."""
    return (
        "one target image from its caption",
        "texts about input images",
        "text among input and target images",
        "text without images",
    )[_demand(task)]


def _needed(task: str) -> str:
    return " or ".join(" + ".join(schema) for schema in TASKS[task].schemas)


def _format_of(path: str, where: str) -> tuple[str, list[str]]:
    """(format, files of ``path``), by content; of a folder, the files of the format that has the most."""
    matches: dict[str, list[str]] = {}
    problem = ""
    for form in FORMATS:
        try:
            matches[form] = source_files(DataSource("suggested", "lm", form, path), where)
        except ValueError as error:
            problem = str(error)
    if not matches:
        raise ValueError(problem)
    by_suffix = max(matches, key=lambda form: len(matches[form]))
    files = matches[by_suffix]
    compression = compression_of(files[0])
    with fsspec.open(files[0], "rb", compression=compression) as opened:
        try:
            head = opened.read(1024)
        except (OSError, EOFError, ValueError) as error:
            raise ValueError(
                f"{where}: {files[0]} cannot be read ({error}); copy or write it again"
            ) from error
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    start, magic = TAR_MAGIC
    if head.startswith(b"PAR1"):
        found = "parquet"
    elif head[start : start + len(magic)] == magic:
        found = "webdataset"
    elif text[:1] in (b"[", b"{"):
        found = "json" if text.startswith(b"[") else "jsonl"
    else:
        raise ValueError(
            f"{where}: {files[0]} begins with {head[:20]!r}; read are tar files, JSON lines, a JSON array of objects and Parquet, the "
            f"first three also compressed ({', '.join(COMPRESSIONS)}): write it as one of them"
        )
    return found, files


def _samples(form: str, path: str, where: str, cache: str) -> tuple[list[Sample], int]:
    """(up to NUM_SAMPLES readable samples, how many the file has)."""
    file, damage = open_file(path, cache, where, InputLimits())
    indexed = FORMATS[form]().index(file, lambda names: names)
    shards: list[Shard] = list(indexed.shards)
    count = sum(shard.num_samples for shard in shards)
    if not count:
        reason = damage or indexed.damage or "holds no samples"
        raise ValueError(f"{where}: {path} {reason}")
    reader, samples = Reader(shards), []
    problem = ""
    for number, shard in enumerate(shards[:NUM_SAMPLES]):
        wanted = max(1, NUM_SAMPLES // min(len(shards), NUM_SAMPLES))
        for i in range(0, shard.num_samples, max(1, shard.num_samples // wanted)):
            try:
                sample = reader.read(number, i)
                Fields(sample, {})
                samples.append(sample)
            except BadSample as error:
                problem = str(error)
    if not samples:
        raise ValueError(f"{where}: no sample can be read: {problem}")
    return samples[:NUM_SAMPLES], count


# ---- candidates ---------------------------------------------------------------------------------------------------------------


def _candidates(source: DataSource, samples: list[Sample]) -> Iterator[DataSource]:
    """Rows that might fit, the likeliest first: tasks by their own names of fields, then with ``keys``."""
    kinds = _kinds(samples)
    order = _tasks()
    for task in order:
        yield replace(source, task=task)
    for task in order:
        for schema in TASKS[task].schemas:
            keys = _keys_for(schema, kinds)
            if keys:
                yield replace(source, task=task, keys=keys)


def _kinds(samples: list[Sample]) -> dict[str, str]:
    """Name -> what its values are: image, text, messages or conversations; names in tables are joined by dots."""
    kinds: dict[str, str] = {}
    for sample in samples:
        members = dict(sample.members)
        if isinstance(members.get("json"), bytes):
            members.pop("json")
            inner = Fields(replace(sample, members={"json": sample.members["json"]}), {})
            members |= {name: inner.named(name) for name in inner.names - {"json"}}
        for name, value in _flattened(members):
            kind = _kind(value)
            if kind:
                kinds.setdefault(name, kind)
    return kinds


def _flattened(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        yield prefix + name, value
        if isinstance(value, dict) and _kind(value) != "image":
            yield from _flattened(value, f"{prefix}{name}.")


def _kind(value: Any) -> str:
    if isinstance(value, dict):
        return "image" if own_image(value) is not None else ""
    if isinstance(value, bytes):
        return "image" if format_of(value[:12]) else "text"
    if isinstance(value, str):
        return (
            "image" if value.lower().endswith(tuple(f".{e}" for e in IMAGE_EXTENSIONS)) else "text"
        )
    first = value[0] if isinstance(value, list) and value else None
    if isinstance(first, dict) and {"role", "content"} <= first.keys():
        return "messages"
    if isinstance(first, dict) and {"from", "value"} <= first.keys():
        return "conversations"
    return "image" if first is not None and _kind(first) == "image" else ""


def _keys_for(schema: tuple[str, ...], kinds: dict[str, str]) -> dict[str, str | list[str]]:
    """``keys`` that give the fields of ``schema`` names of the sample; empty where some field finds none, or none is needed."""
    keys: dict[str, str | list[str]] = {}
    fields = ("image", *schema) if schema in CONVERSATION_SCHEMAS else schema
    for field in fields:
        if any(name in kinds for name in FIELDS[field]):
            continue
        name = _name_for(field, kinds, set(map(str, keys.values())))
        if name is not None:
            keys[field] = name
        elif field in schema:
            return {}
    return keys


def _name_for(field: str, kinds: dict[str, str], taken: set[str]) -> str | None:
    wanted = field if field in ("image", "messages", "conversations") else "text"
    names = [name for name, kind in kinds.items() if kind == wanted and name not in taken]
    if wanted != "text":
        return names[0] if names else None
    likely = OTHER_NAMES.get(field, ())
    known = [name for name in names if name.rpartition(".")[2].lower() in likely]
    return min(known, key=lambda name: likely.index(name.rpartition(".")[2].lower()), default=None)


# ---- the trial ----------------------------------------------------------------------------------------------------------------


def _try(source: DataSource, samples: list[Sample]) -> Suggestion:
    """What becomes of ``samples`` as samples of ``source``."""
    config = Data(sources=[], condition_dropout=0.0)
    targets = TargetImages(config, Latents(), GEOMETRY, [source])
    maker = DocumentMaker(config, GEOMETRY, targets, ByteTokenizer(), LONG)
    made: list[list[Document]] = []
    shape = problem = ""
    for number, sample in enumerate(samples):
        try:
            documents = maker.make(source, sample, number)
            shape = shape or recognised(TASKS[source.task], sample, source.keys)
            made.append(documents)
        except BadSample as error:
            problem = problem or f"{error.args[0]:.200}"
    images = [
        segment
        for documents in made
        for document in documents
        for segment in document.segments
        if not isinstance(segment, TextSegment)
    ]
    tokens = [sum(d.num_tokens for d in documents) for documents in made]
    return Suggestion(
        source=source,
        files=0,
        samples=0,
        names=(),
        looked=len(samples),
        good=len(made),
        num_images=len(images),
        num_targets=sum(isinstance(image, VaeSegment) for image in images),
        mean_tokens=sum(tokens) / max(1, len(tokens)),
        first=made[0] if made else [],
        shape=shape,
        problem=" ".join(problem.split()),
    )


def layout_lines(documents: list[Document]) -> Iterator[str]:
    """One sample's segments, a line for each run of text and each image."""
    tokenizer = ByteTokenizer()
    names = {token: name for name, token in tokenizer.special_ids.items()}
    for document in documents:
        for trained, run in groupby(document.segments, key=_kind_of_segment):
            segments = list(run)
            if trained is None:
                for segment in segments:
                    yield _image_line(segment)
                continue
            ids = [i for s in segments if isinstance(s, TextSegment) for i in s.ids]
            parts = groupby(ids, key=lambda i: names.get(i))
            text = "".join(name or tokenizer.decode(list(part)) for name, part in parts)
            shown = text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}..."
            yield f"  {'trained' if trained else 'given  '}  {json.dumps(shown)}"


def _kind_of_segment(segment: Segment) -> bool | None:
    """Whether a text is trained; None for an image."""
    return segment.trained if isinstance(segment, TextSegment) else None


def _image_line(segment: Segment) -> str:
    assert not isinstance(segment, TextSegment)
    kind = "input image" if isinstance(segment, VitSegment) else "target image"
    return f"  {kind} of {segment.columns} x {segment.rows} tokens"
