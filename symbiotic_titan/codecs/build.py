"""From [latents] to a codec that computes."""

import torch

from symbiotic_titan.codecs.autoencoder_kl import load_autoencoder_kl
from symbiotic_titan.codecs.codec import Codec, PixelCodec
from symbiotic_titan.codecs.files import codec_info
from symbiotic_titan.codecs.flux import load_flux
from symbiotic_titan.config.generation import Latents


def build_codec(latents: Latents, device: torch.device | str = "cpu") -> Codec:
    """The codec that [latents] names, with its weights, if it has some, on ``device``.

    Raises:
        ValueError: a key is missing or has no effect, the files hold no such codec, or a package is missing.
    """
    info = codec_info(latents)
    if latents.codec == "pixel":
        return PixelCodec(info, device)
    load = {"flux": load_flux, "autoencoder_kl": load_autoencoder_kl}[latents.codec]
    return load(info, device, getattr(torch, latents.dtype))
