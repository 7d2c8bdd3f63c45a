"""An AutoencoderKL from a folder that diffusers wrote. diffusers is an optional extra, imported only here."""

import torch

from symbiotic_titan.codecs.codec import Autoencoder
from symbiotic_titan.codecs.files import CodecInfo


def load_autoencoder_kl(
    info: CodecInfo, device: torch.device | str, dtype: torch.dtype
) -> Autoencoder:
    """The codec with its weights on ``device``.

    Raises:
        ValueError: diffusers is not installed, or refuses the folder.
    """
    try:
        from diffusers import AutoencoderKL
    except (ImportError, RuntimeError) as error:  # it wraps what its own imports raise
        raise ValueError(
            f"latents.codec = 'autoencoder_kl' needs the package diffusers, which cannot be imported ({error}); "
            "install it with: pip install 'symbiotic_titan[diffusers]'"
        ) from error
    assert info.weights is not None
    folder = info.weights.parent
    try:
        model = AutoencoderKL.from_pretrained(
            folder, torch_dtype=dtype, local_files_only=True, use_safetensors=True
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"latents.path = '{folder}': diffusers cannot load it ({error})"
        ) from error
    model = model.to(device).eval().requires_grad_(False)
    return Autoencoder(
        info,
        device,
        dtype,
        lambda images: model.encode(images).latent_dist.mode(),
        lambda latents: model.decode(latents).sample,
    )
