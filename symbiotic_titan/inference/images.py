"""Images from captions: one prefill of the captions, then the solver's steps on the image tokens. Images are saved as PNG files with
their settings, or shown as a grid with their captions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, log, sqrt
from pathlib import Path
from textwrap import wrap

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from symbiotic_titan.data.documents import Document
from symbiotic_titan.data.images import nearest_bucket
from symbiotic_titan.flow.noise import noise_of_image
from symbiotic_titan.flow.solver import SolverOptions, guided, solve
from symbiotic_titan.inference.chunks import ChunkMaker
from symbiotic_titan.inference.session import Session
from symbiotic_titan.sequence.geometry import ImageGeometry, unpatchify


@dataclass(frozen=True)
class Picture:
    """An RGB image and its settings: prompt, seed, index, sampler, steps, shift, guidance, checkpoint."""

    image: Image.Image
    settings: Mapping[str, object]

    def save(self, path: Path | str) -> None:
        """Write a PNG file whose text chunks are the settings; ``Image.open(path).text`` reads them."""
        notes = PngInfo()
        for name, value in self.settings.items():
            notes.add_text(name, str(value))
        self.image.save(path, "PNG", pnginfo=notes)


# Width of a letter and height of a line in Pillow's default font, in pixels, about.
LETTER, LINE = 6, 13
MOST_LINES = 6
# Widths in pixels. Narrower pictures are enlarged to make room for a caption, wider ones reduced because logs keep every grid.
NARROWEST, WIDEST = 192, 512
MARGIN = 8


def shown_size(width: int, height: int) -> tuple[int, int]:
    """(width, height) of a picture in a grid. Enlarged by a whole factor."""
    if width > WIDEST:
        return WIDEST, max(1, round(height * WIDEST / width))
    factor = ceil(NARROWEST / width)
    return width * factor, height * factor


def picture_grid(pictures: Sequence[Image.Image], captions: Sequence[str]) -> Image.Image:
    """A nearly square grid of ``pictures`` of one size, each above its caption. Long captions are cut.

    Enlarged pictures are not smoothed, to show the model's own pixels.
    """
    size = width, height = shown_size(*pictures[0].size)
    enlarged = width >= pictures[0].width
    filter_ = Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS
    texts = [wrap(c, width // LETTER, max_lines=MOST_LINES, placeholder=" ...") for c in captions]
    step_x = width + MARGIN
    step_y = height + LINE * max(len(lines) for lines in texts) + 2 * MARGIN
    columns = ceil(sqrt(len(pictures)))
    rows = ceil(len(pictures) / columns)
    grid = Image.new("RGB", (columns * step_x + MARGIN, rows * step_y + MARGIN), "white")
    pen, font = ImageDraw.Draw(grid), ImageFont.load_default()
    for i, (picture, lines) in enumerate(zip(pictures, texts, strict=True)):
        x, y = MARGIN + i % columns * step_x, MARGIN + i // columns * step_y
        grid.paste(picture.resize(size, filter_), (x, y))
        for number, line in enumerate(lines):
            place = (x, y + height + MARGIN // 2 + number * LINE)
            pen.text(place, line, fill="black", font=font)
    return grid


Size = tuple[int, int]


@dataclass(frozen=True)
class LatentGrid:
    """``rows`` x ``columns`` latent tokens."""

    rows: int
    columns: int

    @property
    def num_tokens(self) -> int:
        return self.rows * self.columns


def noise_of_images(
    seed: int, indices: Sequence[int], grid: LatentGrid, geometry: ImageGeometry
) -> torch.Tensor:
    """(B, L, Z) float32 on the CPU."""
    shape = (grid.num_tokens, geometry.vae_token_values)
    return torch.stack([noise_of_image(seed, index, *shape) for index in indices])


def generate_latents(
    session: Session,
    chunks: ChunkMaker,
    captions: Sequence[Document],
    no_caption: Document,
    grid: LatentGrid,
    noise_BLZ: torch.Tensor,
    sampling: SolverOptions,
    after_step: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """(B, L, Z) float32 latents of an image per caption.

    Classifier-free guidance adds the same images without a caption as further sequences of the same forward, unless it is 1.
    There is one forward for the prompts, then one or two per step, depending on the solver.
    """
    documents = list(captions)
    if sampling.is_guided:
        documents += [no_caption] * len(captions)
    prompts = chunks.prompts(documents)
    image = chunks.images(prompts, grid.rows, grid.columns)
    session.prefill(prompts.batch)

    def velocity(x_BLZ: torch.Tensor, t: float) -> torch.Tensor:
        if not sampling.is_guided:
            return session.denoise(replace(image, latents=x_BLZ), t).velocity
        both = session.denoise(replace(image, latents=torch.cat((x_BLZ, x_BLZ))), t).velocity
        conditional, unconditional = both.chunk(2)
        return guided(conditional, unconditional, sampling.guidance)

    return solve(velocity, noise_BLZ, sampling, after_step)


def unpatchified(
    latents_BLZ: torch.Tensor, grid: LatentGrid, geometry: ImageGeometry
) -> list[torch.Tensor]:
    """(C, H, W) latents of each image, as a codec decodes them."""
    return [
        unpatchify(tokens_LZ, grid.rows, grid.columns, geometry.latent_patch)
        for tokens_LZ in latents_BLZ
    ]


def choose_size(size: Size | None, aspect: str | None, buckets: list[Size]) -> Size:
    """(height, width) in pixels: ``size``, or the bucket nearest to ``aspect`` ("width:height"), or to a square.

    Raises:
        ValueError: no such bucket, or both are given.
    """
    if size is not None:
        if aspect is not None:
            raise ValueError(f"size {size} and aspect {aspect!r}: give one of them")
        if size not in buckets:
            raise ValueError(
                f"size {size[0]} x {size[1]}: no bucket of data.vae_pixels and data.max_aspect; choose a height x width of "
                f"{_names(buckets)}"
            )
        return size
    height, width = _parts(aspect or "1:1", buckets)
    return nearest_bucket(height, width, buckets)


def _parts(aspect: str, buckets: list[Size]) -> Size:
    """(height, width) of ``aspect``; ValueError if it is malformed or more extreme than all buckets."""
    width, _, height = aspect.partition(":")
    widest = max(abs(log(h / w)) for h, w in buckets) + 1e-9
    if width.isdecimal() and height.isdecimal() and int(width) * int(height) > 0:
        if abs(log(int(height) / int(width))) <= widest:
            return int(height), int(width)
    raise ValueError(
        f"aspect {aspect!r}: must be width:height, as 3:2, and lie within the buckets of data.vae_pixels and data.max_aspect, "
        f"which are height x width {_names(buckets)}"
    )


def _names(buckets: list[Size]) -> str:
    return ", ".join(f"{height} x {width}" for height, width in sorted(buckets))
