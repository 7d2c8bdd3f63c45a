"""A codec: images to be generated <-> latents. Frozen, and without a draw: an autoencoder's latents are the means it predicts."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch

from symbiotic_titan.codecs.files import CodecInfo

# Pixels that go through an autoencoder at once: one activation of 128 channels, the Flux encoder's first, is then 512 MB in float32.
PIXELS_AT_ONCE = 2**20


class Codec(ABC):
    """``channels`` and ``stride`` of its latents are those of ``info``; computes on ``device``."""

    def __init__(self, info: CodecInfo, device: torch.device | str) -> None:
        self.info = info
        self.device = torch.device(device)

    def encode(self, images: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """(C, H / stride, W / stride) float32 latents, on the codec's device, of each (3, H, W) image in [-1, 1].

        Sizes may differ, and are multiples of ``stride``; images of one size are encoded together.
        """
        return self._in_batches(images, self._encode, 1)

    def decode(self, latents: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """(3, H, W) float32 image in [-1, 1], on the codec's device, of each (C, H / stride, W / stride) latents."""
        images = self._in_batches(latents, self._decode, self.info.stride**2)
        return [image_CHW.clamp(-1.0, 1.0) for image_CHW in images]

    @abstractmethod
    def _encode(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """Latents of images of one size."""

    @abstractmethod
    def _decode(self, latents_NCHW: torch.Tensor) -> torch.Tensor:
        """Images of latents of one size."""

    @torch.no_grad()
    def _in_batches(
        self,
        inputs: Sequence[torch.Tensor],
        function: Callable[[torch.Tensor], torch.Tensor],
        pixels_per_cell: int,
    ) -> list[torch.Tensor]:
        """``function`` of each of ``inputs``; those of one size go through it together."""
        by_size: dict[torch.Size, list[int]] = {}
        for i, input_CHW in enumerate(inputs):
            by_size.setdefault(input_CHW.shape, []).append(i)
        results: dict[int, torch.Tensor] = {}
        for (_, height, width), indices in by_size.items():
            at_once = max(1, PIXELS_AT_ONCE // (height * width * pixels_per_cell))
            for start in range(0, len(indices), at_once):
                chosen = indices[start : start + at_once]
                batch_NCHW = torch.stack([inputs[i] for i in chosen]).to(self.device, torch.float32)
                results |= zip(chosen, function(batch_NCHW).float().unbind(), strict=True)
        return [results[i] for i in range(len(inputs))]


class PixelCodec(Codec):
    """Latents that are the pixels themselves."""

    def _encode(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        return images_NCHW

    def _decode(self, latents_NCHW: torch.Tensor) -> torch.Tensor:
        return latents_NCHW


class Autoencoder(Codec):
    """A network of two halves: ``mean`` predicts the latents' mean from images, ``picture`` images from that."""

    def __init__(
        self,
        info: CodecInfo,
        device: torch.device | str,
        dtype: torch.dtype,
        mean: Callable[[torch.Tensor], torch.Tensor],
        picture: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        super().__init__(info, device)
        self._dtype = dtype
        self._mean = mean
        self._picture = picture

    def _encode(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        mean_NCHW = self._mean(images_NCHW.to(self._dtype)).float()
        # In the cache's precision here too, so that training on the fly and from a cache see the same numbers.
        return (self.info.scale * (mean_NCHW - self.info.shift)).to(self._dtype)

    def _decode(self, latents_NCHW: torch.Tensor) -> torch.Tensor:
        mean_NCHW = latents_NCHW / self.info.scale + self.info.shift
        return self._picture(mean_NCHW.to(self._dtype))
