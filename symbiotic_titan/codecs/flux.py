"""The Flux autoencoder: torchtitan's network around a safetensors file of the released layout."""

import importlib.util
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import load_file
from torch import nn

from symbiotic_titan.codecs.codec import Autoencoder
from symbiotic_titan.codecs.files import CodecInfo, flux_shape

# Inside torchtitan. Importing it by name would run the package's __init__, which needs transformers and datasets.
_MODULE = "models/flux/model/autoencoder.py"


def autoencoder_module() -> ModuleType:
    """torchtitan's module with ``AutoEncoder`` and ``AutoEncoderParams``, loaded from its file."""
    package = importlib.util.find_spec("torchtitan")
    assert package is not None and package.submodule_search_locations is not None
    path = Path(package.submodule_search_locations[0]) / _MODULE
    spec = importlib.util.spec_from_file_location("torchtitan_flux_autoencoder", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_flux(info: CodecInfo, device: torch.device | str, dtype: torch.dtype) -> Autoencoder:
    """The codec with its weights on ``device``.

    Raises:
        ValueError: tensors are missing, of another shape, or unknown.
    """
    assert info.weights is not None
    model = _load(info.weights).to(device, dtype)
    # The module's own encode would draw from the global generator; its decode would scale once more.
    encoder, decoder = model.get_submodule("encoder"), model.get_submodule("decoder")
    return Autoencoder(
        info, device, dtype, lambda images: encoder(images).chunk(2, dim=1)[0], decoder
    )


def _load(path: Path) -> nn.Module:
    shape, module = flux_shape(path), autoencoder_module()
    with torch.device("meta"):
        model = module.AutoEncoder(
            module.AutoEncoderParams(
                ch=shape.width,
                ch_mult=shape.multiples,
                num_res_blocks=shape.blocks_per_level,
                z_channels=shape.channels,
            )
        )
    try:
        model.load_state_dict(load_file(path), strict=True, assign=True)
    except RuntimeError as error:
        details = " ".join(str(error).split())
        raise ValueError(f"latents.path = '{path}': is no Flux autoencoder ({details})") from error
    return model.eval().requires_grad_(False)
