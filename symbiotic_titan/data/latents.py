"""Target images as a packed sequence carries them: latents, or pixels that the training device will encode.

    codec            a token
    pixel            (Z,) float32    its pixels in [-1, 1], which are the latents
    an autoencoder   (Z,) uint8      its pixels; ``codecs.batch`` makes latents of them
    any, cached      (Z,) float32    latents, read from a cache

In each case the number of tokens, and so all that packing needs to know, follows from the size of the image.
"""

from collections.abc import Iterable

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load, save

from symbiotic_titan.config.data import Data, DataSource
from symbiotic_titan.config.generation import Latents
from symbiotic_titan.data.documents import TokenForm, VaeSegment
from symbiotic_titan.data.images import aspect_buckets, nearest_bucket, resize_and_crop
from symbiotic_titan.sequence.geometry import ImageGeometry, patchify
from symbiotic_titan.sequence.tasks import TASKS

# Name of the one tensor in a cached member.
_TENSOR = "latents"


def generates(sources: Iterable[DataSource]) -> bool:
    """Whether any of ``sources`` may have target images; leave out those that are not read (``config.data.used_sources``)."""
    return any(TASKS[source.task].has_targets for source in sources)


class TargetImages:
    """How target images enter the packed sequences of a run. Plain data: it travels to worker processes."""

    def __init__(
        self, config: Data, latents: Latents, geometry: ImageGeometry, sources: list[DataSource]
    ) -> None:
        self.step = geometry.vae_token_pixels
        self.is_cached = bool(latents.cache)
        self.form = (
            TokenForm(3 * self.step**2, torch.uint8)
            if latents.carries_pixels and generates(sources)
            else TokenForm(geometry.vae_token_values, torch.float32)
        )
        self._patch = geometry.latent_patch
        self._buckets = aspect_buckets(config.vae_pixels, self.step, config.max_aspect)

    def fit(self, image: Image.Image) -> Image.Image:
        """``image`` resized and cropped to its aspect bucket, as every codec gets it."""
        height, width = nearest_bucket(image.height, image.width, self._buckets)
        return resize_and_crop(image, height, width)

    def from_image(self, image: Image.Image) -> VaeSegment:
        """Tokens of an RGB image of any size."""
        fitted = self.fit(image)
        pixels_CHW = to_bytes(fitted) if self.form.dtype == torch.uint8 else to_pixels(fitted)
        rows, columns = fitted.height // self.step, fitted.width // self.step
        return VaeSegment(patchify(pixels_CHW, pixels_CHW.shape[1] // rows), rows, columns)

    def from_cache(self, data: bytes) -> VaeSegment:
        """Tokens of the latents that ``cached_bytes`` wrote; raises ValueError when ``data`` are damaged."""
        try:
            latents_CHW = load(data)[_TENSOR].float()
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"its latents cannot be read ({error})") from error
        _, height, width = latents_CHW.shape
        tokens_LZ = patchify(latents_CHW, self._patch)
        return VaeSegment(tokens_LZ, height // self._patch, width // self._patch)


def to_pixels(image: Image.Image) -> torch.Tensor:
    """(3, H, W) float32 in [-1, 1]: the ``pixel`` codec's latents, and what an autoencoder encodes."""
    pixels_CHW = np.asarray(image).astype(np.float32).transpose(2, 0, 1)
    pixels_CHW /= 255.0
    pixels_CHW *= 2.0
    pixels_CHW -= 1.0
    return torch.from_numpy(pixels_CHW)


def to_bytes(image: Image.Image) -> torch.Tensor:
    """(3, H, W) uint8. A quarter of the bytes that float32 would move from worker to device."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_image(pixels_CHW: torch.Tensor) -> Image.Image:
    """RGB image of (3, H, W) pixels; values outside [-1, 1] are clipped."""
    pixels_CHW = pixels_CHW.detach().float().cpu()
    bytes_HWC = ((pixels_CHW.clamp(-1.0, 1.0) + 1.0) * 127.5).round().byte().permute(1, 2, 0)
    return Image.fromarray(np.ascontiguousarray(bytes_HWC.numpy()), "RGB")


def cached_bytes(latents_CHW: torch.Tensor, dtype: torch.dtype) -> bytes:
    """(C, H, W) latents as a cache keeps them."""
    return save({_TENSOR: latents_CHW.to("cpu", dtype).contiguous()})
