"""A codec: each latent is the average of a square of pixels. It has no weights, and so no file."""

import torch
import torch.nn.functional as F

from symbiotic_titan.codecs.codec import Codec, CodecInfo
from symbiotic_titan.config.generation import Latents
from symbiotic_titan.extend import register_codec

SIDE = 2  # pixels


@register_codec("average")
class AverageCodec(Codec):
    @classmethod
    def describe(cls, latents: Latents) -> CodecInfo:
        if latents.path:
            raise ValueError(
                "latents.path: has no effect with latents.codec = 'average'; remove it"
            )
        return CodecInfo(channels=3, stride=SIDE, scale=1.0, shift=0.0, weights=None)

    @classmethod
    def load(
        cls, info: CodecInfo, device: torch.device | str, dtype: torch.dtype
    ) -> "AverageCodec":
        return cls(info, device)

    def _encode(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(images_NCHW, SIDE)

    def _decode(self, latents_NCHW: torch.Tensor) -> torch.Tensor:
        return F.interpolate(latents_NCHW, scale_factor=SIDE)
