"""Packed batches for generation, one document per sequence, chunk by chunk: prompts, then the next token of each, or an image.

sequence 0   a b c .  | x | y      three chunks of a text: prompts, then one token of every sequence at a time.
sequence 1   a b c d  | x | .      Padding (.) keeps its columns; ended sequences get more of it.
sequence 0   a b c .  | g g g g    two chunks of an image: prompt, then all tokens of the image
sequence 1   a b c d  | g g g g
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from symbiotic_titan.data.documents import Document, VitSegment
from symbiotic_titan.data.packing import SequenceSize
from symbiotic_titan.data.sequence_builder import SequenceBuilder
from symbiotic_titan.sequence.batch import PackedBatch, stack_rows
from symbiotic_titan.sequence.geometry import ImageGeometry, coords
from symbiotic_titan.sequence.modality import (
    IGNORE_INDEX,
    NO_TASK,
    PADDING,
    TEXT,
    VAE,
    SpecialTokens,
)
from symbiotic_titan.sequence.positions import RotaryLayout, image_positions

# Fields whose dim 1 counts ViT patches, ViT tokens and latent tokens; of all others it counts columns.
_INDEX_FIELDS = ("vit_index", "vae_index")


@dataclass(frozen=True)
class Prompts:
    """Prompts, one in each sequence.

    batch       (B, T)        columns after a prompt are padding.
    lengths     (B,) int64    tokens of each prompt.
    positions   (B,) int64    rotary position of the token after it.
    num_images  (B,) int64    images in it.
    """

    batch: PackedBatch
    lengths: torch.Tensor
    positions: torch.Tensor
    num_images: torch.Tensor


class ChunkMaker:
    """Makes chunks, on ``device``."""

    def __init__(
        self,
        geometry: ImageGeometry,
        layout: RotaryLayout,
        special: SpecialTokens,
        device: torch.device,
    ) -> None:
        self._geometry = geometry
        self._layout = layout
        self._special = special
        self._device = device

    def prompts(self, documents: Sequence[Document]) -> Prompts:
        """The first chunk, as wide as the longest prompt, with room for as many image tokens as any prompt has."""
        size = SequenceSize(
            max(document.num_tokens for document in documents),
            max(document.num_vit_tokens for document in documents),
            0,
            num_vit_patches=max(document.num_vit_patches for document in documents),
        )
        builder = SequenceBuilder(size, self._geometry, self._layout, self._special)
        batch = stack_rows([builder.build([document]) for document in documents])
        last_BT = batch.positions.amax(-1).masked_fill(batch.document < 0, -1)
        num_images = [sum(isinstance(s, VitSegment) for s in d.segments) for d in documents]
        return Prompts(
            batch=batch.to(self._device),
            lengths=torch.tensor([d.num_tokens for d in documents], device=self._device),
            positions=(last_BT.amax(1) + 1).to(self._device),
            num_images=torch.tensor(num_images, device=self._device),
        )

    def tokens(
        self, tokens_B: torch.Tensor, positions_B: torch.Tensor, active_B: torch.Tensor
    ) -> PackedBatch:
        """One text token per sequence; a sequence that is not active gets padding."""
        row = self._empty(tokens_B.shape[0], 1)
        active_B1 = active_B.unsqueeze(1)
        return replace(
            row,
            tokens=torch.where(active_B1, tokens_B.unsqueeze(1), row.tokens),
            modality=torch.where(active_B1, TEXT, row.modality),
            document=torch.where(active_B1, 0, row.document),
            positions=positions_B[:, None, None].expand(-1, 1, 3),
        )

    def images(self, prompts: Prompts, rows: int, columns: int) -> PackedBatch:
        """An image of ``rows`` x ``columns`` tokens after each prompt; its latents are zero."""
        num_rows, length = prompts.lengths.shape[0], rows * columns
        offsets_LA, _ = image_positions(0, rows, columns, self._layout)
        span_BL = prompts.num_images.unsqueeze(1).expand(-1, length)
        row = self._empty(num_rows, length)
        return replace(
            row,
            tokens=torch.full_like(row.tokens, self._special.vae),
            modality=torch.full_like(row.modality, VAE),
            document=torch.zeros_like(row.document),
            span=span_BL,
            positions=prompts.positions[:, None, None] + offsets_LA.to(self._device),
            latents=torch.zeros(
                num_rows, length, self._geometry.vae_token_values, device=self._device
            ),
            vae_coords=coords(rows, columns).to(self._device).expand(num_rows, -1, -1),
            vae_image=span_BL,
            vae_index=torch.arange(length, device=self._device).expand(num_rows, -1),
        )

    def _empty(self, num_rows: int, length: int) -> PackedBatch:
        """Sequences of padding, without room for images."""
        geometry = self._geometry

        def full(fill: float, *shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.full((num_rows, *shape), fill, dtype=dtype, device=self._device)

        return PackedBatch(
            tokens=full(self._special.pad, length),
            modality=full(PADDING, length),
            document=full(-1, length),
            span=full(-1, length),
            positions=full(0, length, 3),
            labels=full(IGNORE_INDEX, length),
            task=full(NO_TASK, length),
            vit_patches=full(0, 0, geometry.vit_patch_values, dtype=torch.float32),
            vit_coords=full(0, 0, 2),
            vit_image=full(-1, 0),
            vit_index=full(0, 0),
            latents=full(0, 0, geometry.vae_token_values, dtype=torch.float32),
            vae_coords=full(0, 0, 2),
            vae_image=full(-1, 0),
            vae_index=full(0, 0),
        )


def joined(past: PackedBatch, chunk: PackedBatch) -> PackedBatch:
    """One batch with the columns of ``past``, then those of ``chunk``."""
    columns, end = past.tokens.shape[1], past.tokens.shape[1] + chunk.tokens.shape[1]
    after_chunk = chunk.tensors()
    parts = {name: (before, after_chunk[name]) for name, before in past.tensors().items()}
    for name in _INDEX_FIELDS:
        before, after = parts[name]  # an unused token's index is the number of columns
        parts[name] = (before.masked_fill(before == columns, end), after + columns)
    together = {name: torch.cat(pair, dim=1) for name, pair in parts.items()}
    return replace(past, **together, modality_counts=None)
