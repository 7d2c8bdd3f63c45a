"""Generates the images of suites into the files where their scorers look for them, and reuses existing ones: fid, clip_score and hpsv2
score the same images where they are given the same captions and settings.
"""

import json
import shutil
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
from symbiotic_titan.evaluation.kept import other_results
from symbiotic_titan.evaluation.suite import Progress
from symbiotic_titan.flow.solver import SolverOptions
from symbiotic_titan.inference.generator import Generator
from symbiotic_titan.inference.images import Picture, Size
from symbiotic_titan.process import is_first_process

# The text chunk of a PNG that says how the image was generated, to tell whether it can be reused.
_NOTE = "evaluation"


@dataclass(frozen=True)
class ImageSettings:
    """How images are generated; options of suites that generate images inherit it.

    Raises:
        ValueError: a number out of range, or an unknown sampler.
    """

    steps: int = 50
    """Steps of the solver"""

    guidance: float = 3.0
    """How far to go beyond what the caption changes; 1: no guidance"""

    sampler: str = "euler"
    """euler or heun, which runs the model twice a step"""

    seed: int = 0
    """Seed of the noise that images begin with"""

    batch_size: int = 8
    """Images, or texts, at a time"""

    def __post_init__(self) -> None:
        SolverOptions(self.steps, self.sampler, 1.0, self.guidance)
        if self.batch_size < 1:
            raise ValueError(f"batch_size: must be at least 1, got {self.batch_size}")

    def of_images(self) -> dict[str, Any]:
        """The arguments of ``Generator.images``; without the suite's other options."""
        return {field.name: getattr(self, field.name) for field in fields(ImageSettings)}


@dataclass(frozen=True)
class ImageRequest:
    """An image of ``prompt`` in the PNG file ``path``. ``size``: (height, width) of a bucket; None is a square."""

    prompt: str
    path: Path
    size: Size | None = None


def generate_images(
    generator: Generator,
    requests: Sequence[ImageRequest],
    settings: ImageSettings,
    progress: Progress,
    folder: Path | None = None,
) -> list[Image.Image]:
    """An image for each of ``requests``. Files that were generated with these settings before are read instead: those in ``folder``, which
    is the suite's own, and those of the same name that this checkpoint has for other options or another suite.

    Files are written a batch at a time, so an interrupted run continues after its last batch. An image depends on its prompt,
    the settings and its position among the requests of its size.

    Raises:
        ValueError: a setting out of range, a caption longer than a row, or a codec without its weights.
    """
    images: list[Image.Image | None] = [None] * len(requests)
    missing: dict[Size | None, list[_NumberedRequest]] = defaultdict(list)
    for item in _numbered(requests):
        images[item.position] = _existing(item, settings, folder)
        if images[item.position] is None:
            missing[item.request.size].append(item)
    advance = progress("image steps", len(requests) * settings.steps)
    advance(sum(image is not None for image in images) * settings.steps)
    for size, items in missing.items():
        for batch in _batches(items, settings.batch_size):
            pictures = generator.images(
                [item.request.prompt for item in batch],
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
class _NumberedRequest:
    """``position`` counts all requests, ``index`` those of one size."""

    request: ImageRequest
    position: int
    index: int

    def note(self, settings: ImageSettings) -> str:
        how = settings.of_images()
        del how["batch_size"]  # changes only rounding
        prompt, size = self.request.prompt, self.request.size
        return json.dumps({"prompt": prompt, "size": size, "index": self.index, **how})


def _numbered(requests: Sequence[ImageRequest]) -> Iterator[_NumberedRequest]:
    counts: dict[Size | None, int] = defaultdict(int)
    for position, item in enumerate(requests):
        yield _NumberedRequest(item, position, counts[item.size])
        counts[item.size] += 1


def _batches(items: list[_NumberedRequest], batch_size: int) -> Iterator[list[_NumberedRequest]]:
    """Batches of at most ``batch_size`` items with consecutive indices."""
    batch: list[_NumberedRequest] = []
    for item in items:
        if batch and (len(batch) >= batch_size or item.index != batch[-1].index + 1):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def _existing(
    item: _NumberedRequest, settings: ImageSettings, folder: Path | None
) -> Image.Image | None:
    """The image in its own file, or as it was generated for other options or another suite, whose file is then copied."""
    path = item.request.path
    if (image := _read(path, item, settings)) is not None or folder is None:
        return image
    for other in other_results(folder):
        source = other / path.relative_to(folder)
        if (image := _read(source, item, settings)) is not None:
            if is_first_process():
                with replacing(path, ".incomplete") as unfinished:
                    shutil.copyfile(source, unfinished)
            return image
    return None


def _read(path: Path, item: _NumberedRequest, settings: ImageSettings) -> Image.Image | None:
    try:
        with Image.open(path) as image:
            is_same = image.info.get(_NOTE) == item.note(settings)
            return image.convert("RGB") if is_same else None
    except (FileNotFoundError, UnidentifiedImageError):
        return None


def _write(item: _NumberedRequest, settings: ImageSettings, picture: Picture) -> None:
    if not is_first_process():
        return
    noted = Picture(picture.image, {**picture.settings, _NOTE: item.note(settings)})
    with replacing(item.request.path, ".incomplete") as unfinished:
        noted.save(unfinished)


@dataclass(frozen=True)
class CaptionOptions(ImageSettings):
    """The captions, besides the settings."""

    prompts: str = ""
    """Text file with a caption per line, or .json file with a list of them, each for one image"""

    limit: int | None = None
    """Captions to use, counted from the first; all by default"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_file("prompts", self.prompts, "a text file with a caption per line")
        check_limit(self.limit)
        if len(self.captions()) < 2:
            raise ValueError("prompts: at least 2 are needed")

    def captions(self) -> list[str]:
        return read_prompts(self.prompts, self.limit)


def generate_captioned(
    generator: Generator,
    captions: Sequence[str],
    settings: ImageSettings,
    folder: Path,
    progress: Progress,
) -> list[Image.Image]:
    """A picture of each of ``captions``, in ``folder``/images/*.png."""
    requests = [
        ImageRequest(caption, folder / "images" / f"{number:05d}.png")
        for number, caption in enumerate(captions)
    ]
    return generate_images(generator, requests, settings, progress, folder)


def stacked(images: Sequence[Image.Image]) -> torch.Tensor:
    """uint8 (N, 3, H, W) of RGB images of one size."""
    return torch.from_numpy(np.stack([np.asarray(i) for i in images])).permute(0, 3, 1, 2)
