"""PackedBatch: every tensor that the model receives.

All sizes are static for a config, with padding in unused positions, so that nothing recompiles and a batch without images has the
same shapes. Shape letters: sequence/shapes.py; I, P and L are the maximum per sequence.
"""

from collections.abc import Callable
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

    modality_counts                  positions of each modality that this process computes, for the host; None unless ``counted``.
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
    modality_counts: tuple[int, ...] | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor by its field's name."""
        return {name: getattr(self, name) for name in TENSOR_FIELDS}

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "PackedBatch":
        """``function`` of each tensor."""
        changed = {name: function(tensor) for name, tensor in self.tensors().items()}
        return replace(self, **changed, modality_counts=self.modality_counts)

    def to(self, device: torch.device | str) -> "PackedBatch":
        """The same batch on ``device``; copies from pinned memory do not block the host."""
        return self.counted(device).map(lambda tensor: tensor.to(device, non_blocking=True))

    def counted(self, device: torch.device | str) -> "PackedBatch":
        """This batch, about to be copied to ``device``: with ``modality_counts`` if it leaves the host."""
        # How many rows each expert group gets follows from them in every MoE layer; later the host would have to wait for them.
        is_known = self.modality_counts is not None
        if is_known or self.modality.device.type != "cpu" or torch.device(device).type == "cpu":
            return self
        return replace(self, modality_counts=tuple(self.num_tokens().tolist()))

    def pin_memory(self) -> "PackedBatch":
        """Called by torch's DataLoader when ``pin_memory`` is on."""
        return self.map(torch.Tensor.pin_memory)

    def as_one_sequence(self) -> tuple["PackedBatch", torch.Tensor]:
        """(one sequence of length B * T with the documents of all sequences, and with only those image tokens that are used; the
        (L',) latent tokens that it kept, of 0 to B * L - 1).

        Where no image is used, one of its unused tokens is kept. The sizes depend on the data, and the host reads them.
        """
        rows, length = self.tokens.shape
        start_B1 = length * torch.arange(rows, device=self.tokens.device).unsqueeze(1)
        num_patches, num_vit_tokens = self.vit_image.shape[1], self.vit_index.shape[1]
        patch = _used(self.vit_image >= 0, at_least=num_patches // max(num_vit_tokens, 1))
        vit_token, latent = _used(self.vit_index < length), _used(self.vae_image >= 0)

        def joined(values: torch.Tensor, kept: torch.Tensor | slice = slice(None)) -> torch.Tensor:
            return values.flatten(0, 1)[kept].unsqueeze(0)

        def renumbered(
            numbers: torch.Tensor, kept: torch.Tensor | slice = slice(None)
        ) -> torch.Tensor:
            # A sequence has fewer documents, and fewer images, than tokens.
            return joined(torch.where(numbers >= 0, numbers + start_B1, numbers), kept)

        def moved(index: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
            return joined(torch.where(index < length, index + start_B1, rows * length), kept)

        one = PackedBatch(
            tokens=joined(self.tokens),
            modality=joined(self.modality),
            document=renumbered(self.document),
            span=renumbered(self.span),
            positions=joined(self.positions),
            labels=joined(self.labels),
            task=joined(self.task),
            vit_patches=joined(self.vit_patches, patch),
            vit_coords=joined(self.vit_coords, patch),
            vit_image=renumbered(self.vit_image, patch),
            vit_index=moved(self.vit_index, vit_token),
            latents=joined(self.latents, latent),
            vae_coords=joined(self.vae_coords, latent),
            vae_image=renumbered(self.vae_image, latent),
            vae_index=moved(self.vae_index, latent),
        )
        return one, latent

    def columns(self, columns_T: torch.Tensor) -> "PackedBatch":
        """The same sequences with these of their tokens only, in this order; image tokens of other columns count as unused.

        Patches and latents keep their sizes, so the result has static sizes too. Documents and spans keep their numbers.
        ``modality_counts`` stay, so they are to be those of these columns.
        """
        length, num_columns = self.tokens.shape[1], columns_T.shape[0]
        device = self.tokens.device
        # Where each old column is now. Those left out, and the index of unused tokens, get the new index of unused tokens.
        place_T = torch.full((length + 1,), num_columns, device=device)
        place_T = place_T.index_copy(0, columns_T, torch.arange(num_columns, device=device))
        by_column = ("tokens", "modality", "document", "span", "positions", "labels", "task")
        vae_index = place_T[self.vae_index]
        return replace(
            self,
            **{name: getattr(self, name).index_select(1, columns_T) for name in by_column},
            vit_index=place_T[self.vit_index],
            vae_index=vae_index,
            vae_image=self.vae_image.masked_fill(vae_index == num_columns, -1),
        )

    def num_tokens(self) -> torch.Tensor:
        """(NUM_MODALITIES,) int64: positions of each modality in this batch."""
        # A comparison with arange, because bincount syncs with the device for the size of its result.
        one_hot = self.modality.flatten().unsqueeze(-1) == torch.arange(
            NUM_MODALITIES, device=self.modality.device
        )
        return one_hot.sum(0)

    def modality_set(self) -> int:
        """The modalities of this batch, which is on the host: bit m is set if modality m has a token."""
        return sum(1 << m for m, number in enumerate(self.num_tokens().tolist()) if number)

    def num_labels(self) -> torch.Tensor:
        """() int64: positions with a next-token loss."""
        return (self.labels != IGNORE_INDEX).sum()

    def num_latent_tokens(self) -> torch.Tensor:
        """() int64: positions with a flow loss."""
        return (self.vae_image >= 0).sum()


TENSOR_FIELDS = tuple(f.name for f in fields(PackedBatch) if f.type is torch.Tensor)


def _used(is_used: torch.Tensor, at_least: int = 1) -> torch.Tensor:
    """Indices of the tokens that are used; of the first ``at_least`` where none is."""
    used = is_used.flatten().nonzero().squeeze(1)
    return used if used.numel() else torch.arange(min(at_least, is_used.numel()))


def stack_rows(rows: list[PackedBatch]) -> PackedBatch:
    """One batch from batches of the same static sizes, concatenated along B."""
    # Static sizes, so concatenating needs no further padding.
    return PackedBatch(
        **{name: torch.cat([getattr(r, name) for r in rows]) for name in TENSOR_FIELDS},
        modality_counts=None,
    )


# FSDP and activation checkpointing find tensors through pytree, which must know the dataclass.
pytree.register_dataclass(PackedBatch)
