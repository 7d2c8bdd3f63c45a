"""Images drawn into files, as suites need them: each where its scorer looks for it, and none of them twice.

Pictures of the captions in a file, each drawn once: what fid and clip_score measure.

Letters: N images, H and W pixels.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from symbiotic_titan.config.files import replacing
from symbiotic_titan.evaluation.files import check_file, check_limit, read_prompts
from symbiotic_titan.evaluation.suite import Progress
from symbiotic_titan.flow.solver import SolverOptions
from symbiotic_titan.inference.generator import Generator
from symbiotic_titan.inference.images import Picture, Size
from symbiotic_titan.process import is_first_process

# The text chunk of a PNG that says how it was drawn, to tell whether it is the one wanted.
_NOTE = "evaluation"


@dataclass(frozen=True)
class DrawingSettings:
    """How images are drawn; what a suite's options inherit where it draws some.

    Raises:
        ValueError: a number out of range, or an unknown sampler.
    """

    steps: int = 50
    """Of the sampler"""

    guidance: float = 3.0
    """How far to go beyond what the caption changes; 1: no guidance"""

    sampler: str = "euler"
    """euler or heun, which reads every image twice a step"""

    seed: int = 0
    """Of the noise that images begin with"""

    batch_size: int = 8
    """Images, or texts, at a time"""

    def __post_init__(self) -> None:
        SolverOptions(self.steps, self.sampler, 1.0, self.guidance)
        if self.batch_size < 1:
            raise ValueError(f"batch_size: must be at least 1, got {self.batch_size}")

    def of_images(self) -> dict[str, Any]:
        """The arguments of ``Generator.images``; without what other options a suite has."""
        return {field.name: getattr(self, field.name) for field in fields(DrawingSettings)}


@dataclass(frozen=True)
class Wanted:
    """An image of ``prompt`` in the PNG file ``path``. ``size``: (height, width) of a bucket; None is a square."""

    prompt: str
    path: Path
    size: Size | None = None


def draw(
    generator: Generator, wanted: Sequence[Wanted], settings: DrawingSettings, progress: Progress
) -> list[Image.Image]:
    """An image for each of ``wanted``; those whose files are there already, drawn with these settings, are read instead.

    Files are written a batch at a time, so a run that was broken off goes on with the batch after its last. An image depends on
    its prompt, the settings and its place among the wanted of its size.

    Raises:
        ValueError: a setting out of range, a caption longer than a row, or a codec without its weights.
    """
    images: list[Image.Image | None] = [None] * len(wanted)
    missing: dict[Size | None, list[_Numbered]] = defaultdict(list)
    for item in _numbered(wanted):
        images[item.position] = _read(item, settings)
        if images[item.position] is None:
            missing[item.wanted.size].append(item)
    advance = progress("image steps", len(wanted) * settings.steps)
    advance(sum(image is not None for image in images) * settings.steps)
    for size, items in missing.items():
        for batch in _batches(items, settings.batch_size):
            pictures = generator.images(
                [item.wanted.prompt for item in batch],
                **settings.of_images(),
                size=size,
                first_index=batch[0].index,
                advance=advance,
            )
            for item, picture in zip(batch, pictures, strict=True):
                _write(item, settings, picture)
                images[item.position] = picture.image
    return [image for image in images if image is not None]


@dataclass(frozen=True)
class _Numbered:
    """``position`` among all wanted, ``index`` among those of its size."""

    wanted: Wanted
    position: int
    index: int

    def note(self, settings: DrawingSettings) -> str:
        how = settings.of_images()
        del how["batch_size"]  # changes nothing but rounding
        prompt, size = self.wanted.prompt, self.wanted.size
        return json.dumps({"prompt": prompt, "size": size, "index": self.index, **how})


def _numbered(wanted: Sequence[Wanted]) -> Iterator[_Numbered]:
    counts: dict[Size | None, int] = defaultdict(int)
    for position, item in enumerate(wanted):
        yield _Numbered(item, position, counts[item.size])
        counts[item.size] += 1


def _batches(items: list[_Numbered], batch_size: int) -> Iterator[list[_Numbered]]:
    """Items whose indices follow each other, at most ``batch_size`` together."""
    batch: list[_Numbered] = []
    for item in items:
        if batch and (len(batch) >= batch_size or item.index != batch[-1].index + 1):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def _read(item: _Numbered, settings: DrawingSettings) -> Image.Image | None:
    try:
        with Image.open(item.wanted.path) as image:
            is_same = image.info.get(_NOTE) == item.note(settings)
            return image.convert("RGB") if is_same else None
    except (FileNotFoundError, UnidentifiedImageError):
        return None


def _write(item: _Numbered, settings: DrawingSettings, picture: Picture) -> None:
    if not is_first_process():
        return
    noted = Picture(picture.image, {**picture.settings, _NOTE: item.note(settings)})
    with replacing(item.wanted.path, ".incomplete") as unfinished:
        noted.save(unfinished)


@dataclass(frozen=True)
class CaptionOptions(DrawingSettings):
    """What is drawn."""

    prompts: str = ""
    """Text file with a caption per line, each of which is drawn once"""

    limit: int | None = None
    """Captions to draw, counted from the first; without it all"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_file("prompts", self.prompts, "a text file with a caption per line")
        check_limit(self.limit)
        if len(read_prompts(self.prompts, self.limit)) < 2:
            raise ValueError("prompts: at least 2 are needed")


def draw_captions(
    generator: Generator, options: CaptionOptions, folder: Path, progress: Progress
) -> tuple[list[str], list[Image.Image]]:
    """The captions, and a picture of each in ``folder``/images/*.png."""
    prompts = read_prompts(options.prompts, options.limit)
    wanted = [
        Wanted(prompt, folder / "images" / f"{i:05d}.png") for i, prompt in enumerate(prompts)
    ]
    return prompts, draw(generator, wanted, options, progress)


def stacked(images: Sequence[Image.Image]) -> torch.Tensor:
    """uint8 (N, 3, H, W) of RGB images of one size."""
    return torch.from_numpy(np.stack([np.asarray(i) for i in images])).permute(0, 3, 1, 2)
