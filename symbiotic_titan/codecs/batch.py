"""Pixels that a loader carries -> latents that the model is trained on, on the training device."""

from dataclasses import dataclass, replace

import torch

from symbiotic_titan.codecs.codec import Codec, build_codec
from symbiotic_titan.config.generation import Latents
from symbiotic_titan.sequence.batch import PackedBatch
from symbiotic_titan.sequence.geometry import (
    ImageGeometry,
    patchify,
    unpatchify,
)


@dataclass(frozen=True)
class ImagePlace:
    """An image of ``rows`` x ``columns`` tokens. It begins at latent token ``start`` of row ``row`` of the batch."""

    row: int
    start: int
    rows: int
    columns: int

    @property
    def tokens(self) -> tuple[int, slice]:
        return self.row, slice(self.start, self.start + self.rows * self.columns)


class BatchEncoder:
    """Fills in the latents of batches whose loader carries pixels; other batches it returns as they are.

    It runs between the loader and the model: eagerly, without gradients, and with static shapes at both ends.
    """

    def __init__(self, codec: Codec | None, geometry: ImageGeometry) -> None:
        self.codec = codec
        self._geometry = geometry

    def places(self, batch: PackedBatch) -> list[ImagePlace] | None:
        """Of the images in ``batch`` that are to be encoded; None where it has latents. No device sync for a ``batch`` on the host."""
        if batch.latents.dtype != torch.uint8:
            return None
        return image_places(batch.vae_image, batch.vae_coords)

    def __call__(self, batch: PackedBatch, places: list[ImagePlace] | None = None) -> PackedBatch:
        """``batch`` with (B, L, Z) float32 latents, on the device where it lies. ``places``: see ``places``, where they are known."""
        if batch.latents.dtype != torch.uint8:
            return batch
        assert self.codec is not None, "the loader and this step were given the same [latents]"
        places = self.places(batch) if places is None else places
        assert places is not None
        images = [self._pixels(batch.latents[place.tokens], place) for place in places]
        latents_BLZ = torch.zeros(
            (*batch.vae_image.shape, self._geometry.vae_token_values), device=batch.latents.device
        )
        for place, cells_CHW in zip(places, self.codec.encode(images), strict=True):
            latents_BLZ[place.tokens] = patchify(cells_CHW, self._geometry.latent_patch)
        return replace(batch, latents=latents_BLZ)

    def _pixels(self, bytes_LZ: torch.Tensor, place: ImagePlace) -> torch.Tensor:
        """(3, height, width) in [-1, 1]."""
        side = self._geometry.vae_token_pixels
        return unpatchify(bytes_LZ, place.rows, place.columns, side).float() / 127.5 - 1.0


def image_places(vae_image_BL: torch.Tensor, vae_coords_BLA: torch.Tensor) -> list[ImagePlace]:
    """Where each target image lies. Tokens of an image are adjacent and in row-major order."""
    numbers_BL, coords_BLA = vae_image_BL.cpu(), vae_coords_BLA.cpu()  # device sync
    places = []
    for row, numbers_L in enumerate(numbers_BL):
        images, counts = numbers_L[numbers_L >= 0].unique_consecutive(return_counts=True)
        start = 0
        for count in counts.tolist():
            rows, columns = (coords_BLA[row, start + count - 1] + 1).tolist()
            assert rows * columns == count
            places.append(ImagePlace(row, start, rows, columns))
            start += count
    return places


def build_batch_encoder(
    latents: Latents, geometry: ImageGeometry, device: torch.device | str, *, needed: bool = True
) -> BatchEncoder:
    """The step between the loader and the model; the codec is loaded only where batches carry pixels. ``needed``: whether
    there are target images at all.

    Raises:
        ValueError: see ``build_codec``.
    """
    codec = build_codec(latents, device) if needed and latents.carries_pixels else None
    return BatchEncoder(codec, geometry)
