"""What a config feeds the model: its packed rows as text and pictures, on one HTML page that needs nothing else.

Examples: symbiotic show-batch train_configs/debug.toml --out batch.html
          symbiotic show-batch train_configs/debug.toml --batches 50 --row 7 --out batch.html --data.packing fullest

Rows come in the order in which a single process reads them. The page shows the rows of the first batch, or --row N alone. Summary
and tables, there and on the terminal, count all of --batches: fill, tokens, sizes of images, what was cut off them. Per row: its
segments with task, modality, tokens and positions, text with the tokens that are trained in colour, images as the model gets
them, and who sees whom. An image whose latents come from an autoencoder is shown as its first three latent channels. Options
--section.key value are applied as in training.
"""

import argparse
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from symbiotic_titan.build import (
    build_dataloader,
    build_tokenizer,
)
from symbiotic_titan.config.files import check_file
from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.config.load import load_job_config
from symbiotic_titan.data.loader import PackedLoader
from symbiotic_titan.data.statistics import Table, tables_of
from symbiotic_titan.data.tokenizer import Tokenizer
from symbiotic_titan.model.flavors import model_args
from symbiotic_titan.model.masks import build_dense_mask
from symbiotic_titan.plots.html import png_of, templates
from symbiotic_titan.process import exit_status
from symbiotic_titan.sequence.batch import PackedBatch
from symbiotic_titan.sequence.geometry import (
    ImageGeometry,
    unpatchify,
)
from symbiotic_titan.sequence.modality import (
    IGNORE_INDEX,
    MODALITY_NAMES,
    PADDING,
    VIT,
)
from symbiotic_titan.sequence.tasks import task_names

# Colours of text, vit, vae and padding: in bars, beside the mask and where the mask is open.
COLOURS = ("#4c78a8", "#54a24b", "#e45756", "#cccccc")
MAX_MASK_PIXELS = 640  # longer rows: every k-th token
EDGE = 8  # pixels of the coloured strips beside the mask


@dataclass(frozen=True)
class Segment:
    """Tokens start .. end-1 of a row, of one document: a run of text, or one image (``span`` is its number, else -1)."""

    document: int
    task: str
    modality: int
    span: int
    start: int
    end: int


def segments_of(row: PackedBatch) -> list[Segment]:
    """Segments of a batch of one row, padding left out."""
    fields = (row.document, row.task, row.modality, row.span)
    keys = list(zip(*(values[0].tolist() for values in fields), strict=True))
    segments, end = [], 0
    for (document, task, modality, span), run in groupby(keys):
        start, end = end, end + len(list(run))
        if modality != PADDING:
            segments.append(Segment(document, task_names()[task], modality, span, start, end))
    return segments


def rows_of(batch: PackedBatch) -> Iterator[PackedBatch]:
    for row in range(len(batch.tokens)):
        tensors = {name: t[row : row + 1] for name, t in batch.tensors().items()}
        yield replace(batch, **tensors, modality_counts=None)


def is_trained(row: PackedBatch) -> list[bool]:
    """Whether each token is the label of the token before it."""
    return [False, *(row.labels[0, :-1] != IGNORE_INDEX).tolist()]


def num_wrong_labels(row: PackedBatch) -> int:
    """Labels that are not the next token of the same document: none, unless the data chain is broken."""
    labels, following = row.labels[0, :-1], row.tokens[0, 1:]
    same_document = row.document[0, 1:] == row.document[0, :-1]
    is_wrong = (labels != IGNORE_INDEX) & ~((labels == following) & same_document)
    return int(is_wrong.sum()) + int(row.labels[0, -1] != IGNORE_INDEX)


def positions_text(row: PackedBatch, segment: Segment) -> str:
    """``5..9``, or for an image on three axes ``5, 5..8, 5..9``."""
    here = row.positions[0, segment.start : segment.end]
    axes = [
        str(low) if low == high else f"{low}..{high}"
        for low, high in zip(here.amin(0).tolist(), here.amax(0).tolist(), strict=True)
    ]
    return axes[0] if len(set(axes)) == 1 else ", ".join(axes)


def visible(text: str) -> str:
    """``text`` with control characters, which HTML forbids, as their pictures."""
    return "".join(
        chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else "\u2421" if c == "\x7f" else c
        for c in text
    )


def text_runs(
    tokens: list[int], trained: list[bool], tokenizer: Tokenizer
) -> list[tuple[str, bool, bool]]:
    """(text, is special, is trained) of decoded text, in runs of one kind."""
    names = {token: name for name, token in tokenizer.special_ids.items()}
    runs = []
    pairs = zip(tokens, trained, strict=True)
    for (is_target, name), run in groupby(pairs, key=lambda pair: (pair[1], names.get(pair[0]))):
        ids = [token for token, _ in run]
        text = name * len(ids) if name else visible(tokenizer.decode(ids))
        runs.append((text, bool(name), is_target))
    return runs


@dataclass(frozen=True)
class Shown:
    """An image on the page. alt: what it is; zoom: how many pixels one of its own takes; note: below it."""

    picture: Image.Image
    alt: str
    zoom: int
    note: str

    @property
    def png(self) -> bytes:
        return png_of(self.picture)


def vit_picture(row: PackedBatch, span: int, geometry: ImageGeometry) -> tuple[Image.Image, str]:
    """(an input image, assembled from its patches by their coordinates; a note about what is shown)."""
    mine = row.vit_image[0] == span
    coords_P2, merge = row.vit_coords[0, mine], geometry.vit_merge
    rows, columns = (coords_P2.amax(0) + 1).tolist()
    patches_PQ = row.vit_patches[0, mine]
    in_order_PQ = torch.empty_like(patches_PQ)
    in_order_PQ[coords_P2[:, 0] * columns + coords_P2[:, 1]] = patches_PQ
    normalised_CHW = unpatchify(in_order_PQ, rows, columns, geometry.vit_patch)
    mean_C11, std_C11 = (
        torch.tensor(v)[:, None, None] for v in (geometry.vit_mean, geometry.vit_std)
    )
    picture = to_picture(normalised_CHW * std_C11 + mean_C11)
    if geometry.vit_queries:
        num_tokens = int((row.span[0] == span).sum())
        return picture, f"pixels, {columns} x {rows} patches, read by {num_tokens} queries"
    return (
        picture,
        f"pixels, {columns // merge} x {rows // merge} tokens of {merge} x {merge} patches",
    )


def vae_picture(row: PackedBatch, span: int, geometry: ImageGeometry) -> tuple[Image.Image, str]:
    """(a target image; a note about what is shown)."""
    mine = row.vae_image[0] == span
    tokens_LZ = row.latents[0, mine]
    rows, columns = (row.vae_coords[0, mine].amax(0) + 1).tolist()
    grid = f"{columns} x {rows} tokens"
    if tokens_LZ.dtype == torch.uint8:  # pixels, which the training device will encode
        cells_CHW = unpatchify(tokens_LZ, rows, columns, geometry.vae_token_pixels)
        return to_picture(cells_CHW / 255), f"pixels, {grid}"
    cells_CHW = unpatchify(tokens_LZ, rows, columns, geometry.latent_patch)
    if geometry.latent_stride == 1:
        return to_picture(cells_CHW * 0.5 + 0.5), f"pixels, {grid}"
    low, high = cells_CHW[:3].amin(), cells_CHW[:3].amax()
    picture = to_picture((cells_CHW[:3] - low) / (high - low).clamp_min(1e-6))
    return picture, f"latent cells, channels 1 to 3, {grid}"


def to_picture(values_CHW: torch.Tensor) -> Image.Image:
    """RGB image of (3, H, W) numbers in [0, 1]."""
    bytes_HWC = (values_CHW.clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    return Image.fromarray(bytes_HWC.contiguous().numpy(), "RGB")


def mask_picture(row: PackedBatch) -> Image.Image:
    """Query rows, key columns: the key's colour where the query attends to it, white elsewhere; the strips show the tokens' modality."""
    step = -(-row.tokens.shape[1] // MAX_MASK_PIXELS)
    sees_TT = build_dense_mask(row)[0, 0, ::step, ::step]
    palette = torch.tensor([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in COLOURS])
    colours_T3 = palette[row.modality[0, ::step]]
    length = len(colours_T3)
    cells = torch.where(sees_TT[:, :, None], colours_T3, 255)
    picture = torch.full((length + EDGE, length + EDGE, 3), 255)
    picture[EDGE:, EDGE:] = cells
    picture[: EDGE - 1, EDGE:] = colours_T3
    picture[EDGE:, : EDGE - 1] = colours_T3[:, None]
    return Image.fromarray(picture.byte().numpy(), "RGB")


def segment_view(
    row: PackedBatch, segment: Segment, tokenizer: Tokenizer, geometry: ImageGeometry
) -> dict[str, Any]:
    """A line of the table: its ``cells``, then ``runs`` of text or an ``image``."""
    here, modality = slice(segment.start, segment.end), MODALITY_NAMES[segment.modality]
    trained = is_trained(row)[here]
    cells = (
        segment.document,
        segment.task,
        modality,
        f"{segment.start}..{segment.end - 1}",
        segment.end - segment.start,
        positions_text(row, segment),
        sum(trained),
    )
    if segment.span < 0:  # text, or a token that begins or ends an image
        runs = text_runs(row.tokens[0, here].tolist(), trained, tokenizer)
        return {"cells": cells, "runs": runs, "image": None}
    draw = vit_picture if segment.modality == VIT else vae_picture
    picture, what = draw(row, segment.span, geometry)
    note = f"{picture.width} x {picture.height} {what}"
    image = Shown(picture, modality, max(1, 128 // max(picture.size)), note)
    return {"cells": cells, "runs": (), "image": image}


def boxes_of(row: PackedBatch, segments: list[Segment]) -> list[tuple[int, str, str]]:
    """(tokens, colour, title) of every segment, then of the padding."""
    boxes = [
        (
            s.end - s.start,
            COLOURS[s.modality],
            f"document {s.document}, {s.task}, {MODALITY_NAMES[s.modality]}",
        )
        for s in segments
    ]
    padding = int((row.modality == PADDING).sum())
    return [*boxes, *([(padding, COLOURS[PADDING], "padding")] if padding else [])]


def row_view(
    number: int, row: PackedBatch, tokenizer: Tokenizer, geometry: ImageGeometry
) -> dict[str, Any]:
    """What the template shows of a row."""
    segments = segments_of(row)
    note = "Who sees whom: queries down, keys across, in the key's colour."
    return {
        "number": number,
        "fill": f"{(row.modality != PADDING).float().mean():.1%}",
        "wrong": num_wrong_labels(row),
        "boxes": boxes_of(row, segments),
        "segments": [segment_view(row, segment, tokenizer, geometry) for segment in segments],
        "mask": Shown(mask_picture(row), "attention mask", 1, note),
    }


def page(
    heading: str,
    summary: list[str],
    tables: list[Table],
    rows: list[tuple[int, PackedBatch]],
    tokenizer: Tokenizer,
    geometry: ImageGeometry,
) -> str:
    return (
        templates("symbiotic_titan.commands")
        .get_template("batch.html")
        .render(
            heading=heading,
            summary=summary,
            tables=tables,
            legend=list(zip(COLOURS, (*MODALITY_NAMES, "padding"), strict=True)),
            rows=[row_view(number, row, tokenizer, geometry) for number, row in rows],
        )
    )


def summary_of(batches: list[PackedBatch]) -> list[str]:
    """Summary of all ``batches`` in lines of text."""
    rows = [row for batch in batches for row in rows_of(batch)]
    positions = sum(row.tokens.shape[1] for row in rows)
    by_modality = torch.stack([row.num_tokens() for row in rows]).sum(0).tolist()
    documents, tokens = Counter[str](), Counter[str]()
    for row in rows:
        segments = segments_of(row)
        documents.update(dict(sorted((s.document, s.task) for s in segments)).values())
        for s in segments:
            tokens[s.task] += s.end - s.start
    labels = sum(int(row.num_labels()) for row in rows)
    shares = ", ".join(
        f"{name} {count / positions:.1%}"
        for name, count in zip(MODALITY_NAMES, by_modality, strict=True)
    )
    total = sum(by_modality)
    return [
        f"{len(batches)} batches, {len(rows)} rows of {rows[0].tokens.shape[1]}: {total / positions:.1%} full ({shares})",
        *(
            f"{task}: {documents[task]} documents ({documents[task] / documents.total():.1%}), "
            f"{tokens[task]} tokens ({tokens[task] / total:.1%})"
            for task in task_names()
            if task in documents
        ),
        f"{labels} labels; {sum(map(num_wrong_labels, rows))} of them are not the next token",
    ]


def rows_to_show(batches: list[PackedBatch], number: int | None) -> list[tuple[int, PackedBatch]]:
    """(number, row) of the first batch, or of one row of all."""
    if number is None:
        return list(enumerate(rows_of(batches[0])))
    rows = [row for batch in batches for row in rows_of(batch)]
    if not 0 <= number < len(rows):
        raise ValueError(
            f"--row {number}: there are rows 0 to {len(rows) - 1}; read more with --batches"
        )
    return [(number, rows[number])]


def open_data(config: JobConfig) -> tuple[PackedLoader, Tokenizer, ImageGeometry]:
    """(the loader of single-process training without workers, the tokenizer and the image geometry of its rows)."""
    workers = config.training.dataloader
    workers.num_workers, workers.pin_memory = 0, False
    tokenizer = build_tokenizer(config)
    loader = build_dataloader(dp_world_size=1, dp_rank=0, tokenizer=tokenizer, job_config=config)
    args = model_args(config)
    return loader, tokenizer, args.geometry


def run(options: argparse.Namespace, overrides: list[str]) -> None:
    """Raises ValueError for a user's mistake."""
    check_file(options.out, "--out")
    config = load_job_config(["--job.config_file", options.config, *overrides])
    loader, tokenizer, geometry = open_data(config)
    batches = list(islice(loader, options.batches))
    shown = rows_to_show(batches, options.row)
    summary = summary_of(batches)
    tables = tables_of(loader, geometry, [row for b in batches for row in rows_of(b)])
    text = page(options.config, summary, tables, shown, tokenizer, geometry)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text, encoding="utf-8")
    lines = [line for table in tables for line in table.text()]
    print("\n".join([*summary, *lines, f"{options.out}: {len(shown)} rows"]))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("config", help="TOML file of a training config")
    parser.add_argument("--out", type=Path, required=True, help="HTML file to write")
    parser.add_argument("--row", type=int, help="show this row alone, counted from 0")
    parser.add_argument("--batches", type=int, default=1, help="batches to read (default 1)")
    options, overrides = parser.parse_known_args(arguments)
    if options.batches < 1:
        parser.error(f"--batches must be at least 1, got {options.batches}")
    return exit_status(lambda: run(options, overrides))
