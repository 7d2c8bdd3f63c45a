"""PackedBatch: every tensor that the model receives.

All sizes are static for a config, with padding in unused positions, so that nothing recompiles and a batch without images has the
same shapes. Shape letters: sequence/shapes.py; I, P and L are the maximum per sequence.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch.utils import _pytree as pytree

from symbiotic_titan.sequence.modality import IGNORE_INDEX, NUM_MODALITIES


@dataclass(frozen=True)
class PackedBatch:
    """B packed sequences. A sequence holds several documents, then padding.

    tokens     (B, T) int64     token ids; image positions hold the placeholder id of their modality.
    modality   (B, T) int64     TEXT, VIT, VAE or PADDING.
    document   (B, T) int64     index of the document within the sequence; -1 on padding.
    span       (B, T) int64     index of the image within the sequence; -1 on text and padding. Input (ViT) and target (VAE) images
                                share one numbering; all tokens of one image share one span.
    positions  (B, T, 3) int64  rotary positions (temporal, height, width), starting at 0 in every document. Text has three
                                equal values. See ``sequence.positions`` for the conventions for images.
    labels     (B, T) int64     id of the next token if it is trained, else IGNORE_INDEX. Already shifted.
    task       (B, T) int64     number of the task (``tasks.task_number``); NO_TASK on padding.

    vit_patches (B, P, Q) float32    flattened patches (channel, row, column), normalized for the ViT; an image's patches are
                                     adjacent. If a token is a square of patches, these are adjacent too (merge-window order), and
                                     P is a multiple of I.
    vit_coords  (B, P, 2) int64      (row, column) of each patch in its image's patch grid.
    vit_image   (B, P) int64         span of each patch's image; -1 if unused.
    vit_index   (B, I) int64         position in the sequence of each ViT token; T if unused. An image's tokens are adjacent.

    latents     (B, L, Z) float32    clean latent patches x_0, flattened (channel, row, column). From the loader to
                                     ``codecs.batch`` they may be uint8 pixels, which an autoencoder will encode.
    vae_coords  (B, L, 2) int64      (row, column) of each latent token in its image's token grid.
    vae_image   (B, L) int64         span of each latent token's image; -1 if unused.
    vae_index   (B, L) int64         position in the sequence of each latent token; T if unused.
    """

    tokens: torch.Tensor
    modality: torch.Tensor
    document: torch.Tensor
    span: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    task: torch.Tensor
    vit_patches: torch.Tensor
    vit_coords: torch.Tensor
    vit_image: torch.Tensor
    vit_index: torch.Tensor
    latents: torch.Tensor
    vae_coords: torch.Tensor
    vae_image: torch.Tensor
    vae_index: torch.Tensor

    def to(self, device: torch.device | str) -> "PackedBatch":
        """The same batch on ``device``; copies from pinned memory do not block the host."""
        return replace(
            self,
            **{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)},
        )

    def pin_memory(self) -> "PackedBatch":
        """Called by torch's DataLoader when ``pin_memory`` is on."""
        return replace(self, **{f.name: getattr(self, f.name).pin_memory() for f in fields(self)})

    def num_tokens(self) -> torch.Tensor:
        """(NUM_MODALITIES,) int64: positions of each modality in this batch."""
        # A comparison with arange, because bincount syncs with the device for the size of its result.
        one_hot = self.modality.flatten().unsqueeze(-1) == torch.arange(
            NUM_MODALITIES, device=self.modality.device
        )
        return one_hot.sum(0)

    def num_labels(self) -> torch.Tensor:
        """() int64: positions with a next-token loss."""
        return (self.labels != IGNORE_INDEX).sum()

    def num_latent_tokens(self) -> torch.Tensor:
        """() int64: positions with a flow loss."""
        return (self.vae_image >= 0).sum()


def stack_rows(rows: list[PackedBatch]) -> PackedBatch:
    """One batch from batches of the same static sizes, concatenated along B."""
    # Static sizes, so concatenating needs no further padding.
    return PackedBatch(
        **{f.name: torch.cat([getattr(r, f.name) for r in rows]) for f in fields(PackedBatch)}
    )


# FSDP and activation checkpointing find tensors through pytree, which must know the dataclass.
pytree.register_dataclass(PackedBatch)
