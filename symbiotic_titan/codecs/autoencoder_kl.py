"""An AutoencoderKL from a folder that diffusers wrote. diffusers is an optional extra, imported only here."""

import json
from typing import Any

import torch

from symbiotic_titan.codecs.codec import Autoencoder, CodecInfo, weights_path
from symbiotic_titan.config.generation import Latents

KL_CONFIG, KL_WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"


class KLCodec(Autoencoder):
    """``latents.path`` is the folder of the autoencoder itself."""

    @classmethod
    def describe(cls, latents: Latents) -> CodecInfo:
        folder = weights_path(latents, "a folder that diffusers wrote")
        for name in (KL_CONFIG, KL_WEIGHTS):
            if not (folder / name).is_file():
                raise ValueError(
                    f"latents.path = '{folder}': there is no {name} in it; name the folder of the autoencoder itself "
                    "(in a pipeline it is the one called vae)"
                )
        try:
            config: dict[str, Any] = json.loads((folder / KL_CONFIG).read_text())
            kind = config["_class_name"]
            channels, num_levels = config["latent_channels"], len(config["block_out_channels"])
            # An autoencoder without a shift has null there, or no such key.
            scale, shift = config["scaling_factor"], config.get("shift_factor") or 0.0
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"latents.path = '{folder}': its {KL_CONFIG} is no autoencoder's ({error!r})"
            ) from error
        if kind != "AutoencoderKL":
            raise ValueError(
                f"latents.path = '{folder}': holds a {kind}, but latents.codec is {latents.codec!r}"
            )
        return CodecInfo(
            channels=channels,
            stride=2 ** (num_levels - 1),
            scale=scale if latents.scale is None else latents.scale,
            shift=shift if latents.shift is None else latents.shift,
            weights=folder / KL_WEIGHTS,
        )

    @classmethod
    def load(cls, info: CodecInfo, device: torch.device | str, dtype: torch.dtype) -> "KLCodec":
        """Raises ValueError: diffusers is not installed, or refuses the folder."""
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
        return cls(
            info,
            device,
            dtype,
            lambda images: model.encode(images).latent_dist.mode(),
            lambda latents: model.decode(latents).sample,
        )
