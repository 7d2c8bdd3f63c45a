"""Writes the demo world: image tasks as tar shards in WebDataset layout, text as JSONL, held-out files apart.

Below the folder:

    manifest.json                                        seed, and samples per split and task
    {train,heldout}/{t2i,t2i_long,mmu}/<task>-0000.tar   <key>.png or <key>.jpg, and <key>.json
    {train,heldout}/lm/lm-0000.jsonl                     {"text": ..., "module": ...}

The JSON beside an image also says what it shows (``scene`` or ``digit``), for programs that check generated images.
"""

import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

from symbiotic_titan.data.order import hash_key
from symbiotic_titan.demo import (
    digits,
    scenes,
)
from symbiotic_titan.demo.digits import (
    Digit,
    handwritten_digits,
)
from symbiotic_titan.demo.docstrings import standard_library_texts
from symbiotic_titan.demo.held_out import LONG_CAPTIONS, QUESTIONS, SHORT_CAPTIONS, TEXTS

IMAGE_TASKS = (SHORT_CAPTIONS, LONG_CAPTIONS, QUESTIONS)
SPLITS = ("train", "heldout")
# Share of the images that are digits; the others are scenes.
DIGIT_SHARE = 1 / 3
# Digits are saved as JPEG and scenes as PNG, so that both decoders are used.
JPEG_QUALITY = 92

Advance = Callable[[int], None]


@dataclass(frozen=True)
class WorldSize:
    """Samples per image task and texts, in train and in the held-out files, and shards per source."""

    train_images: int
    heldout_images: int
    train_texts: int
    heldout_texts: int
    train_shards: int = 4
    heldout_shards: int = 1

    @property
    def num_samples(self) -> int:
        images = self.train_images + self.heldout_images
        return len(IMAGE_TASKS) * images + self.train_texts + self.heldout_texts


WORLD_SIZES = {
    "debug": WorldSize(600, 60, 800, 80),
    "full": WorldSize(2400, 200, 4000, 400, train_shards=8),
}


def write_world(out: Path, seed: int, size: WorldSize, advance: Advance = lambda n: None) -> None:
    """Write everything below ``out``; the bytes depend on ``seed``, ``size`` and the versions of Python and Pillow.

    ``advance`` is called with the number of samples written since its last call.
    """
    counts: dict[str, dict[str, int]] = {}
    for split in SPLITS:
        heldout = split == "heldout"
        num_shards = size.heldout_shards if heldout else size.train_shards
        pool = handwritten_digits(heldout)
        counts[split] = {}
        for task in IMAGE_TASKS:
            random = Random(hash_key("demo", seed, split, task))
            count = size.heldout_images if heldout else size.train_images
            samples = [_image_sample(task, random, pool, heldout) for _ in range(count)]
            _write_tars(out / split / task, task, samples, num_shards)
            counts[split][task] = count
            advance(count)
        num_texts = size.heldout_texts if heldout else size.train_texts
        texts = list(islice(standard_library_texts(seed, heldout), num_texts))
        if len(texts) < num_shards:
            raise ValueError("this Python has no source files of its standard library to read")
        _write_jsonl(out / split / TEXTS, texts, num_shards)
        counts[split][TEXTS] = len(texts)
        advance(len(texts))
    manifest = {"seed": seed, "samples": counts}
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


def _image_sample(
    task: str, random: Random, pool: list[Digit], heldout: bool
) -> tuple[str, bytes, dict[str, Any]]:
    """(image extension, image bytes, JSON): a digit or a scene."""
    if random.random() < DIGIT_SHARE:
        digit = random.choice(pool)
        fields = digits.say(task, digit, random) | {"digit": digit.description()}
        return "jpg", _encode(digits.paint(digit, random), "JPEG"), fields
    scene = scenes.draw_scene(random, heldout)
    fields = scenes.say(task, scene, random) | {"scene": scene.description()}
    return "png", _encode(scenes.paint(scene), "PNG"), fields


def _encode(image: Image.Image, form: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **({"quality": JPEG_QUALITY} if form == "JPEG" else {}))
    return buffer.getvalue()


def _write_tars(
    folder: Path, task: str, samples: list[tuple[str, bytes, dict[str, Any]]], num_shards: int
) -> None:
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


def _write_jsonl(folder: Path, rows: list[dict[str, str]], num_shards: int) -> None:
    folder.mkdir(parents=True)
    for shard in range(num_shards):
        lines = [_compact(row) + "\n" for row in rows[shard::num_shards]]
        (folder / f"lm-{shard:04d}.jsonl").write_text("".join(lines))


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
