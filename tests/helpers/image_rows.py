"""Documents with images to be understood, as our network and as models of transformers take them in."""

from dataclasses import replace

import torch
from torch import Tensor

from symbiotic_titan.model.args import ModelArgs
from symbiotic_titan.sequence.batch import PackedBatch
from symbiotic_titan.sequence.geometry import unpatchify
from symbiotic_titan.sequence.modality import VIT
from symbiotic_titan.sequence.positions import image_positions, text_positions
from tests.helpers.decoder_parity import text_row

# So many tokens of text, or (rows, columns) of an image in tokens; in patches where queries read it.
Segment = int | tuple[int, int]


def patch_places(rows: int, columns: int, merge: int) -> Tensor:
    """(P, A): row and column of each patch of an image of so many tokens, token by token."""
    token_V1A = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).unsqueeze(1)
    inside_1MA = torch.cartesian_prod(torch.arange(merge), torch.arange(merge)).unsqueeze(0)
    return (merge * token_V1A + inside_1MA).flatten(0, 1)


def image_row(
    args: ModelArgs,
    document: list[Segment],
    placeholder: int,
    generator: torch.Generator,
    opening: int | None = None,
) -> PackedBatch:
    """One row with one document. Its text keeps clear of the last ids of the vocabulary, which are special. ``opening``: the token
    before every image, for models that find images by it."""
    tokens, positions, spans, coords, images, start = [], [], [], [], [], 0
    for number, segment in enumerate(document):
        if isinstance(segment, int):
            size, span = segment, -1
            tokens.append(torch.randint(args.vocab_size - 16, (size,), generator=generator))
            place, start = text_positions(start, size)
        else:
            tokens_of = args.geometry.vit_grid(*(args.vit.merge * n for n in segment))
            size, span = tokens_of[0] * tokens_of[1], number
            tokens.append(torch.full((size,), placeholder))
            coords.append(patch_places(*segment, args.vit.merge))
            images.append(torch.full((len(coords[-1]),), number))
            place, start = image_positions(start, *tokens_of, args.rotary_layout)
        positions.append(place)
        spans.append(torch.full((size,), span))
    if opening is not None:
        for number, segment in enumerate(document[1:]):
            if not isinstance(segment, int):
                tokens[number][-1] = opening
    row = text_row(args, torch.cat(tokens).unsqueeze(0))
    span_T, coords_PA = torch.cat(spans), torch.cat(coords)
    is_image_T = is_vit_T = span_T >= 0
    if args.vit.own_delimiters:
        is_vit_T = is_image_T | is_image_T.roll(1) | is_image_T.roll(-1)
    values = args.geometry.vit_patch_values
    return replace(
        row,
        positions=torch.cat(positions).unsqueeze(0),
        span=span_T.unsqueeze(0),
        modality=row.modality.masked_fill(is_vit_T, VIT),
        vit_patches=torch.randn(1, len(coords_PA), values, generator=generator),
        vit_coords=coords_PA.unsqueeze(0),
        vit_image=torch.cat(images).unsqueeze(0),
        vit_index=is_image_T.nonzero().T,
    )


def released_inputs(
    args: ModelArgs, document: list[Segment], row: PackedBatch
) -> dict[str, Tensor]:
    """What a model of transformers that takes flattened patches is called with."""
    vit = args.vit
    one_PCQ = row.vit_patches[0].unflatten(-1, (vit.channels, 1, -1))
    grids = [[1, vit.merge * s[0], vit.merge * s[1]] for s in document if not isinstance(s, int)]
    routing = {"moe_mm_token_type_ids": (row.modality == VIT).int()} if vit.own_delimiters else {}
    return {
        **routing,
        "input_ids": row.tokens,
        "mm_token_type_ids": (row.span >= 0).int(),
        "pixel_values": one_PCQ.expand(-1, -1, vit.temporal_patch, -1).flatten(1),
        "image_grid_thw": torch.tensor(grids),
    }


def released_marked(
    args: ModelArgs, document: list[Segment], row: PackedBatch
) -> dict[str, Tensor]:
    """Likewise, for a model that finds images by the token before them, within what the attention mask shows."""
    inputs = released_inputs(args, document, row)
    del inputs["mm_token_type_ids"]
    return inputs | {"attention_mask": torch.ones_like(row.tokens)}


def released_squares(
    args: ModelArgs, document: list[Segment], row: PackedBatch
) -> dict[str, Tensor]:
    """What a model of transformers is called with that takes every image in the upper left of a square whose rest is masked."""
    grids = [segment for segment in document if not isinstance(segment, int)]
    patch, side = args.vit.patch, max(max(grid) for grid in grids)
    length = side * patch
    images_NCSS = torch.zeros(len(grids), args.vit.channels, length, length)
    mask_NSS = torch.zeros(len(grids), length, length, dtype=torch.bool)
    parts = row.vit_patches[0].split([rows * columns for rows, columns in grids])
    for number, ((rows, columns), part_PQ) in enumerate(zip(grids, parts, strict=True)):
        height, width = rows * patch, columns * patch
        images_NCSS[number, :, :height, :width] = unpatchify(part_PQ, rows, columns, patch)
        mask_NSS[number, :height, :width] = True
    return {"input_ids": row.tokens, "pixel_values": images_NCSS, "pixel_mask": mask_NSS}
