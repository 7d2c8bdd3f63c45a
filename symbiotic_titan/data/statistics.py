"""What rows hold, in tables: fill, tokens by task and modality, and what became of the images that went into them."""

import html
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from math import sqrt
from statistics import mean, median

import torch

from symbiotic_titan.config.data import DataSource
from symbiotic_titan.data.conversations import Picture, segments_of, speeches_of
from symbiotic_titan.data.documents import (
    Document,
    TextSegment,
    VaeSegment,
    VitSegment,
)
from symbiotic_titan.data.fields import (
    Fields,
    way_of,
)
from symbiotic_titan.data.formats.shard import BadSample
from symbiotic_titan.data.images import decode_image
from symbiotic_titan.data.loader import PackedLoader
from symbiotic_titan.data.order import SourceOrder
from symbiotic_titan.data.readers import Reader
from symbiotic_titan.sequence.batch import PackedBatch
from symbiotic_titan.sequence.geometry import ImageGeometry
from symbiotic_titan.sequence.modality import IGNORE_INDEX, MODALITY_NAMES, PADDING, TASK_NAMES

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

    def html(self) -> str:
        def row(tag: str, cells: tuple[str, ...]) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

        lines = [row("td", line) for line in self.lines]
        head = f"<h3>{html.escape(self.title)}</h3><table>{row('th', self.heads)}"
        return "\n".join([head, *lines, "</table>"])


@dataclass(frozen=True)
class ImageUse:
    """An image and the (height, width) it got; ``original`` is None where only its latents are there."""

    generated: bool
    original: tuple[int, int] | None
    fitted: tuple[int, int]

    @property
    def scale(self) -> float:
        """Sides behind over sides before, of the part that is kept."""
        assert self.original is not None
        ratios = [new / old for new, old in zip(self.fitted, self.original, strict=True)]
        return max(ratios) if self.generated else sqrt(ratios[0] * ratios[1])

    @property
    def cut(self) -> float:
        """Share of the image that is cut away; images to be understood are kept whole."""
        assert self.original is not None
        (height, width), (old_height, old_width) = self.fitted, self.original
        kept = height * width / (self.scale**2 * old_height * old_width)
        return 1.0 - kept if self.generated else 0.0


def fill_table(rows: list[PackedBatch]) -> Table:
    fills = sorted((row.modality != PADDING).float().mean().item() for row in rows)
    values = (fills[0], median(fills), mean(fills), fills[-1])
    line = (str(len(rows)), *(f"{value:.1%}" for value in values))
    return Table("Fill of the rows", ("rows", "least", "median", "mean", "most"), [line])


def token_table(rows: list[PackedBatch]) -> Table:
    """Tokens of each modality by task, and how many of them are trained as next tokens."""
    heads = ("task", *MODALITY_NAMES, "all", "share", "trained")
    task, modality, labels = (
        torch.cat([getattr(row, name).flatten() for row in rows])
        for name in ("task", "modality", "labels")
    )
    used = int((modality != PADDING).sum())
    lines = []
    for name, mine in [(n, task == i) for i, n in enumerate(TASK_NAMES)] + [
        ("all", modality != PADDING)
    ]:
        counts = [int((mine & (modality == kind)).sum()) for kind in range(len(MODALITY_NAMES))]
        trained = int((mine & (labels != IGNORE_INDEX)).sum())
        if sum(counts):
            numbers = [f"{count:,d}" for count in (*counts, sum(counts))]
            lines.append((name, *numbers, f"{sum(counts) / used:.1%}", f"{trained:,d}"))
    return Table("Tokens", heads, lines)


def pictures_of(source: DataSource, fields: Fields) -> list[Picture]:
    """Encoded images of a sample, in the order in which its documents hold them."""
    shape = way_of(source, fields)[-1]
    if source.task == "lm":
        return []
    if shape == "caption":
        return [Picture(data, generated=True) for data in fields.images()]
    if shape == "answer":
        return [Picture(data, generated=False) for data in fields.images()]
    if shape == "segments":
        pieces = segments_of(fields)
    else:
        speeches = speeches_of(fields, shape, has_images=True)
        pieces = [piece for speech in speeches for piece in speech.pieces]
    return [piece for piece in pieces if isinstance(piece, Picture)]


def image_uses(loader: PackedLoader, geometry: ImageGeometry) -> Iterator[ImageUse]:
    """Of all good samples that the streams of ``loader`` have read so far, which are read again."""
    spec = loader.spec
    streams = json.loads(loader.state_dict()["state"])["lanes"]
    for number, source in enumerate(spec.sources):
        reader = Reader(spec.shards[number])
        sizes = [shard.num_samples for shard in spec.shards[number]]
        order = SourceOrder(spec.config.seed, source.name, sizes)
        for stream, state in streams.items():
            for count in range(state["read"][number]):
                index = count * spec.num_streams + int(stream)
                try:
                    sample = reader.read(*order.locate(index))
                    documents = spec.maker.make(source, sample, index)
                except BadSample:
                    continue
                pictures = pictures_of(source, Fields(sample, source.keys))
                yield from _uses_of(documents, pictures, geometry)


def _uses_of(
    documents: list[Document], pictures: list[Picture], geometry: ImageGeometry
) -> Iterator[ImageUse]:
    """Pairs of picture and segment, in order. A document that was truncated lacks the last ones."""
    segments = [s for d in documents for s in d.segments if not isinstance(s, TextSegment)]
    for segment, picture in zip_longest(segments, pictures[: len(segments)]):
        generated = isinstance(segment, VaeSegment)
        fitted = _pixels_of(segment, geometry)
        original = None
        if picture is not None:
            width, height = decode_image(picture.data).size
            original = (height, width)
        yield ImageUse(generated, original, fitted)


def _pixels_of(segment: VitSegment | VaeSegment, geometry: ImageGeometry) -> tuple[int, int]:
    """(height, width) of the image as it was cut up, with the black edge that makes whole patches of one that queries read."""
    if isinstance(segment, VaeSegment):
        grid, step = (segment.rows, segment.columns), geometry.vae_token_pixels
    else:
        grid, step = segment.grid, geometry.vit_patch
    return grid[0] * step, grid[1] * step


def size_table(title: str, uses: list[ImageUse]) -> Table:
    """Sizes by how many images have them."""
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
    """Mean of the first; median, least and most of the second; empty where only latents are known."""
    known = [use for use in uses if use.original]
    if not known:
        return ("",) * 4
    scales = [use.scale for use in known]
    numbers = (median(scales), min(scales), max(scales))
    return f"{mean(use.cut for use in known):.1%}", *(f"{number:.2f}" for number in numbers)


def tables_of(
    loader: PackedLoader, geometry: ImageGeometry, rows: list[PackedBatch]
) -> list[Table]:
    """Tables of ``rows``, the first that ``loader`` made, and of the images it read for them, some of which wait still."""
    uses = list(image_uses(loader, geometry))
    tables = [fill_table(rows), token_table(rows)]
    for title, generated in (("Images to be generated", True), ("Images to be understood", False)):
        chosen = [use for use in uses if use.generated == generated]
        if chosen:
            tables.append(size_table(title, chosen))
    return tables
