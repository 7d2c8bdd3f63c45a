"""Images to be generated, as what a row carries of them: latents, or pixels that the training device will encode.

    codec            a token in the row
    pixel            (Z,) float32    its pixels in [-1, 1], which are the latents
    an autoencoder   (Z,) uint8      its pixels; ``codecs.batch`` makes latents of them
    any, cached      (Z,) float32    latents, read from a cache

So the number of tokens, and all that packing asks, follows from an image's size. Letters: C channels, H and W cells (pixels or
latents), L tokens of an image, Z numbers in one token.
"""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load, save

from symbiotic_titan.codecs.batch import carries_pixels
from symbiotic_titan.config.data import Data, DataSource
from symbiotic_titan.config.generation import Latents
from symbiotic_titan.data.documents import TokenForm
from symbiotic_titan.data.images import aspect_buckets, nearest_bucket, resize_and_crop
from symbiotic_titan.sequence.geometry import ImageGeometry, patchify

# Tasks whose samples have an image to be generated.
GENERATION_TASKS = ("t2i", "t2i_long")
# Of a sample's latents in a cache, and the name of the one tensor in them.
CACHED_EXTENSION = "safetensors"
_TENSOR = "latents"


@dataclass(frozen=True)
class ImageTokens:
    """(L, Z) tokens of an image of ``rows`` x ``columns`` tokens."""

    values: torch.Tensor
    rows: int
    columns: int


def generates(sources: list[DataSource]) -> bool:
    """Whether any of ``sources`` that are read may have images to be generated."""
    tasks = {source.task for source in sources if source.weight > 0}
    return bool(tasks & {*GENERATION_TASKS, "interleaved"})


class GeneratedImages:
    """How images to be generated enter the rows of a run. Plain data: it travels to worker processes."""

    def __init__(
        self, config: Data, latents: Latents, geometry: ImageGeometry, sources: list[DataSource]
    ) -> None:
        self.step = geometry.vae_token_pixels
        self.is_cached = bool(latents.cache)
        self.form = (
            TokenForm(3 * self.step**2, torch.uint8)
            if carries_pixels(latents) and generates(sources)
            else TokenForm(geometry.vae_token_values, torch.float32)
        )
        self._patch = geometry.latent_patch
        self._buckets = aspect_buckets(config.vae_pixels, self.step, config.max_aspect)

    def fit(self, image: Image.Image) -> Image.Image:
        """``image`` in its aspect bucket: what is encoded, wherever that is done."""
        height, width = nearest_bucket(image.height, image.width, self._buckets)
        return resize_and_crop(image, height, width)

    def from_image(self, image: Image.Image) -> ImageTokens:
        """Tokens of an RGB image of any size."""
        fitted = self.fit(image)
        cells_CHW = to_bytes(fitted) if self.form.dtype == torch.uint8 else to_cells(fitted)
        rows, columns = fitted.height // self.step, fitted.width // self.step
        return ImageTokens(patchify(cells_CHW, cells_CHW.shape[1] // rows), rows, columns)

    def from_cache(self, data: bytes) -> ImageTokens:
        """Tokens of the latents that ``cached_bytes`` wrote; raises ValueError when ``data`` are damaged."""
        try:
            cells_CHW = load(data)[_TENSOR].float()
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"its latents cannot be read ({error})") from error
        _, height, width = cells_CHW.shape
        tokens_LZ = patchify(cells_CHW, self._patch)
        return ImageTokens(tokens_LZ, height // self._patch, width // self._patch)


def to_cells(image: Image.Image) -> torch.Tensor:
    """(3, H, W) float32 in [-1, 1]: the ``pixel`` codec's latents, and what an autoencoder encodes."""
    pixels_CHW = np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 255.0
    return torch.from_numpy(pixels_CHW) * 2.0 - 1.0


def to_bytes(image: Image.Image) -> torch.Tensor:
    """(3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_image(cells_CHW: torch.Tensor) -> Image.Image:
    """RGB image of (3, H, W) pixels; values outside [-1, 1] are clipped."""
    pixels_CHW = cells_CHW.detach().float().cpu()
    bytes_HWC = ((pixels_CHW.clamp(-1.0, 1.0) + 1.0) * 127.5).round().byte().permute(1, 2, 0)
    return Image.fromarray(np.ascontiguousarray(bytes_HWC.numpy()), "RGB")


def cached_bytes(cells_CHW: torch.Tensor, dtype: torch.dtype) -> bytes:
    """(C, H, W) latents as a cache keeps them."""
    return save({_TENSOR: cells_CHW.to("cpu", dtype).contiguous()})
