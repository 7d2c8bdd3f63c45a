"""Codecs: target images <-> latents. Frozen and deterministic: an autoencoder's latents are the means that it predicts.

A codec is a class, registered by name (``config.generation.CODECS``, ``symbiotic_titan.extend.register_codec``). ``codec_info`` asks
it what its latents are, from the headers of its files, in every process; ``build_codec`` loads its weights.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import torch

from symbiotic_titan.config.generation import CODECS, Latents

# Pixels that go through an autoencoder at once: one activation of 128 channels, the Flux encoder's first, is then 512 MB in float32.
PIXELS_AT_ONCE = 2**20


@dataclass(frozen=True)
class CodecInfo:
    """Latents have ``channels`` channels and one position for ``stride`` x ``stride`` pixels: ``scale`` * (mean - ``shift``).

    weights: the file whose content decides the latents; None for a codec without weights.
    """

    channels: int
    stride: int
    scale: float
    shift: float
    weights: Path | None


class Codec(ABC):
    """``channels`` and ``stride`` of its latents are those of ``info``; computes on ``device``."""

    def __init__(self, info: CodecInfo, device: torch.device | str) -> None:
        self.info = info
        self.device = torch.device(device)

    @classmethod
    @abstractmethod
    def describe(cls, latents: Latents) -> CodecInfo:
        """What the codec of [latents] makes, without loading weights.

        Raises:
            ValueError: a key is missing or has no effect with this codec, or ``latents.path`` holds no such autoencoder.
        """

    @classmethod
    @abstractmethod
    def load(cls, info: CodecInfo, device: torch.device | str, dtype: torch.dtype) -> "Codec":
        """The codec with its weights, which compute in ``dtype``, on ``device``; raises ValueError where they cannot be used."""

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
        pixels_per_value: int,
    ) -> list[torch.Tensor]:
        """``function`` of each of ``inputs``; those of one size go through it together."""
        by_size: dict[torch.Size, list[int]] = {}
        for i, input_CHW in enumerate(inputs):
            by_size.setdefault(input_CHW.shape, []).append(i)
        results: dict[int, torch.Tensor] = {}
        for (_, height, width), indices in by_size.items():
            at_once = max(1, PIXELS_AT_ONCE // (height * width * pixels_per_value))
            for start in range(0, len(indices), at_once):
                chosen = indices[start : start + at_once]
                batch_NCHW = torch.stack([inputs[i] for i in chosen]).to(self.device, torch.float32)
                results |= zip(chosen, function(batch_NCHW).float().unbind(), strict=True)
        return [results[i] for i in range(len(inputs))]


class PixelCodec(Codec):
    """Latents that are the pixels themselves."""

    @classmethod
    def describe(cls, latents: Latents) -> CodecInfo:
        for key, default in (("path", ""), ("scale", None), ("shift", None), ("dtype", "float32")):
            value = getattr(latents, key)
            if value != default:
                raise ValueError(
                    f"latents.{key} = {value!r} has no effect with latents.codec = {latents.codec!r}; remove it, or choose another "
                    "codec"
                )
        return CodecInfo(channels=3, stride=1, scale=1.0, shift=0.0, weights=None)

    @classmethod
    def load(cls, info: CodecInfo, device: torch.device | str, dtype: torch.dtype) -> "PixelCodec":
        return cls(info, device)

    def _encode(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        return images_NCHW

    def _decode(self, latents_NCHW: torch.Tensor) -> torch.Tensor:
        return latents_NCHW


class Autoencoder(Codec):
    """A network of two halves: ``encoder`` predicts the latents' mean from images, ``decoder`` images from that mean."""

    def __init__(
        self,
        info: CodecInfo,
        device: torch.device | str,
        dtype: torch.dtype,
        encoder: Callable[[torch.Tensor], torch.Tensor],
        decoder: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        super().__init__(info, device)
        self._dtype = dtype
        self._encoder = encoder
        self._decoder = decoder

    def _encode(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        mean_NCHW = self._encoder(images_NCHW.to(self._dtype)).float()
        # In the cache's precision here too, so that training on the fly and from a cache see the same numbers.
        return (self.info.scale * (mean_NCHW - self.info.shift)).to(self._dtype)

    def _decode(self, latents_NCHW: torch.Tensor) -> torch.Tensor:
        mean_NCHW = latents_NCHW / self.info.scale + self.info.shift
        return self._decoder(mean_NCHW.to(self._dtype))


def weights_path(latents: Latents, kind: str) -> Path:
    """``latents.path``, which must name ``kind``, e.g. "a safetensors file".

    Raises:
        ValueError: it is empty.
    """
    if not latents.path:
        raise ValueError(f"latents.path: codec {latents.codec!r} needs its weights; name {kind}")
    return Path(latents.path)


def codec_info(latents: Latents) -> CodecInfo:
    """What the codec of [latents] makes; raises ValueError, see ``Codec.describe``."""
    return CODECS[latents.codec].describe(latents)


def build_codec(latents: Latents, device: torch.device | str = "cpu") -> Codec:
    """The codec that [latents] names, with its weights, if it has some, on ``device``.

    Raises:
        ValueError: a key is missing or has no effect, the files hold no such codec, or a package is missing.
    """
    dtype = getattr(torch, latents.dtype)
    return CODECS[latents.codec].load(codec_info(latents), device, dtype)


def fingerprint(latents: Latents) -> str:
    """The codec's name and 16 hexadecimal digits, equal for codecs whose latents are the same. Reads the weights file once (about a
    second per GB).

    Raises:
        ValueError: see ``Codec.describe``.
    """
    info = codec_info(latents)
    settings = asdict(info) | {"codec": latents.codec, "dtype": latents.dtype}
    settings["weights"] = _hash_file(info.weights) if info.weights else None
    digest = sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    return f"{latents.codec}-{digest}"


def _hash_file(path: Path) -> str:
    digest = sha256()
    with open(path, "rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()
