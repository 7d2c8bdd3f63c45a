"""Images to be generated, as latent tokens and back.

Letters: C latent channels, H and W latent cells, L latent tokens, Z numbers in one latent token.
"""

import numpy as np
import torch
from PIL import Image

from symbiotic_titan.config.data import Latents
from symbiotic_titan.data.images import to_array
from symbiotic_titan.sequence.geometry import ImageGeometry


def patchify(cells_CHW: torch.Tensor, patch: int) -> torch.Tensor:
    """(L, Z) latent tokens in row-major order; each is flattened as (channel, row, column)."""
    channels, height, width = cells_CHW.shape
    split = cells_CHW.reshape(channels, height // patch, patch, width // patch, patch)
    return split.permute(1, 3, 0, 2, 4).reshape(-1, channels * patch**2)


def unpatchify(tokens_LZ: torch.Tensor, rows: int, columns: int, patch: int) -> torch.Tensor:
    """(C, H, W) latent cells of an image of ``rows`` x ``columns`` tokens: the inverse of ``patchify``."""
    split = tokens_LZ.reshape(rows, columns, -1, patch, patch)
    return split.permute(2, 0, 3, 1, 4).reshape(-1, rows * patch, columns * patch)


def coords(rows: int, columns: int) -> torch.Tensor:
    """(L, 2) int64: (row, column) of each latent token, row-major."""
    return torch.cartesian_prod(torch.arange(rows), torch.arange(columns))


class PixelCodec:
    """Latents that are the pixels themselves, scaled to [-1, 1]."""

    def __init__(self, geometry: ImageGeometry) -> None:
        self._patch = geometry.latent_patch

    def encode(self, image: Image.Image) -> torch.Tensor:
        """(L, Z) float32 tokens of an RGB image whose sides are multiples of ``geometry.vae_token_pixels``."""
        cells_CHW = torch.from_numpy(to_array(image)) * 2.0 - 1.0
        return patchify(cells_CHW, self._patch)

    def decode(self, tokens_LZ: torch.Tensor, rows: int, columns: int) -> Image.Image:
        """RGB image of ``rows`` x ``columns`` tokens; values outside [-1, 1] are clipped."""
        cells_CHW = unpatchify(tokens_LZ.detach().float().cpu(), rows, columns, self._patch)
        bytes_HWC = ((cells_CHW.clamp(-1.0, 1.0) + 1.0) * 127.5).round().byte().permute(1, 2, 0)
        return Image.fromarray(np.ascontiguousarray(bytes_HWC.numpy()), "RGB")


def build_codec(latents: Latents, geometry: ImageGeometry) -> PixelCodec:
    """The codec that [latents] names, for images cut as ``geometry`` says."""
    assert latents.codec == "pixel" and latents.patch == geometry.latent_patch
    assert geometry.latent_channels == 3 and geometry.latent_stride == 1
    return PixelCodec(geometry)
