"""Writes the demo world: image tasks as tar shards in WebDataset layout, text as JSONL, held-out files apart.

Below the folder:

    manifest.json                                        seed, and samples per split and task
    {train,heldout}/{t2i,t2i_long,mmu}/<task>-0000.tar   <key>.png or <key>.jpg, and <key>.json
    {train,heldout}/lm/lm-0000.jsonl                     {"text": ..., "module": ...} or {"text": ..., "facts": ...}
    pretrain/{reading,mmu,lm}                            the same, for a model that others start from; only in the size "study".
                                                         "reading" asks for plain words and numbers in the middle, to begin with;
                                                         in "mmu" some pictures are plain, some have a pattern as background
    tokenizer.json                                       whose tokens are the words of these files, held-out ones left out; only there

The JSON beside an image also says what it shows (``scene``, ``digit`` or ``writing``), for programs that check generated images, and
beside a question its ``kind``: "perception", "ocr" or "knowledge".
"""

import io
import json
import re
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

from symbiotic_titan.data.order import hash_key
from symbiotic_titan.demo import (
    digits,
    scenes,
    writing,
)
from symbiotic_titan.demo.digits import (
    Digit,
    handwritten_digits,
)
from symbiotic_titan.demo.docstrings import standard_library_texts
from symbiotic_titan.demo.facts import Fact, draw_question, fact_texts, facts_of
from symbiotic_titan.demo.held_out import LONG_CAPTIONS, QUESTIONS, SHORT_CAPTIONS, TEXTS
from symbiotic_titan.demo.patterns import draw_pattern, on_pattern
from symbiotic_titan.demo.questions import kind_and_asked
from symbiotic_titan.demo.scenes import Scene
from symbiotic_titan.demo.vocabulary import VOCABULARY, texts_of, vocabulary_of
from symbiotic_titan.demo.writing import Writing

IMAGE_TASKS = (SHORT_CAPTIONS, LONG_CAPTIONS, QUESTIONS)
SPLITS = ("train", "heldout")
PRETRAIN = "pretrain"
READING = "reading"
# Of pre-training: what its pictures show, in turn; what its questions ask for, few things, so that each is learned; and, of the pictures
# that are no digits, those that are plain, and those whose background is a pattern.
PRETRAIN_PICTURES = ("writing", "digit", "writing", "scene", "writing", "scene", "digit", "writing")
PRETRAIN_ASKED = frozenset({"digit", "colour", "shape", "word", "number"})
PLAIN_SHARE, PATTERN_SHARE = 0.7, 0.075
# What pictures show, in turn, and what questions are about: "fact" is either a word or a scene. Shapes and digits are most.
PICTURES = ("scene", "writing", "digit", "scene", "scene", "writing", "digit", "scene")
ASKED_ABOUT = ("scene", "digit", "writing", "fact", "scene") * 2 + ("scene",)
# As many questions of each kind; in captions more words, which have the most to learn.
STUDY_PICTURES = ("scene", "writing", "digit", "writing", "scene")
STUDY_ASKED_ABOUT = ("scene", "writing", "fact", "scene", "writing", "fact", "digit", "writing", "fact")  # fmt: skip
# One text in so many states facts.
FACTS_EVERY = 8
STUDY_FACTS_EVERY = 3
# Digits are saved as JPEG and the rest as PNG, so that both decoders are used.
JPEG_QUALITY = 92

Advance = Callable[[int], None]
Shown = Digit | Scene | Writing
# (image extension, image bytes, JSON)
Sample = tuple[str, bytes, dict[str, Any]]


@dataclass(frozen=True)
class WorldSize:
    """Samples per image task and texts, in train and in the held-out files, and shards per source."""

    train_images: int
    heldout_images: int
    train_texts: int
    heldout_texts: int
    train_shards: int = 4
    heldout_shards: int = 1
    questions: int | None = None
    """Training questions, where they are not as many as training images."""
    pretrain_readings: int = 0
    pretrain_images: int = 0
    pretrain_texts: int = 0
    pictures: tuple[str, ...] = PICTURES
    asked_about: tuple[str, ...] = ASKED_ABOUT
    facts_every: int = FACTS_EVERY
    vocabulary: int = 0
    """Ids of the tokenizer.json; 0: none is written."""

    @property
    def num_samples(self) -> int:
        return sum(sum(counts.values()) for counts in self.counts().values())

    def counts(self) -> dict[str, dict[str, int]]:
        """Samples of each split and task."""
        train = dict.fromkeys(IMAGE_TASKS, self.train_images) | {TEXTS: self.train_texts}
        if self.questions is not None:
            train[QUESTIONS] = self.questions
        heldout = dict.fromkeys(IMAGE_TASKS, self.heldout_images) | {TEXTS: self.heldout_texts}
        counts = {"train": train, "heldout": heldout}
        if self.pretrain_images:
            counts[PRETRAIN] = {
                READING: self.pretrain_readings,
                QUESTIONS: self.pretrain_images,
                TEXTS: self.pretrain_texts,
            }
        return counts


WORLD_SIZES = {
    "debug": WorldSize(600, 60, 800, 80),
    "full": WorldSize(2400, 200, 4000, 400, train_shards=8),
    "study": WorldSize(
        2400,
        600,
        1500,
        400,
        questions=300,
        pretrain_readings=6000,
        pretrain_images=16000,
        pretrain_texts=2400,
        pictures=STUDY_PICTURES,
        asked_about=STUDY_ASKED_ABOUT,
        facts_every=STUDY_FACTS_EVERY,
        vocabulary=1024,
    ),
}


class _World:
    """Draws the samples of one split."""

    def __init__(self, seed: int, split: str, size: WorldSize) -> None:
        """ValueError: scikit-learn is missing."""
        self._seed, self._split, self._size = seed, split, size
        self._heldout = split == "heldout"
        self._digits = handwritten_digits(self._heldout)
        self._facts = facts_of(seed)

    def samples(self, task: str, number: int) -> list[Sample]:
        random = Random(hash_key("demo", self._seed, self._split, task))
        turns = self._size.asked_about if task == QUESTIONS else self._size.pictures
        if self._split == PRETRAIN:
            turns = ("writing",) if task == READING else PRETRAIN_PICTURES
        contents = [turns[i % len(turns)] for i in range(number)]
        # Or every shard would hold its own mixture.
        random.shuffle(contents)
        return [self._sample(task, content, random) for content in contents]

    def _sample(self, task: str, content: str, random: Random) -> Sample:
        if content == "fact":
            fact, entity = draw_question(self._facts, random, self._heldout)
            return _encoded(entity, _ask_fact(fact), _paint(entity, random))
        if self._split == PRETRAIN:
            return self._before_training(task, content, random)
        shown = self._draw(content, random)
        fields = _say(task, shown, random)
        return _encoded(shown, fields, _paint(shown, random))

    def _draw(self, content: str, random: Random) -> Shown:
        if content == "digit":
            return random.choice(self._digits)
        if content == "writing":
            return writing.draw_writing(random, self._heldout)
        return scenes.draw_scene(random, self._heldout)

    def _before_training(self, task: str, content: str, random: Random) -> Sample:
        """A question about a digit, or about a picture that is plain, as all of ``READING``, or has a pattern as its background, or
        neither."""
        draw = 1.0 if content == "digit" else 0.0 if task == READING else random.random()
        shown: Shown
        if draw >= PLAIN_SHARE:
            shown = self._draw(content, random)
        elif content == "scene":
            shown = scenes.draw_plain(random, self._heldout)
        else:
            shown = writing.draw_plain(random, self._heldout, centred=task == READING)
        fields = _say(QUESTIONS, shown, random)
        while kind_and_asked(fields["question"])[1] not in PRETRAIN_ASKED:
            fields = _say(QUESTIONS, shown, random)
        if isinstance(shown, Digit) or not PLAIN_SHARE <= draw < PLAIN_SHARE + PATTERN_SHARE:
            return _encoded(shown, fields, _paint(shown, random))
        # Nothing of the background has a colour that is asked about.
        pattern = draw_pattern(random, {*shown.colours, *re.findall(r"\w+", fields["question"])})
        white, black = (_paint(replace(shown, background=b), random) for b in ("white", "black"))
        picture = on_pattern(white, black, pattern)
        return _encoded(replace(shown, background=pattern.name), fields, picture)

    def texts(self, number: int) -> list[dict[str, Any]]:
        """Texts of the standard library, and every so often one that states facts. Pre-training takes the library's first texts,
        training those that follow."""
        num_facts = number // self._size.facts_every
        library = standard_library_texts(self._seed, self._heldout)
        before = 0 if self._split != "train" else self._library_texts_of_pretraining()
        prose: list[dict[str, Any]] = list(islice(library, before, before + number - num_facts))
        if len(prose) < min(self._size.train_shards, number - num_facts):
            raise ValueError("this Python has no source files of its standard library to read")
        facts = fact_texts(self._facts, (self._seed, self._split), num_facts, self._heldout)
        return _spread(facts, prose)

    def _library_texts_of_pretraining(self) -> int:
        number = self._size.pretrain_texts
        return number - number // self._size.facts_every


def write_world(out: Path, seed: int, size: WorldSize, advance: Advance = lambda n: None) -> None:
    """Write everything below ``out``; the bytes depend on ``seed``, ``size`` and the versions of Python and Pillow.

    ``advance`` is called with the number of samples written since its last call.
    """
    counts = size.counts()
    said: list[str] = []
    for split, numbers in counts.items():
        world = _World(seed, split, size)
        num_shards = size.heldout_shards if split == "heldout" else size.train_shards
        for task, number in numbers.items():
            folder = out / split / task
            if task == TEXTS:
                texts = world.texts(number)
                _write_jsonl(folder, texts, num_shards)
                numbers[task] = len(texts)
                fields = texts
            else:
                samples = world.samples(task, number)
                _write_tars(folder, task, samples, num_shards)
                fields = [sample[-1] for sample in samples]
            if split != "heldout":
                said += [text for each in fields for text in texts_of(each)]
            advance(number)
    if size.vocabulary:
        (out / VOCABULARY).write_text(vocabulary_of(said, size.vocabulary))
    manifest = {"seed": seed, "samples": counts}
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


def _say(task: str, shown: Shown, random: Random) -> dict[str, Any]:
    if isinstance(shown, Digit):
        fields = digits.say(task, shown, random)
    elif isinstance(shown, Writing):
        fields = writing.say(task, shown, random)
    else:
        fields = scenes.say(task, shown, random)
    if task == QUESTIONS:
        fields["kind"], _ = kind_and_asked(fields["question"])
    return fields


def _ask_fact(fact: Fact) -> dict[str, Any]:
    fields = {"question": fact.question(), "answer": fact.value, "fact": fact.description()}
    return fields | {"kind": kind_and_asked(fact.question())[0]}


def _paint(shown: Shown, random: Random) -> Image.Image:
    if isinstance(shown, Digit):
        return digits.paint(shown, random)
    return writing.paint(shown) if isinstance(shown, Writing) else scenes.paint(shown)


def _encoded(shown: Shown, fields: dict[str, Any], picture: Image.Image) -> Sample:
    name = type(shown).__name__.lower()
    extension, form = ("jpg", "JPEG") if isinstance(shown, Digit) else ("png", "PNG")
    return extension, _encode(picture, form), fields | {name: shown.description()}


def _spread(few: Sequence[Any], many: Sequence[Any]) -> list[Any]:
    """All of both, ``few`` at even distances."""
    placed = [((i + 0.5) / len(few), 1, item) for i, item in enumerate(few)]
    placed += [((i + 0.5) / len(many), 0, item) for i, item in enumerate(many)]
    return [item for *_, item in sorted(placed, key=lambda entry: entry[:2])]


def _encode(image: Image.Image, form: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **({"quality": JPEG_QUALITY} if form == "JPEG" else {}))
    return buffer.getvalue()


def _write_tars(folder: Path, task: str, samples: list[Sample], num_shards: int) -> None:
    folder.mkdir(parents=True)
    for shard in range(num_shards):
        with tarfile.open(
            folder / f"{task}-{shard:04d}.tar", "w", format=tarfile.USTAR_FORMAT
        ) as tar:
            for number in range(shard, len(samples), num_shards):
                extension, image, fields = samples[number]
                _add(tar, f"{number:06d}.{extension}", image)
                _add(tar, f"{number:06d}.json", _compact(fields).encode())


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """A member without owner and time, so that equal content makes equal bytes."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _write_jsonl(folder: Path, rows: list[dict[str, Any]], num_shards: int) -> None:
    folder.mkdir(parents=True)
    for shard in range(num_shards):
        lines = [_compact(row) + "\n" for row in rows[shard::num_shards]]
        (folder / f"lm-{shard:04d}.jsonl").write_text("".join(lines))


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
