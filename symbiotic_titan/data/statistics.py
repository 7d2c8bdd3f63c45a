"""What packed sequences hold, in tables: packing efficiency, tokens by task and modality, and the sizes of their images."""

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from math import sqrt
from statistics import mean, median

import torch

from symbiotic_titan.config.data import DataSource
from symbiotic_titan.data.conversations import ImagePart
from symbiotic_titan.data.decoding import decode_image
from symbiotic_titan.data.documents import Document, TextSegment, VaeSegment, VitSegment
from symbiotic_titan.data.fields import Fields, schema_of
from symbiotic_titan.data.formats.shard import BadSample
from symbiotic_titan.data.loader import PackedLoader
from symbiotic_titan.data.samples import fields_of
from symbiotic_titan.data.schemas import content_of
from symbiotic_titan.data.streams import OpenSource
from symbiotic_titan.sequence.batch import PackedBatch
from symbiotic_titan.sequence.geometry import ImageGeometry
from symbiotic_titan.sequence.modality import IGNORE_INDEX, MODALITY_NAMES, PADDING
from symbiotic_titan.sequence.tasks import TASKS

MAX_SIZES = 20  # lines of a table of sizes; the rest is one more


@dataclass(frozen=True)
class Table:
    title: str
    heads: tuple[str, ...]
    lines: list[tuple[str, ...]]

    def text(self) -> list[str]:
        widths = [max(map(len, column)) for column in zip(self.heads, *self.lines, strict=True)]
        aligned = (
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
            for line in (self.heads, *self.lines)
        )
        return [self.title, *("  " + line for line in aligned)]


@dataclass(frozen=True)
class ImageUse:
    """An image's (height, width) before and after it was resized; ``original`` is None where only its latents are known."""

    is_target: bool
    original: tuple[int, int] | None
    fitted: tuple[int, int]

    @property
    def scale(self) -> float:
        """Sides after over sides before resizing, of the part that is kept."""
        assert self.original is not None
        ratios = [new / old for new, old in zip(self.fitted, self.original, strict=True)]
        return max(ratios) if self.is_target else sqrt(ratios[0] * ratios[1])

    @property
    def cut(self) -> float:
        """Share of the image that is cut away; input images are kept whole."""
        assert self.original is not None
        (height, width), (old_height, old_width) = self.fitted, self.original
        kept = height * width / (self.scale**2 * old_height * old_width)
        return 1.0 - kept if self.is_target else 0.0


def fill_table(rows: list[PackedBatch]) -> Table:
    fills = sorted((row.modality != PADDING).float().mean().item() for row in rows)
    values = (fills[0], median(fills), mean(fills), fills[-1])
    line = (str(len(rows)), *(f"{value:.1%}" for value in values))
    return Table("Packing efficiency", ("rows", "least", "median", "mean", "most"), [line])


def token_table(rows: list[PackedBatch]) -> Table:
    """Tokens of each modality by task, and how many of them are trained as next tokens."""
    heads = ("task", *MODALITY_NAMES, "all", "share", "trained")
    task, modality, labels = (
        torch.cat([getattr(row, name).flatten() for row in rows])
        for name in ("task", "modality", "labels")
    )
    used = int((modality != PADDING).sum())
    lines = []
    for name, mine in [(n, task == i) for i, n in enumerate(TASKS)] + [
        ("all", modality != PADDING)
    ]:
        counts = [int((mine & (modality == kind)).sum()) for kind in range(len(MODALITY_NAMES))]
        trained = int((mine & (labels != IGNORE_INDEX)).sum())
        if sum(counts):
            numbers = [f"{count:,d}" for count in (*counts, sum(counts))]
            lines.append((name, *numbers, f"{sum(counts) / used:.1%}", f"{trained:,d}"))
    return Table("Tokens", heads, lines)


def images_of(source: DataSource, fields: Fields) -> list[ImagePart]:
    """Encoded images of a sample, in the order in which its documents hold them."""
    task = TASKS[source.task]
    if not task.has_images:
        return []
    content = None if task.layout is not None else content_of(task, fields, schema_of(task, fields))
    if content is not None:
        return content.images
    return [ImagePart(data, not task.input_images) for data in fields.images()]


def image_uses(loader: PackedLoader, geometry: ImageGeometry) -> Iterator[ImageUse]:
    """Of all good samples that the streams of ``loader`` have read so far, which are read again."""
    spec = loader.spec
    streams = json.loads(loader.state_dict()["state"])["lanes"]
    for number, source in enumerate(spec.sources):
        opened = OpenSource(spec, number)
        for stream, state in streams.items():
            for count in range(state["read"][number]):
                index = count * spec.num_streams + int(stream)
                if opened.is_listed(index):
                    continue
                try:
                    sample = opened.sample(index)
                    documents = spec.maker.make(source, sample, index)
                except BadSample:
                    continue
                images = images_of(source, fields_of(source, sample, limits=spec.config.limits))
                yield from _uses_of(documents, images, geometry)


def _uses_of(
    documents: list[Document], images: list[ImagePart], geometry: ImageGeometry
) -> Iterator[ImageUse]:
    """Pairs of image and segment, in order. A document that was truncated lacks the last ones."""
    segments = [s for d in documents for s in d.segments if not isinstance(s, TextSegment)]
    for segment, image in zip_longest(segments, images[: len(segments)]):
        fitted = _pixels_of(segment, geometry)
        original = None
        if image is not None:
            width, height = decode_image(image.data, keep_truncated=True).size
            original = (height, width)
        yield ImageUse(isinstance(segment, VaeSegment), original, fitted)


def _pixels_of(segment: VitSegment | VaeSegment, geometry: ImageGeometry) -> tuple[int, int]:
    """(height, width) of the resized image, with the black edge that completes the patches where learned queries read it."""
    if isinstance(segment, VaeSegment):
        grid, step = (segment.rows, segment.columns), geometry.vae_token_pixels
    else:
        grid, step = segment.grid, geometry.vit_patch
    return grid[0] * step, grid[1] * step


def size_table(title: str, uses: list[ImageUse]) -> Table:
    """Sizes of resized images, the most frequent first."""
    by_size = defaultdict(list)
    for use in uses:
        by_size["{1} x {0}".format(*use.fitted)].append(use)
    groups = sorted(by_size.items(), key=lambda item: (-len(item[1]), item[0]))
    rest = [use for _, group in groups[MAX_SIZES:] for use in group]
    groups = [*groups[:MAX_SIZES], *([("others", rest)] if rest else []), ("all", uses)]
    heads = ("width x height", "images", "share", "cut away", "scale", "least", "most")
    lines = [
        (name, f"{len(group):,d}", f"{len(group) / len(uses):.1%}", *_cut_and_scale(group))
        for name, group in groups
    ]
    return Table(title, heads, lines)


def _cut_and_scale(uses: list[ImageUse]) -> tuple[str, ...]:
    """Mean of the share cut away; median, least and most of the scale; empty where only latents are known."""
    known = [use for use in uses if use.original]
    if not known:
        return ("",) * 4
    scales = [use.scale for use in known]
    numbers = (median(scales), min(scales), max(scales))
    return f"{mean(use.cut for use in known):.1%}", *(f"{number:.2f}" for number in numbers)


def tables_of(
    loader: PackedLoader, geometry: ImageGeometry, rows: list[PackedBatch]
) -> list[Table]:
    """Tables of ``rows``, the first that ``loader`` made, and of the images that it has read, some of them for later rows."""
    uses = list(image_uses(loader, geometry))
    tables = [fill_table(rows), token_table(rows)]
    for title, is_target in (("Target images", True), ("Input images", False)):
        chosen = [use for use in uses if use.is_target == is_target]
        if chosen:
            tables.append(size_table(title, chosen))
    return tables
